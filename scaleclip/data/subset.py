"""A subset of shards, resolved once into a manifest: by a file of keys (DataComp), by metadata, or without bad samples.

The manifest counts the samples that are kept, so their order is as exact and elastic as that of whole shards.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scaleclip.data.cache import ShardCache
from scaleclip.data.manifest import INDEXES, Manifest, write_table
from scaleclip.data.sample import SampleError
from scaleclip.data.shards import file_name, is_remote
from scaleclip.data.source import Reader, open_shards
from scaleclip.data.tally import read_quarantine
from scaleclip.errors import ConfigError
from scaleclip.files import resolve_path

_KEY = "key"
_DIGEST = "S16"  # 128 bits: of a billion keys no two are alike
_HEX_DIGITS = 32  # of DataComp's uids, which are 128 bits themselves
_MOST_TEXT = 65_536
_METADATA = ".parquet"
# causes that lie with a store, a disk or a network, and may have passed
_PASSING = ("missing_shard", "forbidden_shard", "unreachable_shard", "unreadable_shard", "cache_full", "unwritable_cache")


class Choice(NamedTuple):
    """Which samples are kept: those that pass every test that is given."""

    keep: str | None = None
    """File of keys to keep: `.npy` of DataComp's uids, `.txt` with a key a line, or `.parquet`, `.jsonl`, `.csv` with a column
    called `by`."""
    drop: str | None = None
    """File of keys to leave out, likewise, or a run's `quarantine.jsonl`."""
    by: str = _KEY
    """What of a sample `keep` and `drop` name: its key, or a field of its metadata (`uid`)."""
    where: str | None = None
    """A condition in SQL over a sample's metadata: the row of img2dataset's Parquet file beside the tar where there is one,
    else the fields of its JSON and its texts."""


class Chosen(NamedTuple):
    """What is kept of a shard."""

    shard: str
    samples: int
    """All that the shard holds of the manifest that the subset was made from."""
    kept: NDArray[np.uint32]
    """Ordinals of the samples that are kept."""
    error: str
    """Why the shard could not be read, or empty; none of it is kept then."""

    def warnings(self) -> list[str]:
        """What a user should know."""
        return [f"cannot be read: {self.error}"] if self.error else []


def write_subset(
    patterns: Sequence[str], manifest: str | None, cache: ShardCache, out: Path, choice: Choice, workers: int
) -> Iterator[Chosen]:
    """Write the manifest of a subset; yields a shard at a time, in manifest order. The table is written after the last.

    Args:
        patterns: tars, or the index files of MDS folders.
        manifest: folder of their manifest, which may be a subset itself, or none.
        cache: local copies of remote shards.
        out: folder of the new manifest.
        choice: which samples are kept.
        workers: processes.

    Raises:
        ConfigError: a file of keys is unreadable, a condition is wrong, nothing is kept.
    """
    whole, _ = open_shards("SHARDS", patterns, manifest, cache)
    out.mkdir(parents=True, exist_ok=True)
    if choice.where:
        _check_condition(choice.where)
    kept, fault = [], ""
    with tempfile.TemporaryDirectory() as scratch:
        files = [_write_digests(path, choice.by, Path(scratch)) for path in (choice.keep, choice.drop)]
        open_job = partial(_open, patterns, manifest, cache, choice, files, _quarantined(choice.drop, whole))
        with ProcessPoolExecutor(workers, initializer=open_job) as pool:
            for shard, chosen in enumerate(pool.map(_choose, range(len(whole.shards)))):
                kept.append(chosen.kept)
                fault = fault or chosen.error
                yield Chosen(whole.shards[shard], *chosen)
    if not any(len(each) for each in kept):
        if not fault and choice.by == _KEY and (choice.keep or "").endswith(".npy"):
            fault = "uids are a field of the metadata: say --by uid"
        said = f" ({fault})" if fault else ""
        raise ConfigError(f"nothing is kept: no sample of {', '.join(patterns)} passes {_said(choice)}{said}")
    if whole.folder and (whole.folder / INDEXES).exists() and not (out / INDEXES).exists():
        (out / INDEXES).symlink_to((whole.folder / INDEXES).resolve())
    write_table(out, whole.names, [len(each) for each in kept], kept)


class _Job(NamedTuple):
    """What a process of the pool knows."""

    manifest: Manifest
    reader: Reader
    choice: Choice
    keep: NDArray[np.bytes_] | None
    drop: NDArray[np.bytes_] | None
    bad: Mapping[str, frozenset[int]]
    """Ordinals of a quarantine's samples, by the shard's name."""


