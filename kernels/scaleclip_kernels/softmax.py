"""Softmax contrastive loss, symmetric or in one direction: CLIP (arXiv 2103.00020), several text views (LaCLIP, arXiv
2305.20088; CLIPS, arXiv 2411.16828), several positives (SupCon's L_out, arXiv 2004.11362), extra negatives (InfoNCE+ of
Jina-CLIP, arXiv 2405.20204). The backend visits blocks of logits, the schedule brings them; derivation in kernels/README.md.

Shapes: N pairs (a rank's own slice where a group is given), V views, M columns, D feature dims.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.nn.functional import softplus

from scaleclip_kernels import reference
from scaleclip_kernels.arguments import Backend, Call, Duplicates, Options, prepare
from scaleclip_kernels.blocks import LN_2, LOG2_E, Fp32Precision, Side, add_scaled_rows, dot_rows
from scaleclip_kernels.distributed import Carried, ScheduleName, Visit


def softmax_contrastive_loss(
    x_ND: Tensor,
    y_MD: Tensor,
    logit_scale: Tensor,
    *,
    valid: Tensor | None = None,
    column_valid: Tensor | None = None,
    ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    duplicates: Duplicates = "negative",
    views: int = 1,
    weights: tuple[float, float] = (0.5, 0.5),
    compute_dtype: torch.dtype | None = None,
    fp32_precision: Fp32Precision = "ieee",
    group: ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
    schedule: ScheduleName = "auto",
    backend: Backend = "auto",
) -> Tensor:
    """Mean over the valid pairs of the global batch of weights[0] * row loss + weights[1] * column loss.

    The logits are logit_scale * x y^T and pair i is (x_i, y_i). The row loss of a pair is its cross-entropy among all y, the
    column loss its cross-entropy among all x. Differentiable once (the reference: twice) in x, y and logit_scale. A batch
    with no valid pair has loss 0 and zero gradients.

    Args:
        x_ND, y_MD: features in fp32 or the compute dtype, of unit length for cosine logits. Gradients leave in the inputs'
            dtype. y has N columns a view; more (with one view) are negatives of every x and have no loss of their own.
            fp64 works with backend="reference" and then gives fp64.
        logit_scale: () or (1,), the multiplier itself (already exponentiated), kept in fp32.
        valid: (N,) bool; an invalid x is no row, and its features may hold anything, NaN included. Without `column_valid`
            it speaks for the pair: its columns are invalid too.
        column_valid: (M,) bool, likewise for y. A pair counts where both its sides are valid; one valid side alone remains
            a negative for the others.
        ids: (N,) int64; equal ids show the same thing (the same caption, say).
        column_ids: (M,) int64 of the columns; None: those of their pairs.
        duplicates: what an x and a y that are no pair but have equal ids are. "negative": a negative, as in CLIP; "ignore":
            left out of the denominators; "positive": one more positive, averaged outside the log (L_out).
        views: text views of the same images: pair i of view v is column v * N + i. Every view has denominators of its own,
            and the loss is the mean of the views' losses.
        weights: of the two directions, each at least 0; (1, 0) is image-to-text InfoNCE.
        compute_dtype: what features are multiplied and sent in; products are summed and the scale is applied in fp32. None:
            the features' dtype.
        fp32_precision: of the Triton kernels' products of fp32 features: "ieee", or "tf32x3", three TF32 products with
            fp32's accuracy on NVIDIA's matrix units. A single TF32 product is never used.
        group: ranks that hold one slice of the global batch each and call this together with the same options. None: this
            process holds the whole batch. Every rank returns the same scalar, and the MEAN over ranks of the gradients of
            parameters and logit_scale is the true gradient.
        sizes: N on every rank, in rank order, where it is not the same (prefer padding with invalid pairs). All ranks have
            the same views and number of extra columns.
        schedule: "ring" passes columns from rank to rank and holds two foreign blocks at most; "gather" collects them a
            chunk at a time; "auto" is the ring up to 64 ranks. The loss is the same but for the order of summation.
        backend: "triton" runs kernels on a CUDA or ROCm device and "panels" matrix products anywhere; neither stores the N x M
            logits. "reference" does, in one process, and is the definition. "auto" is Triton on a GPU and panels on a CPU. One
            that cannot run is an error that says why.

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
    call = prepare(x_ND, y_MD, options, logit_scale=logit_scale, weights=weights)
    logit_scale = logit_scale.reshape(())
    if call.backend is reference:
        return reference.softmax_contrastive_loss(x_ND, y_MD, logit_scale, call.pairs, weights, call.compute_dtype)
    with call.shared_fate():
        loss: Tensor = _Softmax.apply(x_ND, y_MD, logit_scale.float(), call, weights)
    return loss


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, y_MD: Tensor, logit_scale: Tensor, call: Call, weights: tuple[float, float]) -> Tensor:
        rows, columns = call.rows(x_ND), call.columns(y_MD)
        row_sums, column_sums = _fold(call, rows, columns, logit_scale, weights)
        matched_VN = torch.stack([dot_rows(rows.features, columns.features[view]) for view in call.pairs.view_slices()])
        matched_VN = (matched_VN.double() * (logit_scale.double() * LOG2_E)).float()
        valid_VN = call.pairs.matched_valid(x_ND.device)

        loss_VN, directions = torch.zeros_like(matched_VN), []
        for sums, weight in zip((row_sums, column_sums), weights, strict=True):
            # extra columns, after the pairs, have no loss of their own
            direction = None if sums is None else _direction(sums[: matched_VN.numel()], matched_VN)
            if direction is not None:
                loss_VN += weight * direction.loss_VN
            directions.append(direction)
        loss_V, count_V = call.schedule.total(torch.stack([(loss_VN * valid_VN).sum(dim=1), valid_VN.sum(dim=1).float()]))
        count_V = count_V.clamp(min=1)

        # What all pairs have in common is multiplied in at the very end, what a direction or a view has in the panels.
        common = max(weights) / (len(count_V) * count_V.min())
        weights_2V = torch.stack([count_V.min() / count_V * (weight / max(weights)) for weight in weights])
        matched_grad_VN, terms = torch.zeros_like(matched_VN), []
        for direction, weight_V in zip(directions, weights_2V, strict=True):
            if direction is not None:
                matched_grad_VN += valid_VN * weight_V.unsqueeze(1) * direction.matched_grad_VN
            terms.append(None if direction is None else _terms(direction, valid_VN))
        row_terms, column_terms = terms
        if column_terms is not None and call.pairs.extras:
            no_loss = column_terms.new_zeros(call.pairs.extras, column_terms.shape[1])
            no_loss[:, 0] = torch.inf
            column_terms = torch.cat([column_terms, no_loss])

        ctx.call, ctx.row_labels, ctx.column_labels = call, rows[1:], columns[1:]
        ctx.dtypes, ctx.weights_2V = (x_ND.dtype, y_MD.dtype), weights_2V
        # known without a look at the device: there is one view, and no direction that weighs less than the other
        ctx.unweighted = len(count_V) == 1 and (0 in weights or weights[0] == weights[1])
        ctx.save_for_backward(rows.features, columns.features, logit_scale, row_terms, column_terms, matched_grad_VN, common)
        loss: Tensor = (loss_V / count_V).mean()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.call.shared_fate():
            return (*_gradients(ctx, grad), None, None)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x, y and the logit scale; None where not wanted."""
    x_ND, y_MD, logit_scale, row_terms, column_terms, matched_grad_VN, common = ctx.saved_tensors
    call: Call = ctx.call
    need_x, need_y, need_scale = ctx.needs_input_grad[:3]
    rows = Side(x_ND, *ctx.row_labels)
    # The scale's gradient is <dx, x> / scale, or <dy, y> / scale where only y's is wanted.
    grad_x = x_ND.new_zeros(x_ND.shape, dtype=torch.float32) if need_x or not need_y else None
    carried = Carried(lambda size: x_ND.new_zeros(size, x_ND.shape[1], dtype=torch.float32), None) if need_y else None

    def work(visit: Visit) -> None:
        *columns, terms = visit.fixed
        for piece in visit.pieces:
            call.backend.softmax_gradients(
                call.block(rows, columns, piece),
                logit_scale,
                None if row_terms is None else row_terms[piece.rows],
                None if terms is None else terms[piece.columns],
                None if ctx.unweighted else ctx.weights_2V[:, piece.view].unbind(),
                grad_x,
                visit.carried_by(piece) if need_y else None,
            )

    grad_y = call.schedule.tour((y_MD, *ctx.column_labels, column_terms), carried, work)
    for view, matched_grad_N in zip(call.pairs.view_slices(), matched_grad_VN, strict=True):
        if grad_x is not None:
            add_scaled_rows(grad_x, matched_grad_N, y_MD[view])
        if grad_y is not None:
            add_scaled_rows(grad_y[view], matched_grad_N, x_ND)

    factor = common * grad * call.num_ranks  # the trainer's mean over ranks divides by their number
    grad_scale = None
    if need_scale:
        # taken before the scale is multiplied in, so that a scale of 0 is no special case
        dots = dot_rows(grad_x, x_ND) if grad_x is not None else dot_rows(cast(Tensor, grad_y), y_MD)
        grad_scale = dots.sum() * factor
    return (
        cast(Tensor, grad_x).mul_(factor * logit_scale).to(ctx.dtypes[0]) if need_x else None,
        cast(Tensor, grad_y).mul_(factor * logit_scale).to(ctx.dtypes[1]) if need_y else None,
        grad_scale,
    )


def _fold(
    call: Call, rows: Side, columns: Side, logit_scale: Tensor, weights: tuple[float, float]
) -> tuple[Tensor | None, Tensor | None]:
    """The running sums (see `panels.fold_softmax`) of all of this rank's rows [V N, K] and columns [M, K]; None: no weight."""

    def empty(size: int) -> Tensor:
        num_sums = 4 if call.pairs.duplicates == "positive" else 2
        sums = torch.zeros(size, num_sums, dtype=torch.float32, device=rows.features.device)
        # the lowest finite number: -inf less -inf would be NaN where a row meets a panel in which nothing counts
        sums[:, 0] = torch.finfo(torch.float32).min
        return sums

    row_sums = empty(call.pairs.views * call.pairs.num_rows) if weights[0] else None
    carried = Carried(empty, _combine_sums) if weights[1] else None

    def work(visit: Visit) -> None:
        for piece in visit.pieces:
            call.backend.fold_softmax(
                call.block(rows, visit.fixed, piece),
                logit_scale,
                None if row_sums is None else row_sums[piece.rows],
                visit.carried_by(piece) if carried is not None else None,
            )

    return row_sums, call.schedule.tour(columns, carried, work)


