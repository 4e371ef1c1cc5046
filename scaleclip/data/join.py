"""A release of texts (Parquet, JSON lines) joined by key to the samples of shards, as a sidecar; no shard is rewritten.

The release may be far larger than memory. The keys of all samples are hashed and sorted in memory; the tables are scanned once,
and the rows that belong to samples are spilled to disk as runs sorted by sample; the runs are then merged, a shard at a time.
Where the keys do not fit, the scan is repeated for one range of hashes after another: 13 million samples a scan and GiB of
memory. The matched texts are written twice over, and 8 bytes a sample.

Hashes have 64 bits: a billion samples and a billion rows that belong to none of them make 0.05 wrong pairs on average.
"""

import hashlib
import json
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scaleclip.data.manifest import Manifest
from scaleclip.data.sample import SampleError
from scaleclip.data.shards import expand_shards
from scaleclip.data.sidecar import sidecar_path, write_rows
from scaleclip.data.source import Reader
from scaleclip.data.texts import Find, json_text, parse_location
from scaleclip.errors import ConfigError, RunError

Hashes = NDArray[np.uint64]
Ints = NDArray[np.int64]

_NO_KEY = np.uint64(0)
_BATCH_ROWS = 65_536
_HASHES_AT_ONCE = 2**24
# a hash, a sample's number, an order to sort them by, and the sorted copies of the two
_BYTES_A_KEY = 40
# rows as they came, as one table, and sorted
_COPIES_OF_A_RUN = 3
_FIRST_LINES = 1000


class ScannedTable(NamedTuple):
    """A file of the release has been gone through; if the keys take several scans, in each of them for a part of its rows."""

    table: str
    rows: int
    unmatched: int
    """Rows whose key no sample has."""


class JoinedShard(NamedTuple):
    """The texts of a shard have been written."""

    shard: str
    """As the manifest names it."""
    samples: int
    """All that it holds."""
    matched: int
    """Samples that got a row."""
    duplicates: int
    """Rows left out because an earlier one has the same key."""
    error: str
    """Why its keys could not be read, or empty; nothing is written then."""