class _Found(NamedTuple):
    samples: int
    kept: NDArray[np.uint32]
    error: str


_job: _Job


def _open(
    patterns: Sequence[str],
    manifest: str | None,
    cache: ShardCache,
    choice: Choice,
    files: Sequence[Path | None],
    bad: Mapping[str, frozenset[int]],
) -> None:
    global _job
    keep, drop = (None if path is None else np.load(path, mmap_mode="r") for path in files)
    _job = _Job(*open_shards("SHARDS", patterns, manifest, cache), choice, keep, drop, bad)


def _choose(shard: int) -> _Found:
    manifest, choice = _job.manifest, _job.choice
    indices = range(int(manifest.counts[shard]))
    bad = _job.bad.get(manifest.names[shard], frozenset())
    ordinals = [ordinal for index in indices if (ordinal := manifest.ordinal(shard, index)) not in bad]
    if not ordinals:
        return _Found(len(indices), np.zeros(0, np.uint32), "")
    try:
        # the manifest may count samples that a cut tar has no more
        num_there = len(_job.reader.keys(shard))
        ordinals = [ordinal for ordinal in ordinals if ordinal < num_there]
        if choice.where or choice.by != _KEY:
            rows = _metadata(shard, ordinals)
            found = _query(f"SELECT * FROM rows WHERE ({choice.where or True}) ORDER BY ordinal", rows=rows)
            if choice.by not in found.column_names:
                fault = f"--by {choice.by}: no sample has such a field; there are {', '.join(rows.column_names)}"
                return _Found(len(indices), np.zeros(0, np.uint32), fault)
            names, kept = found[choice.by].to_pylist(), found["ordinal"].to_numpy()
        else:
            keys = _job.reader.keys(shard)
            names, kept = [keys[ordinal] for ordinal in ordinals], np.array(ordinals, np.int64)
    except SampleError as error:
        return _Found(len(indices), np.zeros(0, np.uint32), str(error))
    except duckdb.Error as error:
        return _Found(len(indices), np.zeros(0, np.uint32), f"--where {choice.where!r}: {error}")
    if _job.keep is not None:
        inside = _contained(names, _job.keep)
        names, kept = [name for name, good in zip(names, inside, strict=True) if good], kept[inside]
    if _job.drop is not None:
        kept = kept[~_contained(names, _job.drop)]
    return _Found(len(indices), kept.astype(np.uint32), "")


def _metadata(shard: int, ordinals: Sequence[int]) -> pa.Table:
    """A row a sample: `ordinal`, `key` and what is known of it."""
    keys = _job.reader.keys(shard)
    samples = pa.table({"ordinal": pa.array(ordinals, pa.int64()), _KEY: [keys[ordinal] for ordinal in ordinals]})
    beside = _job.manifest.shards[shard].removesuffix(".tar") + _METADATA
    system, path = fsspec.core.url_to_fs(beside)
    if system.exists(path):
        with system.open(path, "rb") as file:
            metadata = pq.read_table(file)
        # its keys have no folder in front; a key that comes twice there is one sample here
        return _query(
            "SELECT samples.*, metadata.* EXCLUDE (key) FROM samples LEFT JOIN (SELECT DISTINCT ON (key) * FROM metadata) "
            "metadata ON parse_filename(samples.key) = metadata.key",
            samples=samples,
            metadata=metadata,
        )
    fields = [_fields(shard, ordinal) for ordinal in ordinals]
    names = sorted({name for row in fields for name in row} - set(samples.column_names))
    for name in names:
        samples = samples.append_column(name, _column([row.get(name) for row in fields]))
    return samples


