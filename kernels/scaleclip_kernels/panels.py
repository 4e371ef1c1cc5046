"""The losses over bounded panels of logits with torch.mm: the backend for CPUs, and for any device without Triton.

A block is visited in panels of 1024 x 1024 logits, always in the same order. Inputs in bf16 or fp16 are widened a panel at
a time; products, exponentials and sums are fp32. Derivation: kernels/README.md.

Shapes: a block of n rows and m columns, D feature dims, R x C logits a panel.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from scaleclip_kernels.blocks import LOG2_E, Block, Side
from scaleclip_kernels.gemm import add_product, fp32_products

PANEL_ROWS = PANEL_COLUMNS = 1024
# 64 factors of at most 2 stay far below fp32's overflow at 2^128.
_PRODUCT_LEVELS = 6


def fold_softmax(block: Block, logit_scale: Tensor, row_sums: Tensor | None, column_sums: Callable[[], Tensor] | None) -> None:
    """Add a block's unmatched logits to the running sums of its rows and of its columns, in place.

    `row_sums` [n, K] and `column_sums()` [m, K], None where a direction is not wanted, hold in base 2 the largest logit,
    the sum of exp2(logit - largest) and, with positives (K = 4), the sum and the number of the unmatched positives' logits.
    `column_sums` is called when its first panel is ready to be added: its tensor may still be on its way.
    """
    with fp32_products(block.x.features.device, block.x.features.shape[1]):
        for panel in _panels(block, logit_scale.double() * LOG2_E):
            logits_RC = panel.logits()
            duplicate_RC = panel.strike(logits_RC)
            extra_RC = None if duplicate_RC is None else torch.where(duplicate_RC, logits_RC, 0.0)
            rows_RK = None if row_sums is None else row_sums[panel.rows]
            columns_CK = None if column_sums is None else column_sums()[panel.columns]
            for dim, side in ((1, rows_RK), (0, columns_CK)):
                if side is None:
                    continue
                if duplicate_RC is not None and extra_RC is not None:
                    side[:, 2] += extra_RC.sum(dim)
                    side[:, 3] += duplicate_RC.sum(dim)
                # Rows and columns have maxima of their own: one maximum for the panel would underflow whatever lies
                # far below it, and divide by zero in the backward pass.
                largest = torch.maximum(side[:, 0], logits_RC.amax(dim))
                side[:, 1] *= (side[:, 0] - largest).exp2_()
                side[:, 1] += torch.sub(logits_RC, largest.unsqueeze(dim), out=panel.scratch).exp2_().sum(dim)
                side[:, 0] = largest


def softmax_gradients(
    block: Block,
    logit_scale: Tensor,
    row_terms: Tensor | None,
    column_terms: Tensor | None,
    weights: tuple[Tensor, Tensor] | None,
    grad_x: Tensor | None,
    grad_y: Callable[[], Tensor] | None,
) -> None:
    """Add G y to `grad_x` [n, D] and G^T x to `grad_y()` [m, D], where G is the loss gradient of a block's unmatched logits.

    G_ij = weights[0] (exp2(s_ij - row_terms[i, 0]) - row_terms[i, 1]) + weights[1] (exp2(s_ij - column_terms[j, 0]) -
    column_terms[j, 1]) for base-2 logits s, the second terms only where (i, j) is one more positive. An offset of +inf marks a
    row or column that has no loss of its own; no weights: both 1. `grad_y` is called when its first panel is ready to be
    added: its buffer may still be on its way.
    """
    with fp32_products(block.x.features.device, block.x.features.shape[1]):
        for panel in _panels(block, logit_scale.double() * LOG2_E):
            logits_RC = panel.logits()
            duplicate_RC = panel.strike(logits_RC)
            grad_RC: Tensor | None = None
            for dim, terms in ((1, row_terms), (0, column_terms)):
                if terms is None:
                    continue
                side = terms[panel.rows if dim == 1 else panel.columns]
                # No logit exceeds its own row's or column's log-sum-exp, so neither exponential can overflow.
                part_RC = logits_RC if grad_RC is not None else panel.scratch
                torch.sub(logits_RC, side[:, 0].unsqueeze(dim), out=part_RC).exp2_()
                if duplicate_RC is not None:
                    part_RC -= duplicate_RC * side[:, 1].unsqueeze(dim)
                if weights is not None:
                    part_RC *= weights[0 if dim == 1 else 1]
                grad_RC = part_RC if grad_RC is None else grad_RC.add_(part_RC)
            assert grad_RC is not None, "one direction at least has a loss"
            panel.add_products(grad_RC, grad_x, grad_y)


def sigmoid_block(
    block: Block,
    logit_scale: Tensor,
    logit_bias: Tensor,
    share: Tensor | None,
    totals: Tensor,
    grad_x: Tensor | None,
    grad_y: Callable[[], Tensor] | None,
) -> None:
    """Add share * (sum of -log sigmoid(label * logit)) of a block's unmatched pairs to totals[0], and sum(G) to totals[1].

    `totals` is fp64 [2], changed in place. G is the gradient of what is added to totals[0]; `grad_x` and `grad_y` are as in
    `softmax_gradients`, and without them G is not computed. `share` is a scalar, None for 1.
    """
    with fp32_products(block.x.features.device, block.x.features.shape[1]):
        for panel in _panels(block, logit_scale.double()):
            logits_RC = panel.logits().add_(logit_bias)
            duplicate_RC = panel.strike(logits_RC)
            # softplus(s) for a negative; a positive is one with s turned round
            sign_RC = None if duplicate_RC is None else 1 - 2 * duplicate_RC.float()
            if sign_RC is not None:
                logits_RC *= sign_RC
            if grad_x is not None or grad_y is not None:
                grad_RC = torch.sigmoid(logits_RC, out=panel.scratch)
                if sign_RC is not None:
                    grad_RC *= sign_RC
                if share is not None:
                    grad_RC *= share
                totals[1] += grad_RC.sum()
                panel.add_products(grad_RC, grad_x, grad_y)
            loss = _softplus_sum(logits_RC)
            totals[0] += loss if share is None else loss * share


def _softplus_sum(logits_RC: Tensor) -> Tensor:
    """Sum of log(1 + exp(s)) in fp64; overwrites its contiguous argument.

    max(s, 0) + log1p(e) with e = exp(-|s|) <= 1. log1p costs as much as the matrix product behind it, so 64 terms share
    one: log1p(a) + log1p(b) = log1p(a + b + a b), which loses no small term.
    """
    total = logits_RC.clamp_min(0).sum(dtype=torch.float64)
    terms = logits_RC.abs_().mul_(-LOG2_E).exp2_().view(-1)
    for _ in range(_PRODUCT_LEVELS):
        half = len(terms) // 2
        a, b, odd = terms[:half], terms[half : 2 * half], terms[2 * half :]
        total += odd.log1p().sum()
        terms = a.addcmul_(a, b).add_(b)
    return total + terms.log1p().sum(dtype=torch.float64)


class _Panel:
    """R x C logits of a block, and the features they come from."""

    def __init__(
        self, block: Block, rows: slice, columns: slice, x_RD: Tensor, scaled_x_RD: Tensor, y_CD: Tensor, buffers: Tensor
    ) -> None:
        self.block, self.rows, self.columns = block, rows, columns
        self.x_RD, self.scaled_x_RD, self.y_CD = x_RD, scaled_x_RD, y_CD
        shape = len(x_RD), len(y_CD)
        size = shape[0] * shape[1]
        self._logits_RC: Tensor = buffers[0, :size].view(shape)
        self.scratch: Tensor = buffers[1, :size].view(shape)

    def logits(self) -> Tensor:
        """fp32 [R, C]: scale x y^T, in this panel's buffer."""
        add_product(self._logits_RC.zero_(), self.scaled_x_RD, self.y_CD.T)
        return self._logits_RC

    def strike(self, logits_RC: Tensor) -> Tensor | None:
        """Put -inf where a pair is matched, invalid or to be left out; bool [R, C] of the further positives, if any can be."""
        self._fill(logits_RC, -torch.inf)
        x, y = self.block.x, self.block.y
        if x.ids is None or y.ids is None:
            return None
        duplicate_RC = x.ids[self.rows].unsqueeze(1) == y.ids[self.columns]
        self._fill(duplicate_RC, False)
        if self.block.duplicates_are_positive:
            return duplicate_RC
        logits_RC.masked_fill_(duplicate_RC, -torch.inf)
        return None

    def add_products(self, grad_RC: Tensor, grad_x: Tensor | None, grad_y: Callable[[], Tensor] | None) -> None:
        if grad_x is not None:
            add_product(grad_x[self.rows], grad_RC, self.y_CD)
        if grad_y is not None:
            add_product(grad_y()[self.columns], grad_RC.T, self.x_RD)

    def _fill(self, panel_RC: Tensor, value: float) -> None:
        """Overwrite matched and invalid pairs."""
        rows, columns, matched = self.rows, self.columns, self.block.matched
        first = max(rows.start - matched.row, columns.start - matched.column, 0)
        last = min(rows.stop - matched.row, columns.stop - matched.column, matched.length)
        if first < last:
            row, column = first + matched.row - rows.start, first + matched.column - columns.start
            panel_RC[row : row + last - first, column : column + last - first].diagonal().fill_(value)
        if self.block.x.invalid is not None:
            panel_RC.masked_fill_(self.block.x.invalid[rows].unsqueeze(1), value)
        if self.block.y.invalid is not None:
            panel_RC.masked_fill_(self.block.y.invalid[columns], value)


