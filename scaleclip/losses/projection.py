"""The projector's arithmetic, with batch norm (arXiv:1502.03167) over the valid samples of the global batch.

torch.nn.SyncBatchNorm refuses the CPU, knows no invalid samples, and averages gradients in its own way.

Dimensions: B samples of this rank, D the image tower's width, H hidden, E the output's width.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from scaleclip.models.projector import ProjectorWeights

_EPS = 1e-5


def project(states_BD: Tensor, weights: ProjectorWeights, valid_B: Tensor, group: ProcessGroup | None) -> Tensor:
    """Linear, batch norm, ReLU, twice, then linear. fp32 [B, E], zero where invalid; autocast plays no part.

    All ranks of the group call, in the backward pass too; they may have different numbers of samples, or none. Where every rank
    starts with W times the true gradient, the states' gradients are W times the true ones and the mean over ranks of the
    weights' gradients is the true one. Differentiable once.

    Args:
        states_BD: floating point.
        weights: the projector's, alike on all ranks.
        valid_B: bool; an invalid sample may hold anything, NaN included, and gets a gradient of zero.
        group: ranks that share the statistics; None: this process has the whole batch.
    """
    invalid_B1 = ~valid_B.unsqueeze(1)
    with torch.autocast(states_BD.device.type, enabled=False):
        # masked_fill, not a product: 0 * NaN is NaN
        hidden_BH = F.linear(states_BD.float().masked_fill(invalid_B1, 0), weights.first_HD)
        hidden_BH = _standardise(hidden_BH, valid_B, group) * weights.first_scale_H + weights.first_shift_H
        hidden_BH = F.linear(hidden_BH.relu(), weights.second_HH)
        hidden_BH = _standardise(hidden_BH, valid_B, group) * weights.second_scale_H + weights.second_shift_H
        projected_BE = F.linear(hidden_BH.relu(), weights.last_EH, weights.last_bias_E)
        # keeps a gradient of NaN at an invalid sample out of the weights' gradients
        return projected_BE.masked_fill(invalid_B1, 0)


def _standardise(x_BH: Tensor, valid_B: Tensor, group: ProcessGroup | None) -> Tensor:
    standard_BH: Tensor = _Standardise.apply(x_BH, valid_B, group)
    return standard_BH


class _Standardise(torch.autograd.Function):
    """x less its mean, over its standard deviation, both over the valid rows of all ranks; zero where invalid.

    Gradients arrive as zero where invalid: `project` sees to it.
    """

    @staticmethod
    def forward(ctx: Any, x_BH: Tensor, valid_B: Tensor, group: ProcessGroup | None) -> Tensor:
        invalid_B1 = ~valid_B.unsqueeze(1)
        sums = torch.cat([x_BH.masked_fill(invalid_B1, 0).sum(dim=0), valid_B.sum(dtype=x_BH.dtype).unsqueeze(0)])
        sums = _sum_over_ranks(sums, group)
        # of no valid row at all the mean is 0
        count = sums[-1].clamp(min=1)
        # The mean first: where it is large beside the deviation, E[x^2] - E[x]^2 is a difference of nearly equal numbers.
        centred_BH = (x_BH - sums[:-1] / count).masked_fill_(invalid_B1, 0)
        variance_H = _sum_over_ranks(centred_BH.square().sum(dim=0), group) / count
        inverse_H = (variance_H + _EPS).rsqrt()
        standard_BH = centred_BH.mul_(inverse_H)
        ctx.group = group
        ctx.save_for_backward(standard_BH, inverse_H, count, invalid_B1)
        return standard_BH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BH: Tensor) -> tuple[Tensor, None, None]:
        standard_BH, inverse_H, count, invalid_B1 = ctx.saved_tensors
        # Every row moves the statistics of every rank's rows. Gradients here are W times the true ones, and so is their sum.
        sums_2H = torch.stack([grad_BH.sum(dim=0), (grad_BH * standard_BH).sum(dim=0)])
        mean_H, slope_H = _sum_over_ranks(sums_2H, ctx.group) / count
        grad_BH = (grad_BH - mean_H - standard_BH * slope_H) * inverse_H
        return grad_BH.masked_fill_(invalid_B1, 0), None, None


def _sum_over_ranks(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """In place."""
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor
