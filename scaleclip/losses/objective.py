"""A step's objective, from features to its terms: each the mean over the global batch, the same on every rank.

A term's gradients are such that the mean over ranks is the true one. Dimensions: B pairs of a rank, E the embedding space.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from scaleclip.config import LossConfig
from scaleclip.errors import ConfigError
from scaleclip.losses.options import kernel_options
from scaleclip.losses.projection import project
from scaleclip.losses.simclr import simclr
from scaleclip.models.dual_encoder import Features
from scaleclip_kernels import sigmoid_contrastive_loss, softmax_contrastive_loss

CONTRASTIVE, SIMCLR, TEXT, CAPTION = "contrastive", "simclr", "text", "caption"


class Labels(NamedTuple):
    """What the terms need to know of a batch beside its features."""

    ids_B: Tensor
    """int64; equal ones mark pairs of the same concept."""
    valid_B: Tensor
    """bool; False for a pair that does not count."""
    pairs_valid_B: Tensor | None = None
    """bool, likewise for the rows of the batch of texts."""

    @staticmethod
    def cat(chunks: Sequence["Labels"]) -> "Labels":
        """The labels of all chunks of a share."""
        pairs_valid = [chunk.pairs_valid_B for chunk in chunks if chunk.pairs_valid_B is not None]
        return Labels(
            torch.cat([chunk.ids_B for chunk in chunks]),
            torch.cat([chunk.valid_B for chunk in chunks]),
            torch.cat(pairs_valid) if pairs_valid else None,
        )


def batch_terms(features: Features, labels: Labels, config: LossConfig) -> dict[str, Tensor]:
    """The terms that compare samples with each other, by name, before their weights: fp32 (). All ranks call."""
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    terms = {CONTRASTIVE: contrastive(features, labels.ids_B, labels.valid_B, config, group)}
    if features.projector is not None:
        projected = [project(view, features.projector, labels.valid_B, group) for view in features.augmented_BD]
        terms[SIMCLR] = simclr((projected[0], projected[1]), labels.valid_B, config, group)
    if labels.pairs_valid_B is not None:
        terms[TEXT] = text_contrastive(features.pairs_BE, labels.pairs_valid_B, config, group)
    return terms


def weighted_sum(terms: Mapping[str, Tensor], config: LossConfig) -> Tensor:
    """The loss."""
    weights = {
        CONTRASTIVE: 1.0, SIMCLR: config.simclr_weight, TEXT: config.text_weight, CAPTION: config.caption_weight
    }  # fmt: skip
    return sum((weights[name] * term for name, term in terms.items()), start=torch.zeros(()))


def contrastive(features: Features, ids_B: Tensor, valid_B: Tensor, config: LossConfig, group: ProcessGroup | None) -> Tensor:
    """Mean over text views of the configured contrastive loss, each view with its own denominators. fp32 ()."""
    loss: Callable[..., Tensor] = partial(softmax_contrastive_loss, weights=config.weights)
    if config.kind == "sigmoid":
        loss = partial(sigmoid_contrastive_loss, logit_bias=features.logit_bias)
    return loss(
        features.image_BE,
        torch.cat(features.texts_BE),
        features.logit_scale,
        valid=valid_B,
        ids=ids_B,
        duplicates=config.duplicates,
        views=len(features.texts_BE),
        **kernel_options(config, group),
    )


def text_contrastive(texts_BE: Sequence[Tensor], valid_B: Tensor, config: LossConfig, group: ProcessGroup | None) -> Tensor:
    """InfoNCE between texts at a fixed temperature; with negatives InfoNCE+ (Jina-CLIP, arXiv:2405.20204). fp32 ().

    A query is compared with the positives and all negatives of the batch, a positive with the queries alone.

    Args:
        texts_BE: features of queries, of positives and of each of the negatives.
        valid_B: bool, a row of texts.
        config: weights of the two directions, temperature.
        group: all ranks.
    """
    query_BE, *documents = texts_BE
    return softmax_contrastive_loss(
        query_BE,
        torch.cat(documents),
        query_BE.new_full((), 1 / config.text_temperature),
        valid=valid_B,
        column_valid=valid_B.repeat(len(documents)),
        weights=config.weights,
        **kernel_options(config, group),
    )


def check_runs_on(device: torch.device, config: LossConfig) -> None:
    """Evaluate the loss of one pair.

    Raises:
        ConfigError: it cannot run there as it is configured.
    """
    one, scale = torch.ones(1, 8, device=device), torch.ones((), device=device)
    try:
        softmax_contrastive_loss(one, one, scale, **kernel_options(config, None))
    except ValueError as error:
        raise ConfigError(f"loss.backend={config.backend}, loss.fp32_precision={config.fp32_precision}: {error}") from error