def _column(values: Sequence[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        # of several types: as they are written
        return pa.array([None if value is None else value if isinstance(value, str) else json.dumps(value) for value in values])


def _fields(shard: int, ordinal: int) -> dict[str, Any]:
    """What a sample's JSON says, and its texts by member, images left out; nothing of a sample that cannot be read."""
    try:
        sample = _job.reader(shard, ordinal)
    except SampleError:
        return {}
    fields: dict[str, Any] = {}
    for name, member in sample.members.items():
        try:
            if name == "json":
                fields |= json.loads(member)
            elif len(member) <= _MOST_TEXT:
                fields[name] = member.decode()
        except (ValueError, TypeError):
            continue
    return fields


def _contained(names: Sequence[str], digests: NDArray[np.bytes_]) -> NDArray[np.bool_]:
    wanted = np.array([_digest(name) for name in names], _DIGEST)
    at = np.minimum(np.searchsorted(digests, wanted), max(len(digests) - 1, 0))
    return digests[at] == wanted if len(digests) else np.zeros(len(wanted), bool)


def _write_digests(path: str | None, column: str, folder: Path) -> Path | None:
    """The keys of a file as sorted digests, in a file that the pool's processes share; none for a quarantine."""
    if path is None or _is_quarantine(path):
        return None
    keys = _read_uids(path) if path.endswith(".npy") else np.array([_digest(key) for key in _read_keys(path, column)], _DIGEST)
    keys.sort()
    target = Path(tempfile.mkstemp(dir=folder, suffix=".npy")[1])
    np.save(target, keys)
    return target


def _digest(key: str | None) -> bytes:
    text = str(key)
    if len(text) == _HEX_DIGITS:
        try:
            return bytes.fromhex(text)
        except ValueError:
            pass
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _read_uids(path: str) -> NDArray[np.bytes_]:
    """DataComp's files of subsets: each uid as its two halves, uint64."""
    try:
        uids = np.load(resolve_path(path))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read as DataComp's uids: {error}: write the keys to a .txt, a line each"
        ) from None
    if uids.dtype.kind != "V" or uids.dtype.itemsize != 16:
        raise ConfigError(
            f"{path}: has {uids.dtype}, not DataComp's uids, two uint64 each: write the keys to a .txt, a line each"
        )
    return np.ascontiguousarray(uids.astype(">u8,>u8")).view(_DIGEST).reshape(-1)


def _read_keys(path: str, column: str) -> Iterator[str]:
    try:
        if path.endswith(".txt"):
            with fsspec.open(path if is_remote(path) else resolve_path(path), "rt") as file:
                yield from (line.strip() for line in file if line.strip())
            return
        with duckdb.connect() as connection:
            for batch in connection.sql(f"SELECT \"{column}\" FROM '{resolve_path(path)}'").to_arrow_reader():
                yield from batch.column(0).to_pylist()
    except (OSError, UnicodeDecodeError, duckdb.Error) as error:
        raise ConfigError(
            f"{path}: cannot be read as keys (column {column} of a table, or .txt with a key a line): {error}"
        ) from None


def _is_quarantine(path: str) -> bool:
    return Path(path).name.startswith("quarantine") and path.endswith(".jsonl")


def _quarantined(path: str | None, manifest: Manifest) -> dict[str, frozenset[int]]:
    """Samples of a run's quarantine that are bad themselves, and did not merely fail to come, by the shard's name."""
    if path is None or not _is_quarantine(path):
        return {}
    try:
        rows = [(row["shard"], row["sample"], row["cause"]) for row in read_quarantine(Path(path))]
    except (OSError, KeyError, TypeError) as error:
        raise ConfigError(f"--drop {path}: is no quarantine of a run: {error!r}") from None
    known = set(manifest.names)
    bad: dict[str, set[int]] = {}
    for shard, sample, cause in rows:
        # a name is the end of a path: of a tar its last part, of an MDS shard more
        parts = shard.split("/")
        ends = (file_name(shard), *("/".join(parts[first:]) for first in range(len(parts))))
        name = next((end for end in ends if end in known), None)
        if name is not None and cause not in _PASSING:
            bad.setdefault(name, set()).add(sample)
    if not bad:
        raise ConfigError(f"--drop {path}: none of its {len(rows):,} rows names a bad sample of these shards")
    return {name: frozenset(samples) for name, samples in bad.items()}


def _query(sql: str, **tables: pa.Table) -> pa.Table:
    with duckdb.connect(config={"threads": 1}) as connection:
        for name, table in tables.items():
            connection.register(name, table)
        return connection.sql(sql).to_arrow_table()


def _check_condition(where: str) -> None:
    """A condition that no table could answer is said before any shard is read."""
    try:
        duckdb.extract_statements(f"SELECT 1 FROM rows WHERE ({where})")
    except duckdb.Error as error:
        raise ConfigError(f"--where {where!r}: {error}") from None


def _said(choice: Choice) -> str:
    given = {f"--{name}": value for name, value in choice._asdict().items() if value and name != "by"}
    return " and ".join(f"{name} {value}" for name, value in given.items()) or "an empty choice"
