"""What tells whether data of an evaluation are those that were measured: names, sizes and times of files, not their bytes."""

import hashlib
import os
from collections.abc import Iterable, Sequence

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


def shard_stamp(shard: str) -> tuple[object, ...]:
    """Name, size and time of a local shard; the URL of a remote one, which need not be fetched for it."""
    return (shard,) if is_remote(shard) else (os.path.basename(shard), *stamp(shard))
