"""Convert tars to MDS and back: a shard for a shard, in parallel, to be started again after any crash.

A shard is written in a work folder, moved to its place, then recorded in `OUT/.conversion`; a recorded one is not written
again, so a conversion that was killed and started again ends with the same bytes. Keys, members and their bytes survive in
both directions, and samples keep their order; a sample's members come in the order of their names.
"""

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from webdataset.writer import TarWriter

from scaleclip.data.cache import ShardCache
from scaleclip.data.index import index_tar
from scaleclip.data.mds import ABSENT, KEY, MdsReader, MdsShard, check_writer_options, read_index, write_shard
from scaleclip.data.sample import Sample, SampleError
from scaleclip.data.shards import MDS_INDEX
from scaleclip.data.source import Reader
from scaleclip.data.tar import split_name
from scaleclip.data.webdataset import TarReader
from scaleclip.errors import ConfigError, RunError
from scaleclip.files import write_atomic

_STATE, _WORK, _OPTIONS = ".conversion", "work", "options"
_OF_A_SAMPLE = ("corrupt_shard", "duplicate_key", "no_tar_name", "reserved_name")
_COMMAND = "scaleclip data convert"


class Converted(NamedTuple):
    """What became of a shard."""

    shard: str
    """Path or URL of the input."""
    samples: int
    """Samples written."""
    bad: Mapping[str, int]
    """Samples that could not be converted, by cause; a tar whose end is missing counts one `truncated_shard`."""
    first_bad: str
    """What was wrong with the first of them, or empty."""
    error: str
    """Why nothing was written, or empty; the next start tries again."""

    def warnings(self) -> list[str]:
        """What a user should know."""
        said = [f"not converted: {self.error}"] if self.error else []
        if self.bad:
            causes = ", ".join(f"{cause}: {count:,}" for cause, count in sorted(self.bad.items()))
            said.append(f"{sum(self.bad.values()):,} samples were left out ({causes}); the first: {self.first_bad}")
        return said


def to_mds(
    shards: Sequence[str],
    out: Path,
    cache: ShardCache,
    *,
    workers: int,
    compression: str | None = None,
    hashes: tuple[str, ...] = (),
) -> Iterator[Converted]:
    """Convert tars to one MDS folder: a column of bytes for each member, and `__key__`.

    A shard whose samples differ in their members has a column `__absent__` as well (data/mds.py); the columns that a sample
    lacks are empty. Shards are called as their tars, or numbered where two tars share a name; `index.json` is written last.

    Args:
        shards: path or URL of every tar.
        out: a new folder, or one in which a conversion of the same options began.
        cache: local copies of remote shards.
        workers: processes; each has a shard's samples in memory up to three times.
        compression: `zstd`, `zstd:7`, `gz` ... or none.
        hashes: algorithms whose digests the index gets (`sha1`, `xxh64` ...).

    Yields:
        What became of each shard, in the order of `shards`.

    Raises:
        ConfigError: an option is unknown, or `out` holds something else.
        RunError: `out` cannot be written.
    """
    check_writer_options(compression, hashes)
    _begin(out, {"to": "mds", "compression": compression, "hashes": sorted(set(hashes))})
    entries = []
    for done in _convert(_tar_to_mds, shards, shards, out, workers, cache, compression, hashes):
        if done.entry:
            entries.append(done.entry)
        yield done.converted
    write_atomic(out / MDS_INDEX, json.dumps({"version": 2, "shards": entries}))


def to_tar(index_files: Sequence[str], out: Path, cache: ShardCache, *, workers: int) -> Iterator[Converted]:
    """Convert the shards of MDS folders to tars of webdataset's layout, with img2dataset's `*_stats.json` beside each.

    A column becomes the file `KEY.COLUMN`. Tars are called as their shards, or numbered where two shards share a name, as
    those that mosaicml-streaming names do. Owner and times in the tars are fixed.

    Args:
        index_files: path or URL of every folder's `index.json`.
        out: a new folder, or one in which a conversion of the same options began.
        cache: local copies of remote and of decompressed shards.
        workers: processes.

    Yields:
        What became of each shard, in the order of the index files.

    Raises:
        ConfigError: an index cannot be used, or `out` holds something else.
        RunError: `out` cannot be written.
    """
    shards = read_index(_COMMAND, index_files)
    _begin(out, {"to": "tar"})
    for done in _convert(_mds_to_tar, shards, [shard.url for shard in shards], out, workers, cache):
        yield done.converted


