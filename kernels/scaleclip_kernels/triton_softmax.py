"""Softmax on GPUs: sums of exponentials and gradients of a block of logits, a tile a program, by one matrix product each.

What the functions do is written in `panels.py`, whose place they take; derivation and counts in kernels/README.md. No atomics:
every sum has a fixed order.

Shapes: a block of n rows and m columns, D feature dims; a tile of R x C logits; K sums or terms.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scaleclip_kernels.blocks import LOG2_E, Block
from scaleclip_kernels.triton_launch import (
    DO_NOT_SPECIALIZE,
    GRADIENT_SCALE,
    add_gradients,
    arguments,
    block_launch,
    empty_gradients,
    flat,
    gradient_panels,
    gradients_argument,
    num_tiles,
    scale_parts,
    super_panels,
    unflat,
)
from scaleclip_kernels.triton_tiles import LOWEST, count, place, present, products, same, scaled, store_panel

# A tile has one exponential an element where the sum of each row and column stays above this, 2^-64: what is lost to
# underflow, below 2^-126 each, is then less than 2^-54 of it. Elsewhere rows and columns get maxima of their own.
LEAST_SUM = tl.constexpr(2.0**-64)
# Likewise for gradients: log-sum-exps of a tile this close (base 2) share an exponential, and no factor leaves fp32's range.
MOST_SPREAD = tl.constexpr(100.0)

FOLD_BLOCK, FOLD_TILES = 128, 16
"""Rows or columns that a program folds, and tiles at a time."""


@triton.jit
def _logits(
    x,
    y,
    scale,
    row_present,
    column_present,
    row_ids,
    column_ids,
    first_row,
    first_column,
    num_rows,
    num_columns,
    dim,
    x_stride,
    y_stride,
    matched_row,
    matched_end,
    matched_offset,
    POSITIVE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    EVEN_DIM: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT_SCALE: tl.constexpr,
):
    """[R, C], -inf where a pair is no candidate beside the matched one."""
    logits_RC = products(
        x, y, first_row, first_column, num_rows, num_columns, dim, x_stride, y_stride,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DIM, EVEN_DIM, TMA, PRECISION,
    )  # fmt: skip
    logits_RC = count(
        scaled(logits_RC, scale, EXACT_SCALE), row_present, column_present, first_row, first_column,
        matched_row, matched_end, matched_offset, BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip
    if row_ids is not None and not POSITIVE:
        is_same_RC = same(row_ids, column_ids, first_row, first_column, num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
        logits_RC = tl.where(is_same_RC, -float("inf"), logits_RC)
    return logits_RC


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def softmax_sums_kernel(
    x,
    y,
    scale,
    row_invalid,
    column_invalid,
    row_ids,
    column_ids,
    row_partials,
    column_partials,
    num_rows,
    num_columns,
    dim,
    x_stride,
    y_stride,
    matched_row,
    matched_end,
    matched_offset,
    POSITIVE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_DIM: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT_SCALE: tl.constexpr,
):
    """A tile's part of the sums of its rows, [K, column tiles, n], and of its columns, [K, row tiles, m].

    K: a reference no smaller than the largest logit; the sum of exp2(logit - reference); with positives their logits' sum and
    their number.
    """
    row_tile, column_tile = place(num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
    first_row, first_column = row_tile * BLOCK_ROWS, column_tile * BLOCK_COLUMNS
    row_present = present(first_row, num_rows, row_invalid, BLOCK_ROWS)
    column_present = present(first_column, num_columns, column_invalid, BLOCK_COLUMNS)
    logits_RC = _logits(
        x, y, scale, row_present, column_present, row_ids, column_ids, first_row, first_column, num_rows, num_columns,
        dim, x_stride, y_stride, matched_row, matched_end, matched_offset, POSITIVE,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DIM, EVEN_DIM, TMA, PRECISION, EXACT_SCALE,
    )  # fmt: skip
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    columns = first_column + tl.arange(0, BLOCK_COLUMNS)
    row_tiles, column_tiles = tl.cdiv(num_rows, BLOCK_ROWS), tl.cdiv(num_columns, BLOCK_COLUMNS)
    if POSITIVE:
        is_same_RC = same(row_ids, column_ids, first_row, first_column, num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
        is_same_RC &= logits_RC > -float("inf")
        positive_RC = tl.where(is_same_RC, logits_RC, 0.0)
        if row_partials is not None:
            _store(row_partials, 2, rows, num_rows, column_tile, column_tiles, tl.sum(positive_RC, 1))
            _store(row_partials, 3, rows, num_rows, column_tile, column_tiles, tl.sum(is_same_RC.to(tl.float32), 1))
        if column_partials is not None:
            _store(column_partials, 2, columns, num_columns, row_tile, row_tiles, tl.sum(positive_RC, 0))
            _store(column_partials, 3, columns, num_columns, row_tile, row_tiles, tl.sum(is_same_RC.to(tl.float32), 0))

    if row_partials is None:
        column_largest = tl.maximum(tl.max(logits_RC, 0), LOWEST)
        column_sum = tl.sum(tl.exp2(logits_RC - column_largest[None, :]), 0)
    elif column_partials is None:
        row_largest = tl.maximum(tl.max(logits_RC, 1), LOWEST)
        row_sum = tl.sum(tl.exp2(logits_RC - row_largest[:, None]), 1)
    else:
        largest = tl.max(tl.reshape(logits_RC, (BLOCK_ROWS * BLOCK_COLUMNS,), can_reorder=True), 0)
        largest = tl.maximum(largest, LOWEST)
        shared_RC = tl.exp2(logits_RC - largest)
        row_sum, column_sum = tl.sum(shared_RC, 1), tl.sum(shared_RC, 0)
        row_largest = tl.zeros((BLOCK_ROWS,), tl.float32) + largest
        column_largest = tl.zeros((BLOCK_COLUMNS,), tl.float32) + largest
        least = tl.minimum(tl.min(tl.where(row_present, row_sum, 1.0), 0), tl.min(tl.where(column_present, column_sum, 1.0), 0))
        # not where nothing counts at all
        if (least < LEAST_SUM) & (largest > LOWEST):
            # Computed again rather than kept: kept, the logits would not fit the registers.
            logits_RC = _logits(
                x, y, scale, row_present, column_present, row_ids, column_ids, first_row, first_column, num_rows, num_columns,
                dim, x_stride, y_stride, matched_row, matched_end, matched_offset, POSITIVE,
                BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DIM, EVEN_DIM, TMA, PRECISION, EXACT_SCALE,
            )  # fmt: skip
            row_largest = tl.maximum(tl.max(logits_RC, 1), LOWEST)
            row_sum = tl.sum(tl.exp2(logits_RC - row_largest[:, None]), 1)
            column_largest = tl.maximum(tl.max(logits_RC, 0), LOWEST)
            column_sum = tl.sum(tl.exp2(logits_RC - column_largest[None, :]), 0)
    if row_partials is not None:
        _store(row_partials, 0, rows, num_rows, column_tile, column_tiles, row_largest)
        _store(row_partials, 1, rows, num_rows, column_tile, column_tiles, row_sum)
    if column_partials is not None:
        _store(column_partials, 0, columns, num_columns, row_tile, row_tiles, column_largest)
        _store(column_partials, 1, columns, num_columns, row_tile, row_tiles, column_sum)


@triton.jit
def _store(partials, which: tl.constexpr, at, size, tile, num_tiles, values):
    tl.store(partials + (which * num_tiles + tile) * size + at, values, mask=at < size)


@triton.jit(do_not_specialize=["size", "num_tiles"])
def fold_sums_kernel(partials, sums, size, num_tiles, K: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Add the parts of all tiles [K, tiles, size] to running sums [size, K], tile after tile."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = at < size
    largest = tl.load(sums + at * K, mask=exists, other=LOWEST)
    total = tl.load(sums + at * K + 1, mask=exists, other=0.0)
    positive_sum = tl.zeros((BLOCK,), tl.float32)
    positive_number = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, num_tiles, TILES):
        tiles = first + tl.arange(0, TILES)
        exists_TB = (tiles < num_tiles)[:, None] & exists[None, :]
        part_TB_at = partials + tiles[:, None] * size + at[None, :]
        part_TB = tl.load(part_TB_at + num_tiles * size, mask=exists_TB, other=0.0)
        reference_TB = tl.load(part_TB_at, mask=exists_TB, other=LOWEST)
        new_largest = tl.maximum(largest, tl.max(reference_TB, 0))
        total = total * tl.exp2(largest - new_largest) + tl.sum(part_TB * tl.exp2(reference_TB - new_largest[None, :]), 0)
        largest = new_largest
        if K == 4:
            positive_sum += tl.sum(tl.load(part_TB_at + 2 * num_tiles * size, mask=exists_TB, other=0.0), 0)
            positive_number += tl.sum(tl.load(part_TB_at + 3 * num_tiles * size, mask=exists_TB, other=0.0), 0)
    tl.store(sums + at * K, largest, mask=exists)
    tl.store(sums + at * K + 1, total, mask=exists)
    if K == 4:
        tl.store(sums + at * K + 2, tl.load(sums + at * K + 2, mask=exists) + positive_sum, mask=exists)
        tl.store(sums + at * K + 3, tl.load(sums + at * K + 3, mask=exists) + positive_number, mask=exists)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE, do_not_specialize_on_alignment=["row_weight", "column_weight"])
def softmax_gradients_kernel(
    x,
    y,
    scale,
    row_invalid,
    column_invalid,
    row_ids,
    column_ids,
    row_terms,
    column_terms,
    row_weight,
    column_weight,
    gradients,
    num_rows,
    num_columns,
    dim,
    x_stride,
    y_stride,
    gradients_stride,
    matched_row,
    matched_end,
    matched_offset,
    POSITIVE: tl.constexpr,
    GRADIENT_SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_DIM: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT_SCALE: tl.constexpr,
):
    """A tile of G, times GRADIENT_SCALE, in the features' dtype."""
    row_tile, column_tile = place(num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
    first_row, first_column = row_tile * BLOCK_ROWS, column_tile * BLOCK_COLUMNS
    row_present = present(first_row, num_rows, row_invalid, BLOCK_ROWS)
    column_present = present(first_column, num_columns, column_invalid, BLOCK_COLUMNS)
    logits_RC = _logits(
        x, y, scale, row_present, column_present, row_ids, column_ids, first_row, first_column, num_rows, num_columns,
        dim, x_stride, y_stride, matched_row, matched_end, matched_offset, POSITIVE,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DIM, EVEN_DIM, TMA, PRECISION, EXACT_SCALE,
    )  # fmt: skip
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    columns = first_column + tl.arange(0, BLOCK_COLUMNS)
    row_factor, column_factor = GRADIENT_SCALE, GRADIENT_SCALE
    if row_weight is not None:
        row_factor *= tl.load(row_weight)
        column_factor *= tl.load(column_weight)
    TERMS: tl.constexpr = 2 if POSITIVE else 1
    if row_terms is not None:
        row_sum_exp = tl.load(row_terms + rows * TERMS, mask=rows < num_rows, other=float("inf"))
    if column_terms is not None:
        column_sum_exp = tl.load(column_terms + columns * TERMS, mask=columns < num_columns, other=float("inf"))

    # No candidate's logit exceeds its row's or column's log-sum-exp, so no exponential overflows.
    if column_terms is None:
        gradients_RC = row_factor * tl.exp2(logits_RC - row_sum_exp[:, None])
    elif row_terms is None:
        gradients_RC = column_factor * tl.exp2(logits_RC - column_sum_exp[None, :])
    else:
        # +inf, which marks a row or column without a loss of its own, is left out here
        row_finite, column_finite = row_sum_exp < float("inf"), column_sum_exp < float("inf")
        HIGHEST: tl.constexpr = -LOWEST
        least = tl.minimum(
            tl.min(tl.where(row_finite, row_sum_exp, HIGHEST), 0), tl.min(tl.where(column_finite, column_sum_exp, HIGHEST), 0)
        )
        most = tl.maximum(
            tl.max(tl.where(row_finite, row_sum_exp, LOWEST), 0), tl.max(tl.where(column_finite, column_sum_exp, LOWEST), 0)
        )
        is_bounded = (tl.min(row_finite.to(tl.int32), 0) == 1) | (tl.min(column_finite.to(tl.int32), 0) == 1)
        if (most - least <= MOST_SPREAD) & is_bounded:
            row_part = row_factor * tl.exp2(least - row_sum_exp)
            column_part = column_factor * tl.exp2(least - column_sum_exp)
            gradients_RC = tl.exp2(logits_RC - least) * (row_part[:, None] + column_part[None, :])
        else:
            gradients_RC = row_factor * tl.exp2(logits_RC - row_sum_exp[:, None])
            gradients_RC += column_factor * tl.exp2(logits_RC - column_sum_exp[None, :])
    if POSITIVE:
        is_same_RC = same(row_ids, column_ids, first_row, first_column, num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
        is_same_RC &= logits_RC > -float("inf")
        if row_terms is not None:
            row_share = row_factor * tl.load(row_terms + rows * TERMS + 1, mask=rows < num_rows, other=0.0)
            gradients_RC -= tl.where(is_same_RC, row_share[:, None], 0.0)
        if column_terms is not None:
            column_share = column_factor * tl.load(column_terms + columns * TERMS + 1, mask=columns < num_columns, other=0.0)
            gradients_RC -= tl.where(is_same_RC, column_share[None, :], 0.0)
    store_panel(
        gradients, gradients_RC, first_row, first_column, num_rows, gradients_stride,
        BLOCK_ROWS, BLOCK_COLUMNS, TMA,
    )  # fmt: skip


@torch.library.custom_op("scaleclip_kernels::softmax_sums", mutates_args=())
def _softmax_sums(
    x: Tensor,
    y: Tensor,
    row_invalid: Tensor | None,
    column_invalid: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    matched: Sequence[int],
    positives: bool,
    precision: str,
    scale: Tensor,
    for_rows: bool,
    for_columns: bool,
) -> tuple[Tensor, Tensor]:
    panel = unflat(x, y, row_invalid, column_invalid, row_ids, column_ids, matched, positives, precision)
    row_partials, column_partials = _empty_partials(panel, for_rows, for_columns)
    launch = block_launch("softmax_sums", panel)
    with torch.cuda.device_of(x):
        softmax_sums_kernel[(math.prod(num_tiles(panel, launch)),)](
            **arguments(panel, launch),
            scale=scale,
            row_partials=row_partials if for_rows else None,
            column_partials=column_partials if for_columns else None,
            POSITIVE=positives,
        )
    return row_partials, column_partials


@_softmax_sums.register_fake
def _(*given: Any) -> tuple[Tensor, Tensor]:
    *block, _, for_rows, for_columns = given
    return _empty_partials(unflat(*block), for_rows, for_columns)


def _empty_partials(panel: Block, for_rows: bool, for_columns: bool) -> tuple[Tensor, Tensor]:
    """[K, column tiles, n] and [K, row tiles, m], or without tiles where a direction is not wanted."""
    (num_rows, num_columns), num_sums = panel.shape, 4 if panel.duplicates_are_positive else 2
    row_tiles, column_tiles = num_tiles(panel, block_launch("softmax_sums", panel))
    empty = panel.x.features.new_empty
    return (
        empty(num_sums, column_tiles if for_rows else 0, num_rows, dtype=torch.float32),
        empty(num_sums, row_tiles if for_columns else 0, num_columns, dtype=torch.float32),
    )


@torch.library.custom_op("scaleclip_kernels::fold_sums", mutates_args=("sums",))
def _fold_sums(partials: Tensor, sums: Tensor) -> None:
    num_sums, tiles, size = partials.shape
    with torch.cuda.device_of(sums):
        fold_sums_kernel[(triton.cdiv(size, FOLD_BLOCK),)](
            partials, sums, size, tiles, K=num_sums, BLOCK=FOLD_BLOCK, TILES=FOLD_TILES
        )


def fold_softmax(block: Block, logit_scale: Tensor, row_sums: Tensor | None, column_sums: Callable[[], Tensor] | None) -> None:
    """See `panels.fold_softmax`."""
    scale = scale_parts(logit_scale.double() * LOG2_E)
    wanted = row_sums is not None, column_sums is not None
    num_sums = 4 if block.duplicates_are_positive else 2
    for panel, rows, columns in super_panels(block, num_sums):
        row_partials, column_partials = _softmax_sums(*flat(panel), scale, *wanted)
        if row_sums is not None:
            _fold_sums(row_partials, row_sums[rows])
        if column_sums is not None:
            _fold_sums(column_partials, column_sums()[columns])


@torch.library.custom_op("scaleclip_kernels::softmax_gradients", mutates_args=())
def _softmax_gradients(
    x: Tensor,
    y: Tensor,
    row_invalid: Tensor | None,
    column_invalid: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    matched: Sequence[int],
    positives: bool,
    precision: str,
    scale: Tensor,
    row_terms: Tensor | None,
    column_terms: Tensor | None,
    row_weight: Tensor | None,
    column_weight: Tensor | None,
) -> Tensor:
    panel = unflat(x, y, row_invalid, column_invalid, row_ids, column_ids, matched, positives, precision)
    launch = block_launch("softmax_gradients", panel)
    gradients = empty_gradients(x, len(x), len(y))
    with torch.cuda.device_of(x):
        softmax_gradients_kernel[(math.prod(num_tiles(panel, launch)),)](
            **arguments(panel, launch),
            scale=scale,
            row_terms=row_terms,
            column_terms=column_terms,
            row_weight=row_weight,
            column_weight=column_weight,
            gradients=gradients_argument(gradients, launch),
            gradients_stride=gradients.stride(0),
            POSITIVE=positives,
            GRADIENT_SCALE=GRADIENT_SCALE[x.dtype],
        )
    return gradients


@_softmax_gradients.register_fake
def _(x: Tensor, y: Tensor, *_: object) -> Tensor:
    return empty_gradients(x, len(x), len(y))


def softmax_gradients(
    block: Block,
    logit_scale: Tensor,
    row_terms: Tensor | None,
    column_terms: Tensor | None,
    weights: tuple[Tensor, Tensor] | None,
    grad_x: Tensor | None,
    grad_y: Callable[[], Tensor] | None,
) -> None:
    """See `panels.softmax_gradients`."""
    scale = scale_parts(logit_scale.double() * LOG2_E)
    weight_pair = (None, None) if weights is None else weights
    for panel, rows, columns in gradient_panels(block):
        terms = (None if row_terms is None else row_terms[rows], None if column_terms is None else column_terms[columns])
        gradients = _softmax_gradients(*flat(panel), scale, *terms, *weight_pair)
        add_gradients(panel, rows, columns, gradients, grad_x, grad_y)
        del gradients  # before the next panel's are made
