"""Symmetric softmax contrastive loss over bounded panels of logits: for CPU, and for any device without Triton.

The forward pass computes each panel of logits once and folds it into row and column sums; the backward pass computes
it again and folds it into both gradients: 4 N^2 D multiply-adds, O(N D + panel) memory. Derivation: kernels/README.md.

Shapes: N pairs, D feature dims, R x C one panel of the N x N logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus


def softmax_contrastive_loss(
    x_ND: Tensor,
    y_ND: Tensor,
    logit_scale: Tensor,
    *,
    valid_N: Tensor | None = None,
    ids_N: Tensor | None = None,
    duplicates: str = "negative",
    panel_rows: int = 1024,
    panel_columns: int = 1024,
) -> Tensor:
    """The loss that `reference.softmax_contrastive_loss` defines, in fp32; gradients leave in each input's dtype.

    `panel_rows` x `panel_columns` fp32 logits are live at a time (a few such buffers); 4 MiB each by default.
    """
    x_ND, y_ND = x_ND.float(), y_ND.float()
    invalid_N = None
    if valid_N is not None:
        invalid_N = ~valid_N
        # masked_fill, not a product: an invalid row may hold NaN, and 0 * NaN would reach every gradient.
        x_ND = x_ND.masked_fill(invalid_N.unsqueeze(1), 0)
        y_ND = y_ND.masked_fill(invalid_N.unsqueeze(1), 0)
    duplicate_ids_N = None if duplicates == "negative" else ids_N
    grid = _Grid(len(x_ND), invalid_N, duplicate_ids_N, duplicates == "positive", panel_rows, panel_columns)
    loss: Tensor = _PanelSoftmax.apply(x_ND, y_ND, logit_scale.float(), grid)
    return loss


@dataclass(frozen=True)
class _Grid:
    """The N x N pairs: how they are cut into panels, and what each pair is."""

    num_pairs: int
    invalid_N: Tensor | None
    ids_N: Tensor | None  # None: an off-diagonal pair is a negative, whatever the ids
    duplicates_are_positive: bool  # with ids: False leaves the duplicates out
    panel_rows: int
    panel_columns: int

    def panels(self) -> Iterator[tuple[slice, slice]]:
        """(rows, columns) of each panel, in the fixed order that keeps sums reproducible."""
        for row in range(0, self.num_pairs, self.panel_rows):
            for column in range(0, self.num_pairs, self.panel_columns):
                yield (
                    slice(row, min(row + self.panel_rows, self.num_pairs)),
                    slice(column, min(column + self.panel_columns, self.num_pairs)),
                )

    def duplicates(self, rows: slice, columns: slice) -> Tensor | None:
        """bool [R, C]: off-diagonal valid pairs with equal ids; None where ids play no part."""
        if self.ids_N is None:
            return None
        duplicate_RC = self.ids_N[rows].unsqueeze(1) == self.ids_N[columns]
        return self._strike(duplicate_RC, rows, columns, False)

    def logits(self, scaled_x_ND: Tensor, y_ND: Tensor, rows: slice, columns: slice, duplicate_RC: Tensor | None) -> Tensor:
        """fp32 [R, C]: logits of the denominators' off-diagonal pairs, -inf elsewhere."""
        logits_RC = self._strike(scaled_x_ND[rows] @ y_ND[columns].T, rows, columns, -torch.inf)
        if duplicate_RC is not None and not self.duplicates_are_positive:
            logits_RC.masked_fill_(duplicate_RC, -torch.inf)
        return logits_RC

    def _strike(self, panel_RC: Tensor, rows: slice, columns: slice, value: float) -> Tensor:
        """Overwrite the matched pairs and everything invalid, in place."""
        panel_RC.diagonal(rows.start - columns.start).fill_(value)
        if self.invalid_N is not None:
            panel_RC.masked_fill_(self.invalid_N[rows].unsqueeze(1), value)
            panel_RC.masked_fill_(self.invalid_N[columns], value)
        return panel_RC