class _Done(NamedTuple):
    converted: Converted
    entry: dict[str, Any] | None = None
    """Of an MDS shard: its entry for the index."""


@dataclass
class _Left:
    """Samples left out."""

    causes: Counter[str] = field(default_factory=Counter)
    first: str = ""

    def add(self, cause: str, detail: str) -> None:
        self.causes[cause] += 1
        self.first = self.first or detail


class _Written(NamedTuple):
    """What a job leaves in its work folder."""

    samples: int
    left: _Left
    files: dict[str, Path]
    """By the name that each gets in the output's folder, in the order in which they get it."""
    entry: dict[str, Any] | None = None


class _ReadFailed(Exception):
    """A shard that cannot be converted."""


def _begin(out: Path, options: dict[str, Any]) -> None:
    """Make the output's folder, or see that it is that of the same conversion."""
    state = out / _STATE
    path = state / _OPTIONS
    if path.exists():
        before = json.loads(path.read_bytes())
        if before != options:
            raise ConfigError(
                f"{out} holds a conversion with {_said(before)}, this one is with {_said(options)}: give a new folder"
            )
        return
    if out.exists() and set(os.listdir(out)) - {_STATE}:
        raise ConfigError(f"{out} holds files that no conversion wrote: give a new folder")
    state.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(options))


def _convert(
    job: Callable[..., _Written], inputs: Sequence[Any], urls: Sequence[str], out: Path, workers: int, *arguments: Any
) -> Iterator[_Done]:
    """Do a job for each input, which the earlier starts' records may spare; `out` holds nothing but results at the end."""
    stems = [PurePosixPath(url).name.partition(".")[0] for url in urls]
    names = stems if len(set(stems)) == len(stems) else [f"{number:05d}" for number in range(len(urls))]
    with ProcessPoolExecutor(workers) as pool:
        try:
            yield from pool.map(_recorded, repeat(job), inputs, urls, names, repeat(out), repeat(arguments))
        except OSError as error:
            raise RunError(
                f"{out} cannot be written: {error}; what is converted is safe: start the same command again"
            ) from error
        except BrokenProcessPool as error:
            raise RunError(
                "a process of the conversion died: look for an out-of-memory kill in dmesg, or take fewer workers; what is "
                "converted is safe: start the same command again"
            ) from error
    shutil.rmtree(out / _STATE / _WORK, ignore_errors=True)


def _recorded(job: Callable[..., _Written], shard: Any, url: str, name: str, out: Path, arguments: tuple[Any, ...]) -> _Done:
    record, input_bytes = out / _STATE / f"{name}.json", _size(Path(url))
    if record.exists():
        said = json.loads(record.read_bytes())
        if said["shard"] != url:
            raise ConfigError(f"{out} holds {name} made from {said['shard']}, this one is {url}: give a new folder")
        # a tar that was cut off may be whole by now; one that is gone has done its service
        is_same = input_bytes in (None, said["input_bytes"])
        if is_same and all(_size(out / file) == size for file, size in said["files"].items()):
            return _Done(Converted(url, said["samples"], said["bad"], said["first_bad"], ""), said["entry"])
    (out / _STATE / _WORK).mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=out / _STATE / _WORK))
    try:
        written = job(shard, name, work, *arguments)
        sizes = {file: _move(path, out / file) for file, path in written.files.items()}
    except _ReadFailed as error:
        return _Done(Converted(url, 0, {}, "", str(error)))
    finally:
        shutil.rmtree(work)
    converted = Converted(url, written.samples, written.left.causes, written.left.first, "")
    said = {**converted._asdict(), "input_bytes": input_bytes, "files": sizes, "entry": written.entry}
    write_atomic(record, json.dumps(said))
    return _Done(converted, written.entry)


