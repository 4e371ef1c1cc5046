"""Between blocks and Triton kernels: which panels a block is visited in, and what a kernel is launched with.

Shapes: a block of n rows and m columns, D feature dims; a panel of R x C of its logits.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from scaleclip_kernels.blocks import Block, Fp32Precision, Matched, Side
from scaleclip_kernels.gemm import add_panel_product
from scaleclip_kernels.tuning import Kernel, Launch, launch_for

PARTIAL_BYTES = 64 << 20
"""Of the parts of sums that a super-panel leaves before they are folded: what keeps memory linear in the batch."""
SUPER_ROWS = 16_384
LEAST_TILE, WIDEST_TILE = 64, 256
"""Rows or columns of any launch's tiles on a GPU."""
GRADIENT_BYTES = 256 << 20
"""Of gradients of logits at a time. A panel is three launches: at 32 MiB the host is slower than an H100 (35 ms for 10 ms of
work at 32k pairs in bf16), and the library's products gain more from long sums than from finding them in a cache."""
GRADIENT_ROWS = 8_192

# G is at most 2: half precision, which has all its digits from 6e-5 to 65,504, has more use for the upper half of its range.
GRADIENT_SCALE = {torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 8192.0}
# These differ between the panels of one call: a kernel compiled for each value would be compiled again and again.
DO_NOT_SPECIALIZE = ["num_rows", "num_columns", "matched_row", "matched_end", "matched_offset"]
ALIGNMENT = 16
"""Bytes: of rows that TMA takes, and that are loaded many elements at a time."""
_PANEL_UNIT = 16
"""Elements: Triton takes a stride that is a multiple of so many for aligned."""


def scale_parts(scale: Tensor) -> Tensor:
    """fp64 () to fp32 [2] that sum to it."""
    high = scale.float()
    return torch.stack([high, (scale - high).float()])


def block_launch(kernel: Kernel, block: Block) -> Launch:
    x, y = block.x.features, block.y.features
    is_aligned = _is_aligned(x) and _is_aligned(y)
    launch: Launch = launch_for(kernel, x.dtype, block.fp32_precision, block.duplicates_are_positive, is_aligned, x.device)
    return launch


FlatBlock = tuple[
    Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Sequence[int], bool, Fp32Precision
]


def flat(block: Block) -> FlatBlock:
    """As the arguments of an operator, which takes tensors and plain values alone; back by `unflat`."""
    x, y = block.x, block.y
    sides = (x.features, y.features, x.invalid, y.invalid, x.ids, y.ids)
    return (*sides, list(block.matched), block.duplicates_are_positive, block.fp32_precision)


def unflat(
    x: Tensor,
    y: Tensor,
    row_invalid: Tensor | None,
    column_invalid: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    matched: Sequence[int],
    positives: bool,
    precision: str,
) -> Block:
    sides = Side(x, row_invalid, row_ids), Side(y, column_invalid, column_ids)
    return Block(*sides, Matched(*matched), positives, cast(Fp32Precision, precision))


def num_tiles(panel: Block, launch: Launch) -> tuple[int, int]:
    """Of rows and of columns."""
    num_rows, num_columns = panel.shape
    return triton.cdiv(num_rows, launch.block_rows), triton.cdiv(num_columns, launch.block_columns)


def super_panels(block: Block, num_sums: int) -> Iterator[tuple[Block, slice, slice]]:
    """Panels whose parts of sums fit PARTIAL_BYTES, row after row, with their rows and columns in the block."""
    rows = min(SUPER_ROWS, max(block.shape[0], 1))
    # a row has a part a column tile, a column a part a row tile
    bytes_a_column = 4 * num_sums * (rows / LEAST_TILE + triton.cdiv(rows, LEAST_TILE))
    yield from _panels(block, rows, max(int(PARTIAL_BYTES / bytes_a_column) // WIDEST_TILE, 1) * WIDEST_TILE)


def arguments(panel: Block, launch: Launch) -> dict[str, Any]:
    """What every kernel is launched with."""
    x, y = panel.x.features, panel.y.features
    num_rows, num_columns = panel.shape
    matched = panel.matched
    return {
        "x": _descriptor(x, launch.block_rows, launch.block_dim) if launch.tma else x,
        "y": _descriptor(y, launch.block_columns, launch.block_dim) if launch.tma else y,
        "row_invalid": None if panel.x.invalid is None else panel.x.invalid.view(torch.uint8),
        "column_invalid": None if panel.y.invalid is None else panel.y.invalid.view(torch.uint8),
        "row_ids": panel.x.ids if panel.y.ids is not None else None,
        "column_ids": panel.y.ids if panel.x.ids is not None else None,
        "num_rows": num_rows,
        "num_columns": num_columns,
        "dim": x.shape[1],
        "x_stride": x.stride(0),
        "y_stride": y.stride(0),
        "matched_row": matched.row,
        "matched_end": matched.row + matched.length,
        "matched_offset": matched.column - matched.row,
        "BLOCK_ROWS": launch.block_rows,
        "BLOCK_COLUMNS": launch.block_columns,
        "BLOCK_DIM": launch.block_dim,
        "GROUP": launch.group,
        "EVEN_DIM": x.shape[1] % launch.block_dim == 0,
        "TMA": launch.tma,
        "PRECISION": panel.fp32_precision,
        "EXACT_SCALE": x.dtype == torch.float32,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


def gradient_panels(block: Block) -> Iterator[tuple[Block, slice, slice]]:
    """Panels whose gradients take GRADIENT_BYTES, row after row, with their rows and columns in the block."""
    rows = min(GRADIENT_ROWS, max(block.shape[0], 1))
    yield from _panels(block, rows, GRADIENT_BYTES // (rows * block.x.features.itemsize))


def empty_gradients(x_ND: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """[n, m] in the features' dtype, in longer rows whose beginnings are aligned."""
    return x_ND.new_empty(num_rows, triton.cdiv(num_columns, _PANEL_UNIT) * _PANEL_UNIT)[:, :num_columns]


def gradients_argument(gradients: Tensor, launch: Launch) -> Any:
    """As a kernel takes it."""
    if not launch.tma:
        return gradients
    return TensorDescriptor(
        gradients, list(gradients.shape), list(gradients.stride()), [launch.block_rows, launch.block_columns]
    )


def add_gradients(
    panel: Block,
    rows: slice,
    columns: slice,
    gradients: Tensor,
    grad_x: Tensor | None,
    grad_y: Callable[[], Tensor] | None,
) -> None:
    """Add G y to the rows' gradients and G^T x to the columns'."""
    x, y = panel.x.features, panel.y.features
    factor = 1 / GRADIENT_SCALE[x.dtype]
    if grad_x is not None:
        add_panel_product(grad_x[rows], gradients, y, factor)
    if grad_y is not None:
        add_panel_product(grad_y()[columns], gradients.T, x, factor)


def _panels(block: Block, height: int, width: int) -> Iterator[tuple[Block, slice, slice]]:
    num_rows, num_columns = block.shape
    for row in range(0, num_rows, height):
        rows = slice(row, min(row + height, num_rows))
        for column in range(0, num_columns, width):
            columns = slice(column, min(column + width, num_columns))
            yield block.part(rows, columns), rows, columns


def _is_aligned(features: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes; an allocation does."""
    row_bytes, first_bytes = features.stride(0) * features.itemsize, features.storage_offset() * features.itemsize
    return features.shape[1] > 0 and bool(row_bytes % ALIGNMENT == 0) and bool(first_bytes % ALIGNMENT == 0)


def _descriptor(features: Tensor, block_rows: int, block_dim: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(features, [block_rows, block_dim])
