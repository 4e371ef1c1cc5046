"""What the Triton kernels share: a tile of logits, where it lies, and which of its pairs count.

A tile is BLOCK_ROWS x BLOCK_COLUMNS logits (R x C in names). Logits are in base 2 in the softmax kernels. Offsets into features
and panels are int64. Only what Triton's interpreter has is used: no libdevice, no inline assembly.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""The lowest finite fp32: -inf less -inf would be NaN where nothing counts."""


@triton.jit
def place(num_rows, num_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Row tile and column tile of this program: GROUP row tiles meet one column tile after the other, so both stay in L2."""
    program = tl.program_id(0)
    in_group = GROUP * tl.cdiv(num_columns, BLOCK_COLUMNS)
    first = program // in_group * GROUP
    height = min(tl.cdiv(num_rows, BLOCK_ROWS) - first, GROUP)
    return first + program % in_group % height, program % in_group // height


@triton.jit
def products(
    x,
    y,
    first_row,
    first_column,
    num_rows,
    num_columns,
    dim,
    x_stride,
    y_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    EVEN_DIM: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x y^T in fp32 [R, C]. Rows and columns beyond the last hold some finite product: `count` strikes them."""
    total_RC = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    if TMA:
        for k in range(0, dim, BLOCK_DIM):
            x_RK = x.load([first_row, k])
            y_CK = y.load([first_column, k])
            total_RC = tl.dot(x_RK, y_CK.T, total_RC, input_precision=PRECISION)
    else:
        # beyond the end the last row once more: no mask in the loop
        rows = tl.minimum(first_row + tl.arange(0, BLOCK_ROWS), num_rows - 1).to(tl.int64)
        columns = tl.minimum(first_column + tl.arange(0, BLOCK_COLUMNS), num_columns - 1).to(tl.int64)
        dims = tl.arange(0, BLOCK_DIM)
        x_RK_at = x + rows[:, None] * x_stride + dims[None, :]
        y_CK_at = y + columns[:, None] * y_stride + dims[None, :]
        for k in range(0, dim, BLOCK_DIM):
            if EVEN_DIM:
                x_RK = tl.load(x_RK_at)
                y_CK = tl.load(y_CK_at)
            else:
                x_RK = tl.load(x_RK_at, mask=dims[None, :] < dim - k, other=0.0)
                y_CK = tl.load(y_CK_at, mask=dims[None, :] < dim - k, other=0.0)
            total_RC = tl.dot(x_RK, y_CK.T, total_RC, input_precision=PRECISION)
            x_RK_at += BLOCK_DIM
            y_CK_at += BLOCK_DIM
    return total_RC


@triton.jit
def scaled(products_RC, scale, EXACT_SCALE: tl.constexpr):
    """The scale comes in two fp32 parts; the lower one matters where features are fp32."""
    if EXACT_SCALE:
        return products_RC * tl.load(scale) + products_RC * tl.load(scale + 1)
    return products_RC * tl.load(scale)


@triton.jit
def present(first, num, invalid, BLOCK: tl.constexpr):
    """bool [BLOCK]: rows or columns that exist and are valid."""
    at = first + tl.arange(0, BLOCK)
    is_present = at < num
    if invalid is not None:
        is_present &= tl.load(invalid + at, mask=is_present, other=1) == 0
    return is_present


@triton.jit
def count(
    logits_RC,
    row_present,
    column_present,
    first_row,
    first_column,
    matched_row,
    matched_end,
    matched_offset,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """-inf where a pair is matched, or one of its sides is not present.

    Row i is matched with column i + matched_offset for matched_row <= i < matched_end. Most tiles have nothing to strike: they
    go round.
    """
    from_row, to_row = tl.maximum(first_row, matched_row), tl.minimum(first_row + BLOCK_ROWS, matched_end)
    touched = (from_row < to_row) & (from_row + matched_offset < first_column + BLOCK_COLUMNS)
    touched &= to_row + matched_offset > first_column
    lacking = (tl.min(row_present.to(tl.int32), 0) == 0) | (tl.min(column_present.to(tl.int32), 0) == 0)
    if touched | lacking:
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        partners = tl.where((rows >= matched_row) & (rows < matched_end), rows + matched_offset, -1)
        columns = first_column + tl.arange(0, BLOCK_COLUMNS)
        counts_RC = row_present[:, None] & column_present[None, :] & (partners[:, None] != columns[None, :])
        logits_RC = tl.where(counts_RC, logits_RC, -float("inf"))
    return logits_RC


@triton.jit
def same(
    row_ids, column_ids, first_row, first_column, num_rows, num_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """bool [R, C]: pairs of equal ids, matched ones and those beyond the end included."""
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    columns = first_column + tl.arange(0, BLOCK_COLUMNS)
    row_ids_R = tl.load(row_ids + rows, mask=rows < num_rows, other=0)
    column_ids_C = tl.load(column_ids + columns, mask=columns < num_columns, other=0)
    return row_ids_R[:, None] == column_ids_C[None, :]


@triton.jit
def store_panel(
    panel,
    values_RC,
    first_row,
    first_column,
    num_rows,
    stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Write a tile to a panel of n rows, `stride` apart, in the panel's dtype."""
    if TMA:
        panel.store([first_row, first_column], values_RC.to(panel.dtype))
    else:
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        columns = first_column + tl.arange(0, BLOCK_COLUMNS)
        # up to the end of the panel's own rows, whose alignment is known, so that many elements are stored at a time
        exists_RC = (rows < num_rows)[:, None] & (columns < stride)[None, :]
        at_RC = panel + rows.to(tl.int64)[:, None] * stride + columns[None, :]
        tl.store(at_RC, values_RC.to(panel.dtype.element_ty), mask=exists_RC)
