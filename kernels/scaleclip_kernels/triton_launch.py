"""Between blocks and Triton kernels: which panels a block is visited in, and what a kernel is launched with.

Shapes: a block of n rows and m columns, D feature dims; a panel of R x C of its logits.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from scaleclip_kernels.blocks import Block
from scaleclip_kernels.gemm import add_panel_product
from scaleclip_kernels.tuning import Kernel, Launch, launch_for

PARTIAL_BYTES = 64 << 20
"""Of the parts of sums that a super-panel leaves before they are folded: what keeps memory linear in the batch."""
SUPER_ROWS = 16_384
GRADIENT_BYTES = 32 << 20
"""Of gradients of logits at a time: they are read twice, if possible from a cache of 50 MB (H100)."""
GRADIENT_ROWS = 4_096

# G is at most 2: half precision, whose numbers end at 6e-5 and 65,504, has more use for the upper half of its range.
GRADIENT_SCALE = {torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 8192.0}
# These differ between the panels of one call: a kernel compiled for each value would be compiled again and again.
DO_NOT_SPECIALIZE = ["num_rows", "num_columns", "matched_row", "matched_end", "matched_offset"]
_TMA_ALIGNMENT = 16


def scale_parts(scale: Tensor) -> Tensor:
    """fp64 () to fp32 [2] that sum to it."""
    high = scale.float()
    return torch.stack([high, (scale - high).float()])


def block_launch(kernel: Kernel, block: Block) -> Launch:
    features = block.x.features
    return launch_for(kernel, features.dtype, block.fp32_precision, block.duplicates_are_positive, features.device)


def num_tiles(panel: Block, launch: Launch) -> tuple[int, int]:
    """Of rows and of columns."""
    num_rows, num_columns = panel.shape
    return triton.cdiv(num_rows, launch.block_rows), triton.cdiv(num_columns, launch.block_columns)


def super_panels(block: Block, launch: Launch, num_sums: int) -> Iterator[tuple[Block, slice, slice]]:
    """Panels whose parts of sums fit PARTIAL_BYTES, row after row, with their rows and columns in the block."""
    num_rows, num_columns = block.shape
    rows = min(SUPER_ROWS, max(num_rows, 1))
    # a row has a part a column tile, a column a part a row tile
    bytes_a_column = 4 * num_sums * (rows / launch.block_columns + triton.cdiv(rows, launch.block_rows))
    columns = max(int(PARTIAL_BYTES / bytes_a_column) // launch.block_columns, 1) * launch.block_columns
    yield from _panels(block, rows, columns)


def arguments(panel: Block, launch: Launch) -> dict[str, Any]:
    """What every kernel is launched with."""
    x, y = panel.x.features, panel.y.features
    num_rows, num_columns = panel.shape
    tma = launch.tma and all(_is_aligned(side) for side in (x, y))
    matched = panel.matched
    return {
        "x": _descriptor(x, launch.block_rows, launch.block_dim) if tma else x,
        "y": _descriptor(y, launch.block_columns, launch.block_dim) if tma else y,
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
        "TMA": tma,
        "PRECISION": panel.fp32_precision,
        "EXACT_SCALE": x.dtype == torch.float32,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


class GradientPanel(NamedTuple):
    """Where a kernel writes the gradients of R x C logits, and what it is launched with."""

    block: Block
    rows: slice
    columns: slice
    gradients: Tensor
    grid: tuple[int]
    arguments: dict[str, Any]


class GradientPanels:
    """The panels of a block that gradients are computed in, one after the other in one buffer."""

    def __init__(
        self, block: Block, launch: Launch, grad_x: Tensor | None, grad_y: Callable[[], Tensor] | None
    ) -> None:
        self._block, self._launch = block, launch
        self._grad_x, self._grad_y = grad_x, grad_y

    def __iter__(self) -> Iterator[GradientPanel]:
        features = self._block.x.features
        num_rows, num_columns = self._block.shape
        rows = min(GRADIENT_ROWS, max(num_rows, 1))
        columns = min(GRADIENT_BYTES // (rows * features.itemsize), max(num_columns, 1))
        in_unit = _TMA_ALIGNMENT // features.itemsize
        stride = triton.cdiv(columns, in_unit) * in_unit
        buffer = features.new_empty(rows, stride)
        for panel, row_slice, column_slice in _panels(self._block, rows, columns):
            height, width = panel.shape
            gradients = buffer[:height, :width]
            shared = arguments(panel, self._launch)
            if shared["TMA"]:
                out = TensorDescriptor(gradients, [height, width], [stride, 1], [self._launch.block_rows, self._launch.block_columns])
            else:
                out = gradients
            row_tiles, column_tiles = num_tiles(panel, self._launch)
            grid = (row_tiles * column_tiles,)
            yield GradientPanel(
                panel, row_slice, column_slice, gradients, grid, {**shared, "gradients": out, "gradients_stride": stride}
            )

    def add(self, panel: GradientPanel) -> None:
        """Add G y to the rows' gradients and G^T x to the columns'."""
        x, y = panel.block.x.features, panel.block.y.features
        factor = 1 / GRADIENT_SCALE[x.dtype]
        if self._grad_x is not None:
            add_panel_product(self._grad_x[panel.rows], panel.gradients, y, factor)
        if self._grad_y is not None:
            add_panel_product(self._grad_y()[panel.columns], panel.gradients.T, x, factor)


def _panels(block: Block, height: int, width: int) -> Iterator[tuple[Block, slice, slice]]:
    num_rows, num_columns = block.shape
    for row in range(0, num_rows, height):
        rows = slice(row, min(row + height, num_rows))
        for column in range(0, num_columns, width):
            columns = slice(column, min(column + width, num_columns))
            yield block.part(rows, columns), rows, columns


def _is_aligned(features: Tensor) -> bool:
    return features.data_ptr() % _TMA_ALIGNMENT == 0 and features.stride(0) * features.itemsize % _TMA_ALIGNMENT == 0


def _descriptor(features: Tensor, block_rows: int, block_dim: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(features, [block_rows, block_dim])
