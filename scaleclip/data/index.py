"""Where each sample lies in a tar, so that any sample can be read without what stands before it.

Stored as a .npz of the samples' first blocks, 4 bytes a sample, and their keys. A sample's files follow each other, so one
read fetches them all, and their names and sizes come with them.
"""

import io
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from scaleclip.data.tar import BLOCK, TarDamage, split_name, walk

_SEPARATOR = "\0"  # the one character that no name in a tar holds


@dataclass(frozen=True)
class TarIndex:
    """The complete samples of a tar, in its order."""

    block_S1: NDArray[np.uint32]
    """[S + 1] block of 512 bytes at which each sample begins, and at which the last one ends."""
    keys: tuple[str, ...]
    """[S] key of each sample; a tar may hold one twice."""
    truncated: bool
    """The tar ends without its end mark; what stood whole before is here."""
    num_bytes: int
    """Size of the tar."""

    def __len__(self) -> int:
        return len(self.keys)

    def pack(self) -> bytes:
        """The bytes of an index file."""
        out = io.BytesIO()
        keys = np.frombuffer(_SEPARATOR.join(self.keys).encode("utf-8", "surrogateescape"), np.uint8)
        np.savez(out, block=self.block_S1, keys=keys, truncated=np.array(self.truncated), size=np.array(self.num_bytes))
        return out.getvalue()


def index_tar(path: str) -> TarIndex:
    """Read the headers of a tar in webdataset's layout: files of one sample follow each other and share their key.

    A second file of the same key and extension begins another sample.

    Raises:
        OSError: the file cannot be read.
    """
    num_bytes = os.path.getsize(path)
    if num_bytes == 0:
        return TarIndex(np.zeros(1, np.uint32), (), truncated=True, num_bytes=0)
    keys: list[str] = []
    blocks: list[int] = []
    extensions: set[str] = set()
    end = 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            for member in walk(data, whole=True):
                key, extension = split_name(member.name)
                if not keys or keys[-1] != key or extension in extensions:
                    keys.append(key)
                    blocks.append(end // BLOCK)
                    extensions = set()
                extensions.add(extension)
                if member.offset + member.size > len(data):
                    raise TarDamage("the last file is cut off")
                end = member.end
            whole = True
        except TarDamage:
            whole = False
    if not whole and keys:
        # the last sample is cut off, or may lack files that would have followed
        keys.pop()
        end = blocks.pop() * BLOCK
    return TarIndex(np.array([*blocks, end // BLOCK], np.uint32), tuple(keys), truncated=not whole, num_bytes=num_bytes)


def load_blocks(file: str | Path | BinaryIO) -> tuple[NDArray[np.uint32], bool, int]:
    """What a reader needs of an index file: `block_S1`, `truncated` and `num_bytes`."""
    with np.load(file) as stored:
        return stored["block"], bool(stored["truncated"]), int(stored["size"])


def load_index(file: str | Path | BinaryIO) -> TarIndex:
    """An index file, keys included."""
    with np.load(file) as stored:
        text = stored["keys"].tobytes().decode("utf-8", "surrogateescape")
        keys = tuple(text.split(_SEPARATOR)) if len(stored["block"]) > 1 else ()
        return TarIndex(stored["block"], keys, bool(stored["truncated"]), int(stored["size"]))
