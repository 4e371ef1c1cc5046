"""The manifest: which shards a source has and how many samples lie in each. The order of samples needs nothing else.

`scaleclip data index` writes one as a folder: `manifest.parquet` with a row a shard, `index/` with where each sample lies, and
for a subset (`scaleclip data subset`) `kept-DIGEST.npy` with the ordinals of the samples that it keeps.
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scaleclip.data.cache import ShardCache
from scaleclip.data.index import index_tar, load_index
from scaleclip.data.sample import SampleError
from scaleclip.data.shards import MDS_INDEX, file_name, is_remote, read_remote
from scaleclip.data.webdataset import index_path
from scaleclip.errors import ConfigError
from scaleclip.files import resolve_path, write_atomic

_TABLE, INDEXES = "manifest.parquet", "index"
_NUM_READERS = 32
_KEPT_DIGEST = b"kept"


@dataclass(frozen=True)
class Manifest:
    """Shards and their sample counts, in the order that makes a shard's number."""

    shards: Sequence[str]
    """Path or URL of each."""
    names: Sequence[str]
    """What each is called wherever it lies: a tar's file name, an MDS shard's as its index has it."""
    counts: NDArray[np.int64]
    """[shards] samples of each; of a subset, those kept."""
    folder: Path | None = None
    """Where the manifest lies, with the indexes of its tars."""
    first_kept: NDArray[np.int64] | None = None
    """[shards] of a subset: where each shard's ordinals begin among those kept."""
    kept_digest: str = ""
    """Of a subset: digest of the ordinals."""

    @cached_property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return int(self.counts.sum())

    @cached_property
    def fingerprint(self) -> str:
        """Digest of shard names, counts and a subset's ordinals: equal ones give the same samples, wherever the shards lie."""
        rows = "\n".join(f"{name}\t{count}" for name, count in zip(self.names, self.counts.tolist(), strict=True))
        return hashlib.sha256((rows + self.kept_digest).encode()).hexdigest()[:16]

    @cached_property
    def first_sample(self) -> NDArray[np.int64]:
        """int64 [shards]: number of each shard's first sample when all are counted through in manifest order."""
        return np.cumsum(self.counts) - self.counts

    def ordinal(self, shard: int, index: int) -> int:
        """Where sample `index` of those that the manifest counts in a shard stands among all that the shard holds."""
        return index if self.first_kept is None else int(self._kept[self.first_kept[shard] + index])

    @cached_property
    def _kept(self) -> NDArray[np.uint32]:
        assert self.folder is not None
        # mapped: a node's processes share what they touch of it
        kept: NDArray[np.uint32] = np.load(_kept_file(self.folder, self.kept_digest), mmap_mode="r")
        return kept


class Counted(NamedTuple):
    """What indexing found in a shard."""

    shard: str
    samples: int
    truncated: bool
    """Its end is missing; only its whole samples are counted."""
    duplicate_keys: int
    """Samples whose key another sample of the shard has, too."""
    error: str
    """Why it could not be read at all, or empty."""

    def warnings(self) -> list[str]:
        """What a user should know."""
        said = []
        if self.error:
            said.append(f"cannot be read: {self.error}")
        if self.truncated and not self.error:
            said.append("is cut off; only its whole samples are counted")
        if self.duplicate_keys:
            said.append(f"{self.duplicate_keys} samples have the key of another")
        return said


def load_manifest(key: str, folder: str, shards: Sequence[str], names: Sequence[str]) -> Manifest:
    """The manifest of shards from its folder.

    Args:
        key: the configuration's key of the source, for errors.
        folder: what `scaleclip data index` or `scaleclip data subset` wrote.
        shards: path or URL of every shard.
        names: of every shard, as in the manifest.

    Raises:
        ConfigError: the folder is no manifest, or lacks a shard.
    """
    path = Path(resolve_path(folder))
    try:
        table = pq.read_table(path / _TABLE)
        samples = table["samples"].to_numpy()
        rows = pc.index_in(pa.array(names, pa.string()), table["shard"])
        if rows.null_count:
            missing = names[pc.index(rows.is_null(), True).as_py()]
            raise ConfigError(f"{key}.manifest={folder}: has no row for {missing}: run `scaleclip data index` again")
        rows = rows.to_numpy().astype(np.int64)
    except OSError as error:
        raise ConfigError(f"{key}.manifest={folder}: cannot be read: {error.strerror or error}") from None
    except (pa.ArrowInvalid, KeyError, ValueError) as error:
        raise ConfigError(f"{key}.manifest={folder}: is no manifest of `scaleclip data index`: {error}") from None
    digest = (table.schema.metadata or {}).get(_KEPT_DIGEST, b"").decode()
    first_kept = (np.cumsum(samples) - samples)[rows] if digest else None
    return Manifest(shards, names, samples[rows].astype(np.int64), path, first_kept, digest)