def _tar_to_mds(
    url: str, name: str, work: Path, cache: ShardCache, compression: str | None, hashes: tuple[str, ...]
) -> _Written:
    try:
        path = cache.path(url)
        index = index_tar(path)
    except (OSError, SampleError) as error:
        raise _ReadFailed(str(error)) from error
    reader, left = TarReader([url], cache), _Left()
    if index.truncated:
        left.add("truncated_shard", f"{path} is cut off after {len(index)} whole samples")
    # twice over the tar, so that its samples are not in memory beside what the writer keeps of them
    member_sets = {frozenset(sample.members) for sample in _samples(reader, len(index), _check_columns, left)}
    if not member_sets:
        return _Written(0, left, {})
    try:
        written, entry = write_shard(
            _samples(reader, len(index), _check_columns, _Left()),
            frozenset().union(*member_sets),
            len(member_sets) > 1,
            work / "mds",
            name,
            compression=compression,
            hashes=hashes,
        )
    except ValueError as error:
        raise _ReadFailed(str(error)) from error
    file = (entry["zip_data"] or entry["raw_data"])["basename"]
    return _Written(entry["samples"], left, {file: written}, entry)


def _mds_to_tar(shard: MdsShard, name: str, work: Path, cache: ShardCache) -> _Written:
    reader, left, num_samples = MdsReader([shard], cache), _Left(), 0
    try:
        reader.fetch(0)
    except SampleError as error:
        raise _ReadFailed(str(error)) from error
    tar, stats = work / "tar", work / "stats"
    with tar.open("wb") as file, TarWriter(file, encoder=False, keep_meta=True, mtime=0) as writer:
        for sample in _samples(reader, shard.samples, _TarNames(), left):
            writer.write({KEY: sample.key, **sample.members})
            num_samples += 1
    stats.write_text(json.dumps({"count": shard.samples, "successes": num_samples, "status_dict": dict(left.causes)}))
    return _Written(num_samples, left, {f"{name}.tar": tar, f"{name}_stats.json": stats})


def _samples(reader: Reader, count: int, check: Callable[[Sample], None], left: _Left) -> Iterator[Sample]:
    """The samples of shard 0 that can be read and that `check` does not raise SampleError for."""
    for ordinal in range(count):
        try:
            sample = reader(0, ordinal)
            check(sample)
        except SampleError as error:
            if error.cause not in _OF_A_SAMPLE:
                # it may be gone at the next start
                raise _ReadFailed(str(error)) from error
            left.add(error.cause, error.detail)
        else:
            yield sample


def _check_columns(sample: Sample) -> None:
    taken = sample.members.keys() & {KEY, ABSENT}
    if taken:
        raise SampleError(
            "reserved_name", f"{sample.key} has a file {', '.join(taken)}, which MDS columns of another meaning have"
        )


class _TarNames:
    """Checks that a sample read from the tar will be the one that was written."""

    def __init__(self) -> None:
        self._key, self._members = "", set[str]()

    def __call__(self, sample: Sample) -> None:
        key, members = sample.key, {name.lower() for name in sample.members}
        kept = all(name and split_name(f"{key}.{name}") == (key, name) for name in members)
        if not kept or not members or len(members) < len(sample.members) or "\0" in key:
            named = f"key {key!r} and members {', '.join(sample.members)}"
            raise SampleError("no_tar_name", f"{named} are no file names KEY.MEMBER with the first dot between them")
        if key == self._key and min(sample.members).lower() not in self._members:
            raise SampleError("duplicate_key", f"two samples in a row have the key {key}, and a tar would make one of them")
        self._key, self._members = key, members


def _move(path: Path, target: Path) -> int:
    """Give a finished file its name; its size."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(path, target)
    return target.stat().st_size


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def _said(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())
