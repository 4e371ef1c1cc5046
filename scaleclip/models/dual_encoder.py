"""CLIP's dual encoder (arXiv:2103.00020): two towers, two projections, a learned scale and, for SigLIP, a bias; with a head for
self-supervision on images (SLIP) and a caption decoder (CLIPS) where these are configured.

Dimensions: B samples, C channels, H W pixels, R values of a row of pixels, T tokens, S tokens of a caption to write, E the
shared embedding space, D a tower's width.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from scaleclip.config import ModelConfig
from scaleclip.errors import ConfigError
from scaleclip.models.caption_decoder import CaptionDecoder
from scaleclip.models.depth import NO_TOWER, Place, depth_groups
from scaleclip.models.projector import Projector, ProjectorWeights
from scaleclip.models.towers import build_image_tower, build_text_tower


class Inputs(NamedTuple):
    """What is encoded of a chunk; what an objective does not need is left out."""

    pixels_BCHW: Tensor
    """uint8, RGB."""
    tokens_BT: tuple[Tensor, ...]
    """int64, one tensor a text view; all views go through the text tower together."""
    seeds_B: Tensor | None = None
    """int64, a seed a sample for patch dropout; unused in evaluation."""
    augmented_BCHW: tuple[Tensor, ...] = ()
    """uint8, further views of the images, for the projector."""
    pairs_BT: tuple[Tensor, ...] = ()
    """int64, the texts of a second batch: queries, positives and then each of the negatives."""
    captions_BS: Tensor | None = None
    """int64, what the caption decoder is to write of the first samples, from the start token on; None: it is not asked."""
    caption_lengths_B: Tensor | None = None
    """int64, tokens of each caption that count, without the start token."""


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
    augmented_BD: tuple[Tensor, ...] = ()
    """Pooled states of the further views of the images, for the projector."""
    projector: ProjectorWeights | None = None
    """The projector's weights: it normalises over the whole batch, so the loss applies it."""
    pairs_BE: tuple[Tensor, ...] = ()
    """Text features of unit length of the second batch."""
    caption_loss: Tensor | None = None
    """Cross-entropies of this chunk's captions, their sum over tokens, shape ()."""

    def rows(self) -> tuple[Tensor, ...]:
        """Tensors with a row a sample."""
        return (self.image_BE, *self.texts_BE, *self.augmented_BD, *self.pairs_BE)

    def whole(self) -> tuple[Tensor, ...]:
        """Tensors that belong to the whole batch."""
        return (self.logit_scale, *(() if self.logit_bias is None else (self.logit_bias,)), *(self.projector or ()))

    def replaced(self, rows: Sequence[Tensor], whole: Sequence[Tensor]) -> "Features":
        """The same with other tensors in the places of `rows()` and `whole()`, and without a caption's loss."""
        row, value = iter(rows), iter(whole)
        return Features(
            image_BE=next(row),
            texts_BE=tuple(next(row) for _ in self.texts_BE),
            augmented_BD=tuple(next(row) for _ in self.augmented_BD),
            pairs_BE=tuple(next(row) for _ in self.pairs_BE),
            logit_scale=next(value),
            logit_bias=None if self.logit_bias is None else next(value),
            projector=None if self.projector is None else ProjectorWeights(*value),
        )


