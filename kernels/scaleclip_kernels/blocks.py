"""What schedules and backends speak of: the two sides of the similarity matrix, and blocks of it.

Shapes: N rows (x), M columns (y), D feature dims; n and m are the rows and columns of one block.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Fp32Precision = Literal["ieee", "tf32x3"]

# Logits are kept in base 2 where an exponential follows: exp2 is the cheaper one on CPUs and GPUs alike.
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


class Side(NamedTuple):
    """Rows or columns of the similarity matrix: n feature vectors and what is known of each."""

    features: Tensor
    """[n, D] in the compute dtype, zero where invalid."""
    invalid: Tensor | None
    """bool [n]; None: all valid."""
    ids: Tensor | None
    """int64 [n]; None: ids play no part."""

    def part(self, which: slice) -> "Side":
        invalid, ids = (None if tensor is None else tensor[which] for tensor in (self.invalid, self.ids))
        return Side(self.features[which], invalid, ids)


class Matched(NamedTuple):
    """Which pairs of a block belong together: (row + k, column + k) for k in range(length)."""

    row: int
    column: int
    length: int


class Block(NamedTuple):
    """The logits of n rows against m columns. Matched pairs are left to the caller, who holds both their features."""

    x: Side
    y: Side
    matched: Matched
    duplicates_are_positive: bool
    """What ids do to a pair that is not matched: make it one more positive, or leave it out of the denominators."""
    fp32_precision: Fp32Precision = "ieee"
    """How fp32 features are multiplied."""

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.x.features), len(self.y.features)

    def part(self, rows: slice, columns: slice) -> "Block":
        """Some rows and columns, with matched pairs counted from their first."""
        row, column, length = self.matched
        matched = Matched(row - rows.start, column - columns.start, length)
        return self._replace(x=self.x.part(rows), y=self.y.part(columns), matched=matched)


ELEMENTS_AT_A_TIME = {"cpu": 1 << 21, "other": 1 << 24}
"""On a CPU a few passes over them stay in a core's cache; a GPU works on so many in less time than a launch takes."""


def row_chunks(like_ND: Tensor) -> Iterator[slice]:
    """Slices of rows of about ELEMENTS_AT_A_TIME elements, so that elementwise work needs no second N x D tensor."""
    num_rows, dim = like_ND.shape
    step = max(1, ELEMENTS_AT_A_TIME["cpu" if like_ND.device.type == "cpu" else "other"] // max(dim, 1))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def dot_rows(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """<a_i, b_i> in fp32 [N]."""
    dots_N = torch.empty(len(a_ND), dtype=torch.float32, device=a_ND.device)
    for rows in row_chunks(a_ND):
        torch.sum(a_ND[rows].float() * b_ND[rows], dim=1, out=dots_N[rows])
    return dots_N


def add_scaled_rows(total_ND: Tensor, weight_N: Tensor, a_ND: Tensor) -> None:
    """total_i += weight_i a_i in place, in fp32."""
    for rows in row_chunks(a_ND):
        total_ND[rows].addcmul_(weight_N[rows].unsqueeze(1), a_ND[rows].float())
