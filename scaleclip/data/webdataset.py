"""Random access to samples in tars of webdataset's layout, as img2dataset writes them (.jpg/.png/.webp, .txt, .json)."""

import io
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath

from scaleclip.data.cache import ShardCache
from scaleclip.data.index import index_tar, load_blocks, load_index
from scaleclip.data.sample import Sample, SampleError
from scaleclip.data.shards import is_remote
from scaleclip.data.tar import BLOCK, TarDamage, split_name, walk

# A rank's batches go round all its streams' blocks of shards, which is what it has open at once.
_OPEN_SHARDS = 1024
_MISSING = "missing_shard"


class TarReader:
    """Reads a sample by its shard's number and its own number in the shard, its ordinal.

    Keeps the offsets and files of the shards that it touched last, and no other state.

    Args:
        shards: path or URL of every shard.
        cache: local copies of remote shards.
        indexes: folder with the index files of `scaleclip data index`; a shard without one is indexed at first touch.
    """

    def __init__(self, shards: Sequence[str], cache: ShardCache, indexes: Path | None = None) -> None:
        self._shards, self._cache, self._indexes = shards, cache, indexes
        self._open = lru_cache(maxsize=_OPEN_SHARDS)(self._open_shard)
        self._buffer = memoryview(bytearray(1 << 20))

    def fetch(self, shard: int) -> None:
        """Have the shard and its index at hand. Raises SampleError when it cannot be had."""
        self._open(shard)

    def __call__(self, shard: int, ordinal: int) -> Sample:
        """Raises SampleError when the sample cannot be had."""
        opened = self._open(shard)
        start, stop = opened.span(ordinal)
        if stop - start > len(self._buffer):
            self._buffer = memoryview(bytearray(stop - start))
        return opened.read(ordinal, start, self._buffer[: stop - start])

    def keys(self, shard: int) -> Sequence[str]:
        """Of all its samples. Raises SampleError when the shard cannot be had."""
        url = self._shards[shard]
        return load_index(self._index(url, self._cache.path(url))).keys

    def _open_shard(self, shard: int) -> "_Shard":
        url = self._shards[shard]
        try:
            path = self._cache.path(url)
            return _Shard(path, self._index(url, path))
        except SampleError as error:
            if not (is_remote(url) and error.cause == _MISSING):
                raise
            # evicted between the two
            path = self._cache.path(url)
            return _Shard(path, self._index(url, path))

    def _index(self, url: str, path: str) -> io.BytesIO:
        stored = index_path(self._indexes, url) if self._indexes else None
        if stored is not None and stored.exists():
            return io.BytesIO(stored.read_bytes())
        return io.BytesIO(self._cache.derived(path, "index", lambda path: index_tar(path).pack()))


def index_path(folder: Path, shard: str) -> Path:
    """Where the index file of a shard lies in a manifest's folder of indexes."""
    return folder / f"{PurePosixPath(shard).name}.npz"


class _Shard:
    def __init__(self, path: str, index: io.BytesIO) -> None:
        self._path = path
        blocks, self._truncated = load_blocks(index)
        self._starts = blocks.astype("int64") * BLOCK
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            cause = _MISSING if isinstance(error, FileNotFoundError) else "unreadable_shard"
            raise SampleError(cause, f"{path}: {error.strerror}") from error

    def span(self, ordinal: int) -> tuple[int, int]:
        """First and last + 1 byte of a sample. Raises SampleError where there is none."""
        num_samples = len(self._starts) - 1
        if ordinal >= num_samples:
            cause = "truncated_shard" if self._truncated else "missing_sample"
            raise SampleError(cause, f"{self._path} holds {num_samples} samples, sample {ordinal} was asked for")
        return self._starts.item(ordinal), self._starts.item(ordinal + 1)

    def read(self, ordinal: int, start: int, span: memoryview) -> Sample:
        """The sample at `start`, by way of `span`: memory of its size that was used before, since fresh memory costs most."""
        try:
            # not mapped: what is cut off since would end the process
            num_read = os.preadv(self._file, [span], start)
        except OSError as error:
            raise SampleError("unreadable_shard", f"{self._path}: {error.strerror}") from error
        if num_read < len(span):
            raise SampleError("truncated_shard", f"{self._path} ends within sample {ordinal}")
        key, members = "", {}
        try:
            for name, offset, size, _ in walk(span):
                key, extension = split_name(name)
                members[extension] = span[offset : offset + size].tobytes()
        except TarDamage as error:
            raise SampleError("corrupt_shard", f"{self._path}, sample {ordinal}: {error}; was it changed since?") from None
        return Sample(key, members)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)
