"""The sigmoid loss on GPUs: loss and gradients of a block of logits in one pass, a tile a program.

What the function does is written in `panels.py`, whose place it takes; derivation and counts in kernels/README.md.

Shapes: a block of n rows and m columns, D feature dims; a tile of R x C logits.
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
    unflat,
)
from scaleclip_kernels.triton_tiles import count, place, present, products, same, scaled, store_panel

_LOG2_E = tl.constexpr(LOG2_E)
# 64 factors of at most 2 stay far below fp32's overflow at 2^128.
_FACTORS = tl.constexpr(64)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE, do_not_specialize_on_alignment=["share"])
def sigmoid_kernel(
    x,
    y,
    scale,
    bias,
    share,
    row_invalid,
    column_invalid,
    row_ids,
    column_ids,
    totals,
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
    """A tile's loss and sum(G), both times `share`, to totals [tiles, 2]; its G, times GRADIENT_SCALE, where wanted."""
    row_tile, column_tile = place(num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
    first_row, first_column = row_tile * BLOCK_ROWS, column_tile * BLOCK_COLUMNS
    logits_RC = products(
        x, y, first_row, first_column, num_rows, num_columns, dim, x_stride, y_stride,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DIM, EVEN_DIM, TMA, PRECISION,
    )  # fmt: skip
    logits_RC = count(
        scaled(logits_RC, scale, EXACT_SCALE) + tl.load(bias),
        present(first_row, num_rows, row_invalid, BLOCK_ROWS),
        present(first_column, num_columns, column_invalid, BLOCK_COLUMNS),
        first_row, first_column, matched_row, matched_end, matched_offset, BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip
    if row_ids is not None:
        is_same_RC = same(row_ids, column_ids, first_row, first_column, num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
        if POSITIVE:
            # what does not count stays at -inf
            is_same_RC &= logits_RC > -float("inf")
            logits_RC = tl.where(is_same_RC, -logits_RC, logits_RC)
        else:
            logits_RC = tl.where(is_same_RC, -float("inf"), logits_RC)
    factor = 1.0
    if share is not None:
        factor *= tl.load(share)
    # softplus(u) = max(u, 0) + log1p(e) with e = exp(-|u|) <= 1; log1p(a) + log1p(b) = log1p(a + b + a b)
    small_RC = tl.exp2(-tl.abs(logits_RC) * _LOG2_E)
    joined = tl.reduce(tl.reshape(small_RC, (BLOCK_ROWS, BLOCK_COLUMNS // _FACTORS, _FACTORS)), 2, _join)
    loss = tl.sum(tl.maximum(logits_RC, 0.0)) + tl.sum(_log1p(joined))
    tl.store(totals + 2 * tl.program_id(0), loss * factor)
    if gradients is not None:
        gradients_RC = factor / (1.0 + small_RC)
        gradients_RC = tl.where(logits_RC >= 0, gradients_RC, gradients_RC * small_RC)
        if POSITIVE:
            gradients_RC = tl.where(is_same_RC, -gradients_RC, gradients_RC)
        tl.store(totals + 2 * tl.program_id(0) + 1, tl.sum(gradients_RC))
        store_panel(
            gradients, gradients_RC * GRADIENT_SCALE, first_row, first_column, num_rows, gradients_stride,
            BLOCK_ROWS, BLOCK_COLUMNS, TMA,
        )  # fmt: skip


@triton.jit
def _join(a, b):
    return a + b + a * b


@triton.jit
def _log1p(a):
    """log(1 + a) for a >= 0, with all digits where a is small: 2 atanh(a / (2 + a)) as a series."""
    z = a / (2.0 + a)
    square = z * z
    series = 1.0 / 3 + square * (1.0 / 5 + square * (1.0 / 7 + square * (1.0 / 9 + square * (1.0 / 11))))
    return tl.where(a < 0.5, 2.0 * z + 2.0 * z * square * series, tl.log(1.0 + a))


@torch.library.custom_op("scaleclip_kernels::sigmoid", mutates_args=())
def _sigmoid(
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
    bias: Tensor,
    share: Tensor | None,
    with_gradients: bool,
) -> tuple[Tensor, Tensor]:
    panel = unflat(x, y, row_invalid, column_invalid, row_ids, column_ids, matched, positives, precision)
    launch = block_launch("sigmoid", panel)
    totals, gradients = _empty_results(panel, with_gradients)
    with torch.cuda.device_of(x):
        sigmoid_kernel[(len(totals),)](
            **arguments(panel, launch),
            scale=scale,
            bias=bias,
            share=share,
            totals=totals,
            gradients=gradients_argument(gradients, launch) if with_gradients else None,
            gradients_stride=gradients.stride(0),
            POSITIVE=positives,
            GRADIENT_SCALE=GRADIENT_SCALE[x.dtype],
        )
    return totals, gradients


@_sigmoid.register_fake
def _(*given: Any) -> tuple[Tensor, Tensor]:
    *block, _, _, _, with_gradients = given
    return _empty_results(unflat(*block), with_gradients)


def _empty_results(panel: Block, with_gradients: bool) -> tuple[Tensor, Tensor]:
    """Each tile's loss and sum(G) [tiles, 2], and the panel's G, empty where it is not wanted."""
    features, (num_rows, num_columns) = panel.x.features, panel.shape
    tiles = math.prod(num_tiles(panel, block_launch("sigmoid", panel)))
    gradients = empty_gradients(features, num_rows if with_gradients else 0, num_columns)
    return features.new_zeros(tiles, 2, dtype=torch.float32), gradients


def sigmoid_block(
    block: Block,
    logit_scale: Tensor,
    logit_bias: Tensor,
    share: Tensor | None,
    totals: Tensor,
    grad_x: Tensor | None,
    grad_y: Callable[[], Tensor] | None,
) -> None:
    """See `panels.sigmoid_block`."""
    scale = scale_parts(logit_scale.double())
    with_gradients = grad_x is not None or grad_y is not None
    for panel, rows, columns in gradient_panels(block):
        tile_totals, gradients = _sigmoid(*flat(panel), scale, logit_bias, share, with_gradients)
        totals += tile_totals.sum(dim=0, dtype=torch.float64)
        add_gradients(panel, rows, columns, gradients, grad_x, grad_y)
        del gradients  # before the next panel's are made
