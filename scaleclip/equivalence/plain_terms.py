"""The terms of an objective as their papers print them, in plain PyTorch: every matrix is stored, every logarithm taken.

Dimensions: N samples of the whole batch, M documents, E the width of what is compared.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from scaleclip.config import LossConfig
from scaleclip.losses.objective import Labels
from scaleclip.models.dual_encoder import Features
from scaleclip.models.projector import ProjectorWeights
from scaleclip_kernels import sigmoid_contrastive_loss, softmax_contrastive_loss


def plain_terms(features: Features, labels: Labels, config: LossConfig) -> Tensor:
    """The weighted sum of the terms that compare samples, over one process's batch."""
    loss = _contrastive(features, labels, config)
    if features.projector is not None:
        first, second = (_project(view[labels.valid_B], features.projector) for view in features.augmented_BD)
        loss = loss + config.simclr_weight * _nt_xent(first, second, config.simclr_temperature)
    if labels.pairs_valid_B is not None:
        query, *documents = (text[labels.pairs_valid_B] for text in features.pairs_BE)
        loss = loss + config.text_weight * _info_nce_plus(query, documents, config)
    return loss


def _contrastive(features: Features, labels: Labels, config: LossConfig) -> Tensor:
    loss: Callable[..., Tensor] = partial(softmax_contrastive_loss, weights=config.weights)
    if config.kind == "sigmoid":
        loss = partial(sigmoid_contrastive_loss, logit_bias=features.logit_bias)
    return loss(
        features.image_BE,
        torch.cat(features.texts_BE),
        features.logit_scale,
        valid=labels.valid_B,
        ids=labels.ids_B,
        duplicates=config.duplicates,
        views=len(features.texts_BE),
        backend="reference",
    )


def _project(states_ND: Tensor, weights: ProjectorWeights) -> Tensor:
    hidden = F.linear(states_ND, weights.first_HD)
    hidden = F.batch_norm(hidden, None, None, weights.first_scale_H, weights.first_shift_H, training=True).relu()
    hidden = F.linear(hidden, weights.second_HH)
    hidden = F.batch_norm(hidden, None, None, weights.second_scale_H, weights.second_shift_H, training=True).relu()
    return F.linear(hidden, weights.last_EH, weights.last_bias_E)


def _nt_xent(first_NE: Tensor, second_NE: Tensor, temperature: float) -> Tensor:
    """SimCLR, arXiv:2002.05709, equation 1."""
    views = F.normalize(torch.cat([first_NE, second_NE]), dim=1)
    logits = (views @ views.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(views)).roll(len(first_NE)))


def _info_nce_plus(query_NE: Tensor, documents: list[Tensor], config: LossConfig) -> Tensor:
    """Jina-CLIP, arXiv:2405.20204: queries among all documents, documents that are positives among all queries."""
    logits_NM = query_NE @ torch.cat(documents).T / config.text_temperature
    pair_N = torch.arange(len(query_NE))
    to_document, to_query = config.weights
    positives_NN = logits_NM[:, : len(query_NE)]
    return to_document * F.cross_entropy(logits_NM, pair_N) + to_query * F.cross_entropy(positives_NN.T, pair_N)
