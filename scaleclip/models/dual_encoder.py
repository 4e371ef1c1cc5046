"""CLIP's dual encoder (arXiv:2103.00020): two towers, two projections, a learned scale and, for SigLIP, a bias.

Dimensions: B samples, C channels, H W pixels, R values of a row of pixels, T tokens, E the shared embedding space, D a
tower's width.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from scaleclip.config import ModelConfig
from scaleclip.models.depth import NO_TOWER, Place, depth_groups
from scaleclip.models.towers import build_image_tower, build_text_tower


class Features(NamedTuple):
    """What the losses need of a batch. All fp32, whatever the towers compute in."""

    image_BE: Tensor
    """Image features of unit length."""
    texts_BE: tuple[Tensor, ...]
    """Text features of unit length, one tensor a text view."""
    logit_scale: Tensor
    """The multiplier of the similarities itself, shape ()."""
    logit_bias: Tensor | None
    """Added to every logit, shape ()."""


class DualEncoder(nn.Module):
    """Images and texts -> features in one space.

    `logit_scale` holds the LOGARITHM of the multiplier. The trainer keeps it within [0, `log_max_logit_scale`] after every
    step, where the optimizer's fp32 master is at hand; clamping in forward would stop its gradient at the bound.

    Under `torch.device("meta")` it has the shapes of its parameters and no values.

    Raises:
        ConfigError: a tower cannot be built as configured (see `build_image_tower`).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.image = build_image_tower(config.image, config.activation_checkpointing)
        self.text = build_text_tower(config.text, config.activation_checkpointing)
        self.image_projection = _projection(self.image.width, config.embed_dim)
        self.text_projection = _projection(self.text.width, config.embed_dim)
        # shape (1,): DeepSpeed cannot hold a parameter without dimensions
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(config.init_logit_scale)))
        bias = config.init_logit_bias
        self.logit_bias = None if bias is None else nn.Parameter(torch.full((1,), bias))
        self.log_max_logit_scale = math.log(config.max_logit_scale)
        self._mean, self._std = config.image.mean, config.image.std
        self._constants: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._row_constants(config.image.size, torch.device("cpu"))

    def forward(self, pixels_BCHW: Tensor, tokens_BT: tuple[Tensor, ...], seeds_B: Tensor | None = None) -> Features:
        """Features of a batch.

        Args:
            pixels_BCHW: uint8, RGB.
            tokens_BT: int64, one tensor a text view; all views go through the text tower together.
            seeds_B: int64, a seed a sample for patch dropout; unused in evaluation.
        """
        return Features(
            image_BE=self.encode_image(pixels_BCHW, seeds_B),
            texts_BE=self.encode_text(torch.cat(tokens_BT)).chunk(len(tokens_BT)),
            logit_scale=self.logit_scale.float().exp().squeeze(0),
            logit_bias=None if self.logit_bias is None else self.logit_bias.float().squeeze(0),
        )

    def encode_image(self, pixels_BCHW: Tensor, seeds_B: Tensor | None = None) -> Tensor:
        """Image features [B, E], fp32, of unit length, from uint8 pixels."""
        pixels_BCHW = self._normalise(pixels_BCHW).to(self.image_projection.weight.dtype)
        # convolutions are faster on channels that lie together, and ConvNeXt's permutations are then free
        pixels_BCHW = pixels_BCHW.contiguous(memory_format=torch.channels_last)
        return F.normalize(self.image_projection(self.image(pixels_BCHW, seeds_B)).float(), dim=-1)

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        """Text features [B, E], fp32, of unit length, from int64 token ids."""
        return F.normalize(self.text_projection(self.text(tokens_BT)).float(), dim=-1)

    def parameter_places(self) -> dict[str, Place]:
        """The tower and depth of every parameter by its name; a projection lies in its tower's last group."""
        places = _tower_places("image", self.image.body) | _tower_places("text", self.text.body)
        return {name: places.get(name, NO_TOWER) for name, _ in self.named_parameters()}

    def _normalise(self, pixels_BCHW: Tensor) -> Tensor:
        """fp32 pixels with the configured mean and standard deviation, channels last in memory."""
        # a row's values, all channels, lie together: long vectors instead of three channels at a time
        rows_BHR = pixels_BCHW.permute(0, 2, 3, 1).flatten(2).float()
        scale_R, offset_R = self._row_constants(pixels_BCHW.shape[-1], pixels_BCHW.device)
        num_images, _, height, width = pixels_BCHW.shape
        return rows_BHR.mul_(scale_R).add_(offset_R).view(num_images, height, width, 3).permute(0, 3, 1, 2)

    def _row_constants(self, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        # kept here, not as buffers: casting the module to bf16 would round those
        if (width, device) not in self._constants:
            scale = [1 / (255 * std) for std in self._std]
            offset = [-mean / std for mean, std in zip(self._mean, self._std, strict=True)]
            self._constants[width, device] = (
                torch.tensor(scale * width, device=device),
                torch.tensor(offset * width, device=device),
            )
        return self._constants[width, device]


def _projection(width: int, embed_dim: int) -> nn.Linear:
    projection = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(projection.weight, std=width**-0.5)
    return projection


def _tower_places(tower: Literal["image", "text"], body: PreTrainedModel) -> dict[str, Place]:
    groups = depth_groups(body)
    places = {f"{tower}.body.{name}": Place(tower, group, groups.num_groups) for name, group in groups.group_of.items()}
    return places | {f"{tower}_projection.weight": Place(tower, groups.num_groups - 1, groups.num_groups)}