class _PanelSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, y_ND: Tensor, logit_scale: Tensor, grid: _Grid) -> Tensor:
        scaled_x_ND = x_ND * logit_scale
        matched_N = (scaled_x_ND * y_ND).sum(dim=1)
        # Sums start at the matched logit, which is finite, so a fully masked panel needs no special case.
        row_max_N, column_max_N = matched_N.clone(), matched_N.clone()
        row_sum_N, column_sum_N = torch.zeros_like(matched_N), torch.zeros_like(matched_N)
        num_positives_N = torch.ones_like(matched_N)
        row_extra_N, column_extra_N = torch.zeros_like(matched_N), torch.zeros_like(matched_N)
        with torch.autocast(x_ND.device.type, enabled=False):
            for rows, columns in grid.panels():
                duplicate_RC = grid.duplicates(rows, columns)
                logits_RC = grid.logits(scaled_x_ND, y_ND, rows, columns, duplicate_RC)
                if duplicate_RC is not None and grid.duplicates_are_positive:
                    num_positives_N[rows] += duplicate_RC.sum(dim=1)
                    extra_RC = logits_RC.masked_fill(~duplicate_RC, 0)
                    row_extra_N[rows] += extra_RC.sum(dim=1)
                    column_extra_N[columns] += extra_RC.sum(dim=0)
                _fold(logits_RC, 1, row_max_N[rows], row_sum_N[rows])
                _fold(logits_RC, 0, column_max_N[columns], column_sum_N[columns])

        # Log-odds of everything else against the matched pair. softplus keeps a loss of 1e-9 to full precision, where
        # log-sum-exp minus the matched logit would leave rounding noise.
        row_odds_N = row_sum_N.log() + (row_max_N - matched_N)
        column_odds_N = column_sum_N.log() + (column_max_N - matched_N)
        row_loss_N, column_loss_N = softplus(row_odds_N), softplus(column_odds_N)
        # Not matched logit + loss: each rounding of a log-sum-exp is a relative error of a whole row of gradients.
        row_lse_N = row_max_N + (row_sum_N + (matched_N - row_max_N).exp()).log()
        column_lse_N = column_max_N + (column_sum_N + (matched_N - column_max_N).exp()).log()
        matched_grad_N = 2 * (1 - 1 / num_positives_N) - row_odds_N.sigmoid() - column_odds_N.sigmoid()
        # Matched logit minus the mean over positives: exactly 0 for a pair that is its own only positive.
        shift_N = matched_N * (num_positives_N - 1)
        row_loss_N = row_loss_N + (shift_N - row_extra_N) / num_positives_N
        column_loss_N = column_loss_N + (shift_N - column_extra_N) / num_positives_N

        loss_N = 0.5 * (row_loss_N + column_loss_N)
        if grid.invalid_N is None:
            weight = loss_N.new_full((), 1 / max(grid.num_pairs, 1))
        else:
            # Invalid pairs add nothing: without negatives their odds are -inf, so loss and gradient are 0.
            weight = 1 / (~grid.invalid_N).sum().clamp(min=1)
        ctx.grid = grid
        ctx.save_for_backward(
            x_ND, y_ND, logit_scale, row_lse_N, column_lse_N, matched_grad_N, 1 / num_positives_N, 0.5 * weight
        )
        return loss_N.sum() * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x_ND, y_ND, logit_scale, row_lse_N, column_lse_N, matched_grad_N, positive_share_N, weight = ctx.saved_tensors
        grid: _Grid = ctx.grid
        need_x, need_y, need_scale = ctx.needs_input_grad[:3]
        scaled_x_ND = x_ND * logit_scale
        # The matched pairs' terms stay outside the panels; the panels add G y to the one and G^T x to the other.
        grad_x_ND = matched_grad_N.unsqueeze(1) * y_ND if need_x or need_scale else None
        grad_y_ND = matched_grad_N.unsqueeze(1) * scaled_x_ND if need_y else None
        with torch.autocast(x_ND.device.type, enabled=False):
            for rows, columns in grid.panels():
                duplicate_RC = grid.duplicates(rows, columns)
                logits_RC = grid.logits(scaled_x_ND, y_ND, rows, columns, duplicate_RC)
                # No logit exceeds its own row's or column's log-sum-exp, so neither exponential can overflow.
                grad_RC = (logits_RC - row_lse_N[rows].unsqueeze(1)).exp_()
                grad_RC += logits_RC.sub_(column_lse_N[columns]).exp_()
                if duplicate_RC is not None and grid.duplicates_are_positive:
                    grad_RC -= duplicate_RC * (2 * positive_share_N[rows]).unsqueeze(1)
                if grad_x_ND is not None:
                    grad_x_ND[rows].addmm_(grad_RC, y_ND[columns])
                if grad_y_ND is not None:
                    grad_y_ND[columns].addmm_(grad_RC.T, scaled_x_ND[rows])

        weight = weight * grad
        grad_scale = None
        if grad_x_ND is not None:
            # <dL/dx, x> / scale, taken before the scale is multiplied in, so that a scale of 0 is no special case.
            grad_scale = (grad_x_ND * x_ND).sum() * weight if need_scale else None
            grad_x_ND = grad_x_ND.mul_(weight * logit_scale) if need_x else None
        if grad_y_ND is not None:
            grad_y_ND.mul_(weight)
        return grad_x_ND, grad_y_ND, grad_scale, None


def _fold(logits_RC: Tensor, dim: int, running_max: Tensor, running_sum: Tensor) -> None:
    """Add a panel's exponentials along `dim` to sums relative to running maxima (online softmax, arXiv 1805.02867).

    Rows and columns each have their own maximum: one maximum for the panel would underflow a row far below the rest.
    """
    new_max = torch.maximum(running_max, logits_RC.amax(dim))
    running_sum.mul_((running_max - new_max).exp_())
    running_sum.add_((logits_RC - new_max.unsqueeze(dim)).exp_().sum(dim))
    running_max.copy_(new_max)
