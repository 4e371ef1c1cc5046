"""A rank's file of a checkpoint: safetensors, whose metadata say what the tensors are parts of.

The format (https://github.com/huggingface/safetensors#format) is the header's length in 8 bytes, the header as JSON and the
tensors' bytes. The library copies them all before it writes; with the header from here they go from the snapshot to the disk.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open

from scaleclip.checkpoint.shard import Fragment

_ELEMENT_BYTES = 4


class Piece(NamedTuple):
    """Elements of a parameter, and of its optimizer state, that one file holds."""

    name: str
    """The parameter's."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """First element of the flattened parameter."""
    length: int
    kinds: tuple[str, ...]
    """`weight`, `exp_avg`, `exp_avg_sq`."""

    @classmethod
    def of(cls, fragment: Fragment) -> "Piece":
        """A fragment without its tensors."""
        return cls(fragment.name, fragment.shape, fragment.start, fragment.length, tuple(fragment.tensors))

    @property
    def end(self) -> int:
        """The element after the last one."""
        return self.start + self.length

    def key(self, kind: str) -> str:
        """The tensor's name in the file."""
        return f"{self.name}[{self.start}:{self.end}].{kind}"


def rank_file(rank: int) -> str:
    """The file's name."""
    return f"rank_{rank:05d}.safetensors"


def encode_header(pieces: Sequence[Piece]) -> bytes:
    """What goes before the tensors' bytes, which follow one another piece by piece and in it kind by kind."""
    header: dict[str, object] = {"__metadata__": {"pieces": json.dumps(pieces)}}
    offset = 0
    for piece in pieces:
        for kind in piece.kinds:
            end = offset + piece.length * _ELEMENT_BYTES
            header[piece.key(kind)] = {"dtype": "F32", "shape": [piece.length], "data_offsets": [offset, end]}
            offset = end
    text = json.dumps(header).encode()
    # the tensors' bytes begin at a multiple of 8
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_pieces(path: Path) -> list[Piece]:
    """What a file holds."""
    with safe_open(path, "pt") as file:
        pieces = json.loads(file.metadata()["pieces"])
    return [Piece(name, tuple(shape), start, length, tuple(kinds)) for name, shape, start, length, kinds in pieces]
