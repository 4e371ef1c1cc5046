"""What a launch of a Triton kernel multiplies, asks of memory and writes: the formulas of kernels/README.md.

Bytes are those that the instructions ask for; how many of them come from a cache is another matter.
Shapes: n rows, m columns, D feature dims, tiles of R x C logits; b bytes a feature.
"""

import math
from typing import NamedTuple

from scaleclip_kernels.tuning import Kernel, Launch

_IDS, _MASK, _FP32 = 8, 1, 4
_PANEL_UNIT = 16


class Counts(NamedTuple):
    flop: int
    """Two a multiply-add, the padding of tiles included."""
    loaded: int
    """Bytes."""
    stored: int


class Asked(NamedTuple):
    """Of a launch: what its arguments make it do. Bytes a feature, and which options are there."""

    num_rows: int
    num_columns: int
    dim: int
    itemsize: int
    has_masks: bool = False
    has_ids: bool = False
    positives: bool = False
    num_scale_parts: int = 1


def launch_counts(kernel: Kernel, asked: Asked, launch: Launch, recomputed_tiles: int = 0) -> Counts:
    """Of one launch, both directions and gradients wanted, no weights.

    Args:
        recomputed_tiles: of "softmax_sums", tiles that need maxima of their own, made twice (with pointers, no ids).
    """
    row_tiles, column_tiles = math.ceil(asked.num_rows / launch.block_rows), math.ceil(asked.num_columns / launch.block_columns)
    tiles = row_tiles * column_tiles
    made = tiles + recomputed_tiles
    padded_dim = math.ceil(asked.dim / launch.block_dim) * launch.block_dim
    flop = 2 * made * launch.block_rows * launch.block_columns * padded_dim
    # every row meets every column tile, every column every row tile
    sides = asked.num_rows * column_tiles + asked.num_columns * row_tiles
    # pointers take the last row again where a tile ends beyond it, TMA takes nothing
    features = sides if launch.tma else made * (launch.block_rows + launch.block_columns)
    loaded = features * asked.dim * asked.itemsize + made * _FP32 * asked.num_scale_parts
    loaded += sides * (_MASK * asked.has_masks + _IDS * asked.has_ids)
    # pointers store up to the end of a panel's rows, which are a multiple of 16 elements
    width = asked.num_columns if launch.tma else math.ceil(asked.num_columns / _PANEL_UNIT) * _PANEL_UNIT
    panel = asked.num_rows * width * asked.itemsize
    if kernel == "softmax_sums":
        stored = sides * _FP32 * (4 if asked.positives else 2)
    elif kernel == "softmax_gradients":
        loaded += sides * _FP32 * (2 if asked.positives else 1)
        stored = panel
    else:
        loaded += tiles * _FP32  # the bias
        stored = panel + tiles * 2 * _FP32
    return Counts(flop, loaded, stored)


def fold_counts(num_sums: int, num_tiles: int, size: int) -> Counts:
    """Of the launch that adds the parts of `num_tiles` tiles to the sums of `size` rows or columns."""
    sums = size * num_sums * _FP32
    return Counts(0, num_tiles * sums + sums, sums)
