"""Gather schedule: every rank receives all features and evaluates the global loss.

Shapes: n pairs a rank, W ranks, N = W n pairs in the global batch, D feature dims.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class GlobalBatch(NamedTuple):
    x_ND: Tensor
    y_ND: Tensor
    valid_N: Tensor
    ids_N: Tensor | None


def gather_batch(
    x_nD: Tensor, y_nD: Tensor, valid_n: Tensor | None, ids_n: Tensor | None, group: dist.ProcessGroup
) -> GlobalBatch:
    """Concatenate every rank's slice in rank order, with one collective for features and one for the rest.

    Collective: all ranks of `group` call it with equal shapes and dtypes, and with ids on all or on none.
    The gradient of this rank's slice is W times that of the global loss, so that the MEAN over ranks of the parameter
    gradients is the true gradient. What every rank holds whole, the logit scale, must not be multiplied: its mean is
    right as it is.
    """
    features_N2D: Tensor = _GatherFeatures.apply(torch.cat([x_nD, y_nD], dim=1), group)
    x_ND, y_ND = features_N2D.chunk(2, dim=1)
    # Validity always travels: a rank may have padding where another has none, and both must make the same calls.
    valid_n = torch.ones(len(x_nD), dtype=torch.bool, device=x_nD.device) if valid_n is None else valid_n
    labels_n = [valid_n.long()] if ids_n is None else [valid_n.long(), ids_n]
    labels_NL = _all_gather(torch.stack(labels_n, dim=1), group)
    return GlobalBatch(x_ND, y_ND, labels_NL[:, 0].bool(), None if ids_n is None else labels_NL[:, 1].contiguous())


class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features_nF: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.num_local = group, len(features_nF)
        return _all_gather(features_nF, group)

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, None]:
        # Every rank computed the whole gradient, so nothing has to be reduced here.
        start = dist.get_rank(ctx.group) * ctx.num_local
        return grad_NF[start : start + ctx.num_local] * dist.get_world_size(ctx.group), None


def _all_gather(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    gathered = local.new_empty(dist.get_world_size(group) * local.shape[0], *local.shape[1:])
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
    return gathered