def write_sidecar(
    manifest: Manifest,
    reader: Reader,
    tables: Sequence[str],
    folder: Path,
    *,
    key_column: str,
    columns: Sequence[str],
    sample_key: str = "key",
    memory_gib: float = 8.0,
) -> Iterator[ScannedTable | JoinedShard]:
    """Write a sidecar; yields what was done, the files of the release first, then the shards in manifest order.

    Of several rows with one key the first counts, in the order of `tables` and of their rows. All samples of one key get it.

    Args:
        manifest: the shards; of a subset, too, all samples of a shard are joined.
        reader: reads them.
        tables: files of the release: `.parquet`, `.jsonl`, also compressed (`.jsonl.gz`); globs, brace ranges, URLs.
        folder: of the sidecar.
        key_column: column with the keys, compared to the letter.
        columns: those to keep, by name; strings or numbers.
        sample_key: `key` for the sample's own, which in a tar begins with the folder, or a field of its metadata (`uid`): a
            column of img2dataset's Parquet file beside the tar where there is one, else a field of its JSON, which is read
            from every sample.
        memory_gib: memory to use, beside what one shard takes.

    Raises:
        ConfigError: there is no table, or one of another format or without one of the columns.
        RunError: a table is damaged.
    """
    files = expand_shards("tables", tables)
    for file in files:
        _check_columns(file, [key_column, *columns])
    folder.mkdir(parents=True, exist_ok=True)
    budget = memory_gib * 2**30 / 2
    with tempfile.TemporaryDirectory(prefix=".join-", dir=folder) as name:
        hashes = Path(name) / "hashes"
        counts, errors = _write_hashes(hashes, manifest, reader, sample_key)
        runs = _Runs(Path(name), columns, budget / _COPIES_OF_A_RUN)
        num_scans = max(1, -int(-sum(counts) * _BYTES_A_KEY // budget))
        for scan in range(num_scans):
            keys = _load_keys(hashes, scan, num_scans)
            for file in files:
                yield _scan(file, key_column, columns, keys, runs)
        runs.flush()
        first = 0
        for number, (shard, count) in enumerate(zip(manifest.names, counts, strict=True)):
            if shard in errors:
                yield JoinedShard(shard, 0, 0, 0, errors[shard])
                continue
            rows, matched, duplicates = runs.rows(first, count)
            write_rows(sidecar_path(folder, shard), reader.keys(number), rows)
            yield JoinedShard(shard, count, matched, duplicates, "")
            first += count


class _Keys(NamedTuple):
    """Samples by the hash of their key, for the hashes of one scan."""

    hashes: Hashes
    """Sorted."""
    numbers: Ints
    """Of the samples, as they lie one after the other in the shards."""
    scan: int
    num_scans: int


class _Runs:
    """Rows of the release by their sample's number, in runs on disk, each sorted."""

    def __init__(self, folder: Path, columns: Sequence[str], most_bytes: float) -> None:
        self._folder, self._most_bytes = folder, most_bytes
        self._schema = pa.schema([("", pa.int64()), *((column, pa.large_string()) for column in columns)])
        self._held: list[pa.RecordBatch] = []
        self._held_bytes = 0
        nothing = self._schema.empty_table()
        self._runs: list[tuple[Ints, pa.Table]] = [(np.zeros(0, np.int64), nothing.remove_column(0))]

    def add(self, numbers: Ints, texts: Sequence[pa.Array]) -> None:
        """Keep the texts of some samples; of two with the same number, the one that was added first counts."""
        if not len(numbers):
            return
        batch = pa.RecordBatch.from_arrays([pa.array(numbers), *texts], schema=self._schema)
        self._held.append(batch)
        self._held_bytes += batch.nbytes
        if self._held_bytes > self._most_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is held as a run."""
        if not self._held:
            return
        table = pa.Table.from_batches(self._held, self._schema).combine_chunks()
        self._held, self._held_bytes = [], 0
        order = np.argsort(table.column(0).to_numpy(), kind="stable")
        path = str(self._folder / f"run-{len(self._runs)}")
        with pa.ipc.new_file(path, self._schema) as file:
            file.write_table(table.take(order).combine_chunks())
        with pa.memory_map(path) as mapped:
            table = pa.ipc.open_file(mapped.read_buffer()).read_all()
        # a chunk's numbers are not copied from the mapping
        self._runs.append((table.column(0).chunk(0).to_numpy(), table.remove_column(0)))

    def rows(self, first: int, count: int) -> tuple[pa.RecordBatch, int, int]:
        """A row for each of `count` samples from number `first`; how many have texts, and how many rows were left out."""
        numbers, tables = [], []
        for of_run, texts in self._runs:
            start, stop = np.searchsorted(of_run, [first, first + count])
            numbers.append(of_run[start:stop])
            tables.append(texts.slice(start, stop - start))
        found = np.concatenate(numbers)
        # runs follow the tables' order and are sorted stably, so the first of equal numbers is the release's first row
        matched, where = np.unique(found, return_index=True)
        row_of_sample, missing = np.zeros(count, np.int64), np.ones(count, bool)
        row_of_sample[matched - first], missing[matched - first] = where, False
        texts = pa.concat_tables(tables).combine_chunks().take(pa.array(row_of_sample, mask=missing))
        columns = [column.combine_chunks() for column in texts.columns]
        return pa.RecordBatch.from_arrays(columns, names=texts.column_names), len(matched), len(found) - len(matched)


def _write_hashes(path: Path, manifest: Manifest, reader: Reader, sample_key: str) -> tuple[list[int], dict[str, str]]:
    """Write the hash of every sample's key; gives the number of samples a shard and, by shard, why it could not be read."""
    counts, errors = [], {}
    with path.open("wb") as file:
        for shard, name in enumerate(manifest.names):
            try:
                keys = _sample_keys(shard, manifest.shards[shard], reader, sample_key)
            except SampleError as error:
                keys, errors[name] = [], str(error)
            file.write(_hash(None if key is None else key.encode("utf-8", "surrogatepass") for key in keys).tobytes())
            counts.append(len(keys))
    return counts, errors


def _sample_keys(shard: int, url: str, reader: Reader, sample_key: str) -> Sequence[str | None]:
    keys = reader.keys(shard)
    if sample_key == "key":
        return keys
    system, beside = fsspec.core.url_to_fs(url.removesuffix(".tar") + ".parquet")
    if not system.exists(beside):
        find = parse_location("sample_key", f"json:{sample_key}", {})
        return [_json_key(reader, shard, ordinal, find) for ordinal in range(len(keys))]
    with system.open(beside, "rb") as file:
        names = pq.read_schema(file).names
        if not {"key", sample_key} <= set(names):
            raise ConfigError(f"{beside}: has no key or no {sample_key} among its columns {', '.join(names)}")
        table = pq.read_table(file, columns=["key", sample_key])
    values = dict(zip(table["key"].to_pylist(), table[sample_key].cast(pa.string()).to_pylist(), strict=True))
    return [values.get(key.rpartition("/")[2]) for key in keys]


def _json_key(reader: Reader, shard: int, ordinal: int, find: Find) -> str | None:
    try:
        return find(reader(shard, ordinal), shard, ordinal)
    except SampleError:
        # it goes without a text and is counted as unmatched; training says why
        return None


def _load_keys(path: Path, scan: int, num_scans: int) -> _Keys:
    hashes, numbers = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    first = 0
    with path.open("rb") as file:
        while data := file.read(8 * _HASHES_AT_ONCE):
            piece = np.frombuffer(data, np.uint64)
            here = np.flatnonzero((piece != _NO_KEY) & (_scan_of(piece, num_scans) == scan))
            hashes.append(piece[here])
            numbers.append(here + first)
            first += len(piece)
    unsorted = np.concatenate(hashes)
    order = np.argsort(unsorted, kind="stable")
    return _Keys(unsorted[order], np.concatenate(numbers)[order], scan, num_scans)


def _scan(file: str, key_column: str, columns: Sequence[str], keys: _Keys, runs: _Runs) -> ScannedTable:
    num_rows = num_unmatched = 0
    for key, *texts in _batches(file, [key_column, *columns]):
        hashes = _hash(key.cast(pa.large_binary()).to_pylist())
        mine = np.flatnonzero(_scan_of(hashes, keys.num_scans) == keys.scan)
        # neighbouring look-ups share cache lines
        mine = mine[np.argsort(hashes[mine])]
        start = np.searchsorted(keys.hashes, hashes[mine], "left")
        times = np.searchsorted(keys.hashes, hashes[mine], "right") - start
        num_rows += len(mine)
        num_unmatched += int((times == 0).sum())
        # a row goes to `times` samples, which lie one after the other in keys
        nth = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
        rows, numbers = np.repeat(mine, times), keys.numbers[np.repeat(start, times) + nth]
        in_order = np.argsort(rows, kind="stable")
        taken = pa.array(rows[in_order])
        runs.add(numbers[in_order], [text.take(taken) for text in texts])
    return ScannedTable(file, num_rows, num_unmatched)


def _scan_of(hashes: Hashes, num_scans: int) -> Hashes:
    """Which scan looks for a key."""
    scan: Hashes = (hashes >> np.uint64(32)) * np.uint64(num_scans) >> np.uint64(32)
    return scan


def _hash(keys: Iterable[bytes | None]) -> Hashes:
    """Of each key; `_NO_KEY` for none and for an empty one."""
    digests = (hashlib.blake2b(key, digest_size=8).digest() if key else b"\0" * 8 for key in keys)
    return np.frombuffer(b"".join(digests), np.uint64)


def _is_parquet(file: str) -> bool:
    return file.endswith(".parquet")


def _check_columns(file: str, wanted: Sequence[str]) -> None:
    try:
        if _is_parquet(file):
            with fsspec.open(file, "rb") as opened:
                there = pq.read_schema(opened).names
        else:
            there = list(dict.fromkeys(chain.from_iterable(islice(_json_rows(file), _FIRST_LINES))))
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{file}: cannot be read: {error}") from error
    missing = [name for name in wanted if name not in there]
    if missing:
        raise ConfigError(f"{file}: has no column {', '.join(missing)}; it has {', '.join(there)}")


def _batches(file: str, names: Sequence[str]) -> Iterator[list[pa.Array]]:
    """Columns as strings, some rows at a time."""
    try:
        if _is_parquet(file):
            with fsspec.open(file, "rb") as opened:
                for batch in pq.ParquetFile(opened).iter_batches(_BATCH_ROWS, columns=list(dict.fromkeys(names))):
                    yield [_strings(file, name, batch.column(name)) for name in names]
        else:
            rows = _json_rows(file)
            while some := list(islice(rows, _BATCH_ROWS)):
                yield [pa.array([_json_cell(file, name, row) for row in some], pa.large_string()) for name in names]
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{file}: cannot be read: {error}") from error


def _strings(file: str, name: str, column: pa.Array) -> pa.Array:
    try:
        return column.cast(pa.large_string())
    except pa.ArrowException as error:
        raise ConfigError(f"{file}: column {name} ({column.type}) holds no strings: {error}") from None


def _json_rows(file: str) -> Iterator[dict[str, Any]]:
    if not any(ending in file for ending in (".jsonl", ".json", ".ndjson")):
        raise ConfigError(f"{file}: is neither .parquet nor .jsonl: convert it to one of the two")
    try:
        with fsspec.open(file, "rb", compression="infer") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.isspace():
                    yield _json_row(file, number, line)
    except (EOFError, zlib.error) as error:
        raise RunError(f"{file}: is cut off or damaged: {error}") from error


def _json_row(file: str, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}, line {number}: is no JSON: {error}") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{file}, line {number}: is a {type(row).__name__}, not an object")
    return row


def _json_cell(file: str, name: str, row: dict[str, Any]) -> str | None:
    try:
        return json_text(row.get(name))
    except SampleError as error:
        raise ConfigError(f"{file}: column {name}: {error.detail}") from None
