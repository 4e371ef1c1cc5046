"""Random access to samples in tars of webdataset's layout, as img2dataset writes them (.jpg/.png/.webp, .txt, .json)."""

import io
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

from scaleclip.data.cache import ShardCache
from scaleclip.data.index import index_tar, load_blocks, load_index
from scaleclip.data.open_shards import OpenShards
from scaleclip.data.sample import Sample, SampleError
from scaleclip.data.shards import file_name
from scaleclip.data.tar import BLOCK, TarDamage, split_name, walk

_INDEX = "tar-index"


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
        self.open = OpenShards(shards, cache, self._open_shard)
        self._buffer = memoryview(bytearray(1 << 20))

    def fetch(self, shard: int) -> None:
        """Have the shard and its index at hand. Raises SampleError when it cannot be had."""
        self.open(shard)

    def __call__(self, shard: int, ordinal: int) -> Sample:
        """Raises SampleError when the sample cannot be had."""
        return self.open.read(shard, lambda opened: self._read(opened, ordinal))

    def keys(self, shard: int) -> Sequence[str]:
        """Of all its samples. Raises SampleError when the shard cannot be had."""
        stored = self._stored_index(shard)
        # a remote shard with an index need not be fetched
        return load_index(stored or self._made_index(self._cache.path(self._shards[shard]))).keys

    def whole_count(self, shard: int) -> int:
        """Samples of a shard. Raises SampleError when it cannot be had or is cut off."""
        opened = self.open(shard)
        if opened.truncated:
            raise SampleError("truncated_shard", f"{self._shards[shard]} is cut off: fetch or write it again")
        return opened.num_samples

    def _read(self, opened: "_Shard", ordinal: int) -> Sample:
        start, stop = opened.span(ordinal)
        if stop - start > len(self._buffer):
            self._buffer = memoryview(bytearray(stop - start))
        return opened.read(ordinal, start, self._buffer[: stop - start])

    def _open_shard(self, shard: int) -> "_Shard":
        path = self._cache.path(self._shards[shard])
        stored = self._stored_index(shard)
        try:
            opened = _Shard(path, stored or self._made_index(path))
            if opened.num_bytes > opened.num_bytes_indexed:
                raise SampleError("other_shard", f"{path} is not the tar that was indexed: run `scaleclip data index` on these")
            return opened
        except (EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            if stored:
                named = index_path(self._indexes or Path(), self._shards[shard])
                raise SampleError("bad_index", f"{named}: {error}: delete it and run `scaleclip data index` again") from error
        # a crash of the machine may have left it so
        self._cache.drop_derived(path, _INDEX)
        return _Shard(path, self._made_index(path))

    def _stored_index(self, shard: int) -> io.BytesIO | None:
        try:
            return io.BytesIO(index_path(self._indexes, self._shards[shard]).read_bytes()) if self._indexes else None
        except FileNotFoundError:
            return None

    def _made_index(self, path: str) -> io.BytesIO:
        return io.BytesIO(self._cache.derived(path, _INDEX, lambda path: index_tar(path).pack()))


def index_path(folder: Path, shard: str) -> Path:
    """Where the index file of a shard lies in a manifest's folder of indexes."""
    return folder / f"{file_name(shard)}.npz"


class _Shard:
    def __init__(self, path: str, index: io.BytesIO) -> None:
        self._path = path
        blocks, self.truncated, self.num_bytes_indexed = load_blocks(index)
        self._starts = blocks.astype("int64") * BLOCK
        self.num_samples = len(self._starts) - 1
        self._file = os.open(path, os.O_RDONLY)
        self.num_bytes = os.fstat(self._file).st_size

    def span(self, ordinal: int) -> tuple[int, int]:
        """First and last + 1 byte of a sample. Raises SampleError where there is none."""
        if ordinal >= self.num_samples:
            cause = "truncated_shard" if self.truncated else "missing_sample"
            raise SampleError(cause, f"{self._path} holds {self.num_samples} samples, sample {ordinal} was asked for")
        return self._starts.item(ordinal), self._starts.item(ordinal + 1)

    def read(self, ordinal: int, start: int, span: memoryview) -> Sample:
        """The sample at `start`, by way of `span`: memory of its size that was used before, since fresh memory costs most."""
        # not mapped: what is cut off since, or a fault of the network, would end the process
        if os.preadv(self._file, [span], start) < len(span):
            raise SampleError("truncated_shard", f"{self._path} ends within sample {ordinal}")
        keys, members = set(), {}
        try:
            for name, offset, size, _ in walk(span):
                key, extension = split_name(name)
                keys.add(key)
                members[extension] = span[offset : offset + size].tobytes()
            (key,) = keys
        except (TarDamage, ValueError) as error:
            raise SampleError("corrupt_shard", f"{self._path}, sample {ordinal}: {error}; was it changed since?") from None
        return Sample(key, members)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)
