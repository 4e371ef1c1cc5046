"""The state of a rank as named fragments: no layout of ZeRO is known beyond this, so each can be loaded into any other."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Fragment(NamedTuple):
    """A rank's part of a parameter and of its optimizer state."""

    name: str
    """The parameter's."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """First element of the flattened parameter that is here."""
    tensors: dict[str, Tensor]
    """`weight`, and for a parameter that learns `exp_avg` and `exp_avg_sq`: fp32, of one length, views of the live state."""
    replicated: bool
    """Whether every rank has the same."""

    @property
    def length(self) -> int:
        """Elements that are here."""
        return len(self.tensors["weight"])

    def cut(self, begin: int, end: int) -> "Fragment":
        """Elements `begin` to `end` of those that are here."""
        tensors = {kind: tensor[begin:end] for kind, tensor in self.tensors.items()}
        return self._replace(start=self.start + begin, tensors=tensors)


class Shard(NamedTuple):
    """What a rank holds of parameters and optimizer state."""

    fragments: list[Fragment]
    """Parts of parameters."""
    scalars: dict[str, Tensor]
    """Small tensors that all ranks hold alike."""


def share(fragments: Sequence[Fragment], rank: int, world_size: int) -> list[Fragment]:
    """What a rank saves: all that it alone holds, and its part of what every rank holds."""
    replicated = sum(fragment.length for fragment in fragments if fragment.replicated)
    first, last = (replicated * number // world_size for number in (rank, rank + 1))
    mine, offset = [], 0
    for fragment in fragments:
        begin, end = 0, fragment.length
        if fragment.replicated:
            begin, end = max(first - offset, 0), min(last - offset, end)
            offset += fragment.length
        if begin < end:
            mine.append(fragment.cut(begin, end))
    return mine