def stats_counts(key: str, shards: Sequence[str]) -> NDArray[np.int64]:
    """Samples of every tar [shards], as the `*_stats.json` beside it has them (img2dataset).

    Raises:
        ConfigError: a file is missing or has no count.
    """
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        return np.array(list(pool.map(_stats_count, [key] * len(shards), shards)), np.int64)


def write_manifest(shards: Sequence[str], folder: Path, cache: ShardCache, workers: int) -> Iterator[Counted]:
    """Index tars into a manifest's folder, in parallel; shards that are indexed already are not read again.

    Yields what was found, a shard at a time, in the order of `shards`; the manifest is written after the last one. A shard
    that cannot be read counts no samples.

    Raises:
        ConfigError: two shards share a file name.
    """
    names = [file_name(shard) for shard in shards]
    if MDS_INDEX in names:
        raise ConfigError(f"{MDS_INDEX}: an MDS folder needs no manifest, its index counts the samples")
    check_names(names)
    (folder / INDEXES).mkdir(parents=True, exist_ok=True)
    samples = []
    with ProcessPoolExecutor(workers) as pool:
        for counted in pool.map(_index_shard, shards, [folder] * len(shards), [cache] * len(shards), chunksize=1):
            samples.append(counted.samples)
            yield counted
    write_table(folder, names, samples)


def write_table(
    folder: Path, names: Sequence[str], samples: Sequence[int], kept: Sequence[NDArray[np.uint32]] | None = None
) -> None:
    """Write a manifest's table, and of a subset the ordinals kept in each shard."""
    table = pa.table({"shard": list(names), "samples": pa.array(samples, pa.int64())})
    if kept is not None:
        ordinals = np.concatenate([*kept, np.zeros(0, np.uint32)]).astype(np.uint32)
        digest = hashlib.sha256(ordinals.tobytes()).hexdigest()[:16]
        out = io.BytesIO()
        np.save(out, ordinals)
        # another file for other ordinals: runs may have the old ones open
        write_atomic(_kept_file(folder, digest), out.getvalue())
        table = table.replace_schema_metadata({_KEPT_DIGEST: digest})
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    # last, so that a folder with a table is whole
    write_atomic(folder / _TABLE, buffer.getvalue().to_pybytes())


def _kept_file(folder: Path, digest: str) -> Path:
    return folder / f"kept-{digest}.npy"


def check_names(names: Sequence[str]) -> None:
    """Raises ConfigError where two shards share a name."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ConfigError(
                f"two shards are called {name}: a manifest names shards by their file name; rename one, or make them two "
                f"sources"
            )
        seen.add(name)


def _index_shard(shard: str, folder: Path, cache: ShardCache) -> Counted:
    target = index_path(folder / INDEXES, shard)
    try:
        if not _is_current(target, shard):
            write_atomic(target, index_tar(cache.path(shard)).pack())
    except OSError as error:
        return Counted(shard, 0, False, 0, error.strerror or str(error))
    except SampleError as error:
        return Counted(shard, 0, False, 0, str(error))
    index = load_index(target)
    if not index and index.truncated:
        return Counted(shard, 0, True, 0, "there is no whole sample in it: it is no tar, or cut off at once")
    return Counted(shard, len(index), index.truncated, len(index) - len(set(index.keys)), "")


def _is_current(index: Path, shard: str) -> bool:
    """Whether a shard was indexed whole and, where that costs nothing to see, has its size still."""
    if not index.exists():
        return False
    try:
        known = load_index(index)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return False
    return not known.truncated and (is_remote(shard) or known.num_bytes == os.path.getsize(shard))


def _stats_count(key: str, shard: str) -> int:
    stats = shard.removesuffix(".tar") + "_stats.json"
    try:
        text = read_remote(stats) if is_remote(stats) else Path(stats).read_bytes()
        return int(json.loads(text)["successes"])
    # what the file systems behind fsspec raise has no common base
    except Exception as error:
        raise ConfigError(
            f"{key}: the number of samples in {shard} is unknown: {file_name(stats)} beside it (img2dataset) is missing or has "
            f"no `successes` ({type(error).__name__}: {error}); run `scaleclip data index` on the shards and "
            f"give the manifest's folder ({key}.manifest, or --manifest)"
        ) from None