def _combine_sums(parts_WmK: Tensor) -> Tensor:
    """Running sums over different rows, to those over all of them."""
    largest_m = parts_WmK[..., 0].amax(dim=0)
    sum_m = (parts_WmK[..., 1] * (parts_WmK[..., 0] - largest_m).exp2()).sum(dim=0)
    return torch.cat([torch.stack([largest_m, sum_m], dim=1), parts_WmK[..., 2:].sum(dim=0)], dim=1)


class _Direction(NamedTuple):
    """What the complete sums of one direction say about every pair."""

    loss_VN: Tensor
    matched_grad_VN: Tensor
    log_sum_exp_VN: Tensor
    """Base 2, the matched logit included."""
    num_positives_VN: Tensor | None


def _direction(sums_PK: Tensor, matched_VN: Tensor) -> _Direction:
    sums_VNK = sums_PK.view(*matched_VN.shape, sums_PK.shape[1])
    largest_VN, sum_VN = sums_VNK[..., 0], sums_VNK[..., 1]
    # Log-odds of everything else against the matched pair. softplus keeps a loss of 1e-9 to full precision, where
    # log-sum-exp minus the matched logit would leave rounding noise.
    odds_VN = (sum_VN.log2() + (largest_VN - matched_VN)) * LN_2
    # Not matched logit + loss: each rounding of a log-sum-exp is a relative error of a whole row of gradients.
    top_VN = torch.maximum(largest_VN, matched_VN)
    log_sum_exp_VN = top_VN + (sum_VN * (largest_VN - top_VN).exp2() + (matched_VN - top_VN).exp2()).log2()
    loss_VN, matched_grad_VN = softplus(odds_VN), -odds_VN.sigmoid()
    if sums_VNK.shape[-1] == 2:
        return _Direction(loss_VN, matched_grad_VN, log_sum_exp_VN, None)
    positive_sum_VN, num_others_VN = sums_VNK[..., 2], sums_VNK[..., 3]
    num_positives_VN = 1 + num_others_VN
    # Matched logit minus the mean over positives: exactly 0 for a pair that is its own only positive.
    loss_VN = loss_VN + LN_2 * (matched_VN * num_others_VN - positive_sum_VN) / num_positives_VN
    # p - 1/P; for an only positive -(1 - p), which loses no digit where p is near 1
    several_VN = (-odds_VN).sigmoid() - 1 / num_positives_VN
    matched_grad_VN = torch.where(num_others_VN == 0, matched_grad_VN, several_VN)
    return _Direction(loss_VN, matched_grad_VN, log_sum_exp_VN, num_positives_VN)


def _terms(direction: _Direction, valid_VN: Tensor) -> Tensor:
    """[V N, K]: what `panels.softmax_gradients` needs of each row or column."""
    terms = [direction.log_sum_exp_VN.masked_fill(~valid_VN, torch.inf)]
    if direction.num_positives_VN is not None:
        terms.append(valid_VN / direction.num_positives_VN)
    return torch.stack(terms, dim=-1).flatten(0, 1)
