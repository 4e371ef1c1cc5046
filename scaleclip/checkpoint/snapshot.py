"""A copy on the host of what a rank saves, so that training goes on while it is written."""

from collections.abc import Iterator, Sequence

import torch

from scaleclip.checkpoint.background import begin
from scaleclip.checkpoint.rank_file import Piece, encode_header
from scaleclip.checkpoint.shard import Fragment

# large enough that a writing thread seldom asks for the interpreter, small enough for a file's cache to keep up
_BLOCK_BYTES = 8 << 20


class Snapshot:
    """A buffer with room for fragments like `fragments`, pinned where the device is a GPU.

    Raises:
        RuntimeError, MemoryError: the host has no room.
    """

    def __init__(self, fragments: Sequence[Fragment], device: torch.device) -> None:
        self._pieces = [Piece.of(fragment) for fragment in fragments]
        self._device = device
        lengths = [piece.length for piece in self._pieces for _ in piece.kinds]
        self._buffer = torch.empty(sum(lengths), dtype=torch.float32, pin_memory=device.type == "cuda")
        self._parts = list(torch.split(self._buffer, lengths))
        # a copy into memory that was never written is several times slower
        self._touched = begin(lambda: self._buffer.numpy().fill(0))

    @torch.no_grad()
    def take(self, fragments: Sequence[Fragment]) -> None:
        """Copy the fragments, in order of what computes them; the buffer holds them on return."""
        assert [Piece.of(fragment) for fragment in fragments] == self._pieces, "a rank's layout does not change"
        self._touched.result()
        sources = [tensor for fragment in fragments for tensor in fragment.tensors.values()]
        if sources:
            torch._foreach_copy_(self._parts, sources, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def blocks(self) -> Iterator[bytes | memoryview]:
        """The content of the rank's file."""
        yield encode_header(self._pieces)
        content = self._buffer.numpy().data.cast("B")
        for begin_byte in range(0, len(content), _BLOCK_BYTES):
            yield content[begin_byte : begin_byte + _BLOCK_BYTES]
