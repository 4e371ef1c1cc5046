"""Pairwise sigmoid loss of SigLIP (arXiv 2303.15343): gradients come with the loss, in one pass over the blocks of logits.

Shapes: N pairs (a rank's own slice where a group is given), V views, M columns, D feature dims.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.nn.functional import softplus

from scaleclip_kernels import reference
from scaleclip_kernels.arguments import Backend, Call, Duplicates, Options, prepare
from scaleclip_kernels.blocks import Fp32Precision, add_scaled_rows, dot_rows
from scaleclip_kernels.distributed import Carried, ScheduleName, Visit


def sigmoid_contrastive_loss(
    x_ND: Tensor,
    y_MD: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    column_valid: Tensor | None = None,
    ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    duplicates: Duplicates = "negative",
    views: int = 1,
    compute_dtype: torch.dtype | None = None,
    fp32_precision: Fp32Precision = "ieee",
    group: ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
    schedule: ScheduleName = "auto",
    backend: Backend = "auto",
) -> Tensor:
    """Sum over all valid (row, column) of -log sigmoid(label * logit), divided by the valid pairs of the global batch.

    The logits are logit_scale * x y^T + logit_bias; the label of a matched pair is 1, of any other -1. Differentiable once
    (the reference: twice) in x, y, logit_scale and logit_bias. A batch with no valid pair has whatever loss its valid rows
    and columns have as negatives, divided by 1.

    Args:
        logit_bias: () or (1,), kept in fp32; None: 0.
        duplicates: what an x and a y that are no pair but have equal ids are: label -1 ("negative"), left out ("ignore"),
            or label 1 ("positive").
        Everything else: as in `softmax_contrastive_loss`. Several views are summed over their own columns each, and the
            loss is the mean of the views' losses.

    Returns:
        0-dim fp32 tensor.

    Raises:
        ValueError: an argument breaks a rule above, or the backend cannot run.
        RankError: another rank of the group failed; the message is that of the first.
    """
    options = Options(
        valid=valid,
        column_valid=column_valid,
        ids=ids,
        column_ids=column_ids,
        duplicates=duplicates,
        views=views,
        compute_dtype=compute_dtype,
        fp32_precision=fp32_precision,
        group=group,
        sizes=sizes,
        schedule=schedule,
        backend=backend,
    )
    if logit_bias is None:
        logit_bias = torch.zeros((), dtype=torch.float32, device=x_ND.device)
    call = prepare(x_ND, y_MD, options, logit_scale=logit_scale, logit_bias=logit_bias)
    logit_scale, logit_bias = logit_scale.reshape(()), logit_bias.reshape(())
    if call.backend is reference:
        return reference.sigmoid_contrastive_loss(x_ND, y_MD, logit_scale, logit_bias, call.pairs, call.compute_dtype)
    with_gradients = torch.is_grad_enabled()
    with call.shared_fate():
        loss: Tensor = _Sigmoid.apply(x_ND, y_MD, logit_scale.float(), logit_bias.float(), call, with_gradients)
    return loss


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, y_MD: Tensor, logit_scale: Tensor, logit_bias: Tensor, call: Call, with_gradients: bool
    ) -> Tensor:
        need_x, need_y, need_scale, need_bias = (with_gradients and need for need in ctx.needs_input_grad[:4])
        rows, columns = call.rows(x_ND), call.columns(y_MD)
        num_views, dim = call.pairs.views, x_ND.shape[1]
        valid_VN = call.pairs.matched_valid(x_ND.device)
        count_V = call.schedule.total(valid_VN.sum(dim=1)).clamp(min=1).float()
        # Each view is divided by its own pairs; what the views have in common is multiplied in at the very end.
        share_V = count_V.min() / count_V

        # The scale's gradient is <dx, x> / scale, or <dy, y> / scale where only y's is wanted.
        fill_x = need_x or (not need_y and (need_scale or need_bias))
        grad_x = x_ND.new_zeros(x_ND.shape, dtype=torch.float32) if fill_x else None
        carried = Carried(lambda size: x_ND.new_zeros(size, dim, dtype=torch.float32), None) if need_y else None
        totals_V2 = x_ND.new_zeros(num_views, 2, dtype=torch.float64)

        def work(visit: Visit) -> None:
            for piece in visit.pieces:
                call.backend.sigmoid_block(
                    call.block(rows, visit.fixed, piece),
                    logit_scale,
                    logit_bias,
                    None if num_views == 1 else share_V[piece.view],
                    totals_V2[piece.view],
                    grad_x,
                    visit.carried_by(piece) if need_y else None,
                )

        grad_y = call.schedule.tour(columns, carried, work)
        views = call.pairs.view_slices()
        matched_VN = torch.stack([dot_rows(rows.features, columns.features[view]) for view in views])
        matched_VN = matched_VN * logit_scale + logit_bias
        totals_V2[:, 0] += share_V * (softplus(-matched_VN) * valid_VN).sum(dim=1)
        loss: Tensor = call.schedule.total(totals_V2[:, 0].sum()) / (num_views * count_V.min())

        # the trainer's mean over ranks divides by their number
        factor = call.num_ranks / (num_views * count_V.min())
        matched_grad_VN = -torch.sigmoid(-matched_VN) * valid_VN * share_V.unsqueeze(1)
        for view, matched_grad_N in zip(views, matched_grad_VN, strict=True):
            if grad_x is not None:
                add_scaled_rows(grad_x, matched_grad_N, columns.features[view])
            if grad_y is not None:
                add_scaled_rows(grad_y[view], matched_grad_N, rows.features)
        grad_scale = grad_bias = None
        if need_scale:
            # taken before the scale is multiplied in, so that a scale of 0 is no special case
            side, grad_side = (rows, grad_x) if grad_x is not None else (columns, grad_y)
            grad_scale = dot_rows(cast(Tensor, grad_side), side.features).sum() * factor
        if need_bias:
            grad_bias = ((totals_V2[:, 1].sum() + matched_grad_VN.sum()) * factor).float()
        ctx.dtypes = x_ND.dtype, y_MD.dtype
        ctx.save_for_backward(
            cast(Tensor, grad_x).mul_(factor * logit_scale) if need_x else None,
            cast(Tensor, grad_y).mul_(factor * logit_scale) if need_y else None,
            grad_scale,
            grad_bias,
        )
        return loss.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dtypes = (*ctx.dtypes, torch.float32, torch.float32)
        gradients = (
            None if saved is None else (saved * grad).to(dtype) for saved, dtype in zip(ctx.saved_tensors, dtypes, strict=True)
        )
        return (*gradients, None, None)
