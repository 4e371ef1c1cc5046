"""What tells whether data of an evaluation are those that were measured: names, sizes and times of files, not their bytes."""

import hashlib
import os
from collections.abc import Iterable, Sequence

from scaleclip.data.cache import ShardCache
from scaleclip.data.shards import is_remote


def digest(rows: Iterable[Sequence[object]]) -> str:
    """Of rows of plain values, in their order."""
    found = hashlib.sha256()
    for row in rows:
        found.update(repr(tuple(row)).encode("utf-8", "surrogateescape"))
    return found.hexdigest()[:16]


def stamp(file: str | os.PathLike[str]) -> tuple[int, int]:
    """Size and time of a local file. Raises OSError where it is not there."""
    stat = os.stat(file)
    return stat.st_size, stat.st_mtime_ns


def shard_stamp(shard: str, cache: ShardCache) -> tuple[str, int, int]:
    """Name and size of a shard, and the time of a local one: a copy that is fetched again has another."""
    size, time_ns = stamp(cache.path(shard))
    return os.path.basename(shard), size, 0 if is_remote(shard) else time_ns
