"""Texts beside the shards: a folder with a file a shard, its rows in the order of the shard's samples.

The files are Arrow's (IPC, uncompressed) and are mapped, so that the processes of a node share the pages that they touch and a
text is read without the rest of its shard. `scaleclip data sidecar` writes them.
"""

import hashlib
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from scaleclip.data.sample import SampleError
from scaleclip.errors import ConfigError
from scaleclip.files import resolve_path, write_atomic

# as many as TarReader keeps
_OPEN_SHARDS = 1024
_KEYS = "__key__"
_MOST_MISSING = 0.1
"""Share of shards without a file that is no error: they are warned of, and their samples counted as faults."""


class Sidecar:
    """Random access to the texts of a sidecar.

    Args:
        key: the configuration's key of the sidecar, for errors.
        folder: where it lies.
        shards: name of every shard, as in the manifest; its number is its place here.
        may_lack: whether shards without a file are as good as others; without any there is nothing to read.

    Raises:
        ConfigError: no shard has a file in the folder, more than _MOST_MISSING have none and may not lack theirs, or the first
            one cannot be read.
    """

    def __init__(self, key: str, folder: str, shards: Sequence[str], *, may_lack: bool = False) -> None:
        self._folder, self._shards = Path(resolve_path(folder)), shards
        # one list of the folder: a look at each of 100,000 files takes long on a network's disk
        files = {Path(at, name) for at, _, names in os.walk(self._folder, followlinks=True) for name in names}
        there = [shard for shard in range(len(shards)) if self._path(shard) in files]
        self.warning = ""
        """What training should say of shards without a file, if anything."""
        if not there or (len(there) < len(shards) and not may_lack):
            self.warning = self._missing(f"{key}={folder}", len(there))
        first = there[0]
        try:
            self.columns = tuple(name for name in self._open_shard(first) if name != _KEYS)
            """Names of the texts, by the first file that is there."""
        except SampleError as error:
            raise ConfigError(f"{key}={folder}: {error.detail}: run `scaleclip data sidecar` again") from None
        self._open = lru_cache(maxsize=_OPEN_SHARDS)(self._open_shard)

    def text(self, shard: int, ordinal: int, column: str, key: str) -> str | None:
        """The text of a sample that has this key, or None where the release has none.

        Raises:
            SampleError: the shard's file is missing, damaged, shorter than the shard or made from another of its name, or the
                text is not UTF-8.
        """
        columns = self._open(shard)
        for name in (column, _KEYS):
            if name not in columns:
                raise SampleError("bad_sidecar", f"{self._path(shard)} has no column {name!r}")
        rows = columns[column]
        if ordinal >= len(rows):
            raise SampleError("short_sidecar", f"{self._path(shard)} has {len(rows)} rows, row {ordinal} was asked for")
        if columns[_KEYS][ordinal].as_py() != _mark(key):
            raise SampleError(
                "wrong_sidecar", f"row {ordinal} of {self._path(shard)} is not of {key}: it was made from other shards"
            )
        try:
            text: str | None = rows[ordinal].as_py()
        except UnicodeDecodeError as error:
            raise SampleError("undecodable_text", f"{self._path(shard)}, row {ordinal} is not UTF-8: {error.reason}") from None
        return text

    def _missing(self, where: str, num_there: int) -> str:
        if not self._folder.is_dir():
            raise ConfigError(
                f"{where}: there is no such folder: give the one that `scaleclip data sidecar` wrote, or OUT/sidecar"
            )
        inside = self._folder / "sidecar"
        if num_there == 0 and inside.is_dir():
            raise ConfigError(f"{where}: is the folder of a captions job: give {inside}")
        found = f"{where}: has files of {num_there:,} of {len(self._shards):,} shards"
        if len(self._shards) - num_there > _MOST_MISSING * len(self._shards):
            raise ConfigError(
                f"{found}: finish what writes them, `scaleclip captions` or `scaleclip data sidecar` on these shards, or give "
                f"only the shards that have theirs"
            )
        return f"{found}; samples of the others are invalid (missing_sidecar)"

    def _path(self, shard: int) -> Path:
        return sidecar_path(self._folder, self._shards[shard])

    def _open_shard(self, shard: int) -> dict[str, pa.Array]:
        path = self._path(shard)
        try:
            with pa.memory_map(str(path)) as file:
                # the buffer keeps the mapping when the file is closed, so that open shards cost no file descriptors
                mapped = file.read_buffer()
            batch = pa.ipc.open_file(mapped).get_batch(0)
        except FileNotFoundError:
            raise SampleError("missing_sidecar", f"there is no {path}") from None
        except (OSError, pa.ArrowException) as error:
            raise SampleError("bad_sidecar", f"{path} cannot be read: {error}") from None
        return dict(zip(batch.schema.names, batch.columns, strict=True))


def _mark(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=4).digest())


def sidecar_path(folder: Path, shard: str) -> Path:
    """Where the texts of a shard, called as in the manifest, lie in a sidecar's folder."""
    return folder / f"{shard}.arrow"


def write_rows(path: Path, keys: Sequence[str], rows: pa.RecordBatch) -> None:
    """Write the file of a shard: a row a sample, a column of strings a text, and 32 bits of the sample's key."""
    rows = rows.append_column(_KEYS, pa.array([_mark(key) for key in keys], pa.uint32()))
    # an MDS shard's name may begin with a folder
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_file(buffer, rows.schema) as file:
        file.write_batch(rows)
    write_atomic(path, buffer.getvalue().to_pybytes())