class DualEncoder(nn.Module):
    """Images and texts -> features in one space.

    `logit_scale` holds the LOGARITHM of the multiplier. The trainer keeps it within [0, `log_max_logit_scale`] after every
    step, where the optimizer's fp32 master is at hand; clamping in forward would stop its gradient at the bound.

    Under `torch.device("meta")` it has the shapes of its parameters and no values.

    Raises:
        ConfigError: a tower cannot be built as configured (see `build_image_tower`), or the image tower has no projection and
            another width than the shared space.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.image = build_image_tower(config.image, config.activation_checkpointing)
        self.text = build_text_tower(config.text, config.activation_checkpointing)
        if not config.image.projection and self.image.width != config.embed_dim:
            raise ConfigError(
                f"model.image.projection=False: the image tower's vector of {self.image.width} values is not of "
                f"model.embed_dim={config.embed_dim}: set model.embed_dim={self.image.width}, or model.image.projection=true"
            )
        self.embed_dim = config.embed_dim
        self.image_projection = _projection(self.image.width, config.embed_dim) if config.image.projection else nn.Identity()
        self.text_projection = _projection(self.text.width, config.embed_dim)
        self.projector = None if config.projector is None else Projector(self.image.width, config.projector)
        self.caption_decoder = None
        if config.caption_decoder is not None:
            self.caption_decoder = CaptionDecoder(
                config.caption_decoder, self.text.body.config, self.image.state_width, config.activation_checkpointing
            )
        # shape (1,): DeepSpeed cannot hold a parameter without dimensions
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(config.init_logit_scale)))
        bias = config.init_logit_bias
        self.logit_bias = None if bias is None else nn.Parameter(torch.full((1,), bias))
        self.log_max_logit_scale = math.log(config.max_logit_scale)
        self.pixel_mean, self.pixel_std = config.image.mean, config.image.std
        self._constants: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._row_constants(config.image.size, torch.device("cpu"))

    def forward(
        self,
        pixels_BCHW: Tensor,
        tokens_BT: tuple[Tensor, ...],
        seeds_B: Tensor | None = None,
        augmented_BCHW: tuple[Tensor, ...] = (),
        pairs_BT: tuple[Tensor, ...] = (),
        captions_BS: Tensor | None = None,
        caption_lengths_B: Tensor | None = None,
    ) -> Features:
        """Features of a batch, from what `Inputs` says of it."""
        num_images = 1 + len(augmented_BCHW)
        pixels = torch.cat([pixels_BCHW, *augmented_BCHW]) if augmented_BCHW else pixels_BCHW
        images = self.image(self._prepare(pixels), seeds_B if seeds_B is None else seeds_B.repeat(num_images))
        image_BD, *augmented_BD = images.pooled_BD.chunk(num_images)
        texts = self.text(torch.cat([*tokens_BT, *pairs_BT]))
        features = self._project(self.text_projection, texts.pooled_BD).chunk(len(tokens_BT) + len(pairs_BT))
        caption_loss = None
        if self.caption_decoder is not None and captions_BS is not None:
            size = len(captions_BS)
            is_read_BT = self.text.is_read(tokens_BT[0][:size])
            caption_loss = self.caption_decoder(
                images.states_BND[:size], texts.states_BND[:size], is_read_BT, captions_BS, caption_lengths_B
            )
        return Features(
            image_BE=self._project(self.image_projection, image_BD),
            texts_BE=features[: len(tokens_BT)],
            logit_scale=self.logit_scale.float().exp().squeeze(0),
            # not squeeze: of a parameter, without gradients, that is a view which torch's hooks take for one with a history
            logit_bias=None if self.logit_bias is None else self.logit_bias.float().sum(),
            augmented_BD=tuple(each.float() for each in augmented_BD),
            projector=None if self.projector is None else self.projector(),
            pairs_BE=features[len(tokens_BT) :],
            caption_loss=caption_loss,
        )

    def encode_image(self, pixels_BCHW: Tensor, seeds_B: Tensor | None = None) -> Tensor:
        """Image features [B, E], fp32, of unit length, from uint8 pixels."""
        return self._project(self.image_projection, self.pool_image(pixels_BCHW, seeds_B))

    def pool_image(self, pixels_BCHW: Tensor, seeds_B: Tensor | None = None) -> Tensor:
        """The image tower's pooled states [B, D], before the projection, from uint8 pixels."""
        pooled_BD: Tensor = self.image(self._prepare(pixels_BCHW), seeds_B).pooled_BD
        return pooled_BD

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        """Text features [B, E], fp32, of unit length, from int64 token ids."""
        return self._project(self.text_projection, self.text(tokens_BT).pooled_BD)

    @torch.no_grad()
    def write_captions(self, pixels_BCHW: Tensor, tokens_BT: Tensor, start_id: int, end_id: int) -> Tensor:
        """What the caption decoder writes, greedily, of images (uint8) and their web captions (int64): int64 [B, queries]."""
        assert self.caption_decoder is not None, "model.caption_decoder is set"
        images, texts = self.image(self._prepare(pixels_BCHW)), self.text(tokens_BT)
        return self.caption_decoder.generate(
            images.states_BND, texts.states_BND, self.text.is_read(tokens_BT), start_id, end_id
        )

    def parameter_places(self) -> dict[str, Place]:
        """The tower and depth of every parameter by its name; a projection lies in its tower's last group."""
        places = _tower_places("image", self.image.body) | _tower_places("text", self.text.body)
        return {name: places.get(name, NO_TOWER) for name, _ in self.named_parameters()}

    def _prepare(self, pixels_BCHW: Tensor) -> Tensor:
        pixels_BCHW = self._normalise(pixels_BCHW).to(self.text_projection.weight.dtype)
        # convolutions are faster on channels that lie together, and ConvNeXt's permutations are then free
        return pixels_BCHW.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def _project(projection: nn.Module, pooled_BD: Tensor) -> Tensor:
        return F.normalize(projection(pooled_BD).float(), dim=-1)

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
            scale = [1 / (255 * std) for std in self.pixel_std]
            offset = [-mean / std for mean, std in zip(self.pixel_mean, self.pixel_std, strict=True)]
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