def _panels(block: Block, scale: Tensor) -> Iterator[_Panel]:
    """Row panels from the first, and in each its column panels from the first: the order that keeps sums reproducible.

    `scale` is fp64 (): rounded to fp32 it would be off by the same amount in every logit, which no sum averages out.
    """
    scale_high = scale.float()
    scale_low = (scale - scale_high).float()
    num_rows, num_columns = len(block.x.features), len(block.y.features)
    if block.x.features.device.type == "cpu":
        # Most blocks have no invalid pair. Looking costs nothing here; on other devices it would wait for the device.
        block = block._replace(x=without_idle_mask(block.x), y=without_idle_mask(block.y))
    size = min(PANEL_ROWS, num_rows) * min(PANEL_COLUMNS, num_columns)
    buffers = torch.empty(2, size, dtype=torch.float32, device=block.x.features.device)
    for row in range(0, num_rows, PANEL_ROWS):
        rows = slice(row, min(row + PANEL_ROWS, num_rows))
        x_RD = block.x.features[rows].float()
        scaled_x_RD = torch.addcmul(x_RD * scale_low, x_RD, scale_high)
        for column in range(0, num_columns, PANEL_COLUMNS):
            columns = slice(column, min(column + PANEL_COLUMNS, num_columns))
            yield _Panel(block, rows, columns, x_RD, scaled_x_RD, block.y.features[columns].float(), buffers)


def without_idle_mask(side: Side) -> Side:
    """The side without its mask if nothing is masked. Reads the mask."""
    return side if side.invalid is None or bool(side.invalid.any()) else side._replace(invalid=None)
