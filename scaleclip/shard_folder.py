"""A folder with a Parquet file a shard, each whole or not there, that any number of starts and ranks fills.

OUT/manifest.json says what all files in it share, its identity; a file's metadata says of which shard it is, so that another
data set whose shards have the same names is not taken for one that is done.
"""

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from scaleclip.data.manifest import Manifest
from scaleclip.data.shards import is_remote
from scaleclip.errors import ConfigError
from scaleclip.files import sweep, write_atomic, writes_into

MANIFEST = "manifest.json"
_ENDING = ".parquet"
_METADATA = b"scaleclip"  # in a file's schema
_SHARD = "shard"
_NUM_READERS = 32
_ABANDONED_S = 3600.0  # after which nobody still writes a manifest


class ShardOrigin(NamedTuple):
    """Which shard a file is of."""

    path: str
    """As it was named, a local one absolute."""
    samples: int
    """That the manifest counts in it."""
    kept: str
    """Digest of a subset's choice, or empty."""
    num_bytes: int | None
    """None where it is remote, or stored compressed."""


class ShardFolder:
    """The folder.

    Args:
        path: of the folder.
        files: name of the folder of Parquet files in it.
        others: further folders in it.
        what: the files hold, in the plural, for errors.
        identity: what all of them share, as JSON has it.
        notes_work: whether what is being made lies in the folder, so that one without is bound by no identity.
    """

    def __init__(
        self,
        path: Path,
        files: str,
        others: Sequence[str],
        what: str,
        identity: Mapping[str, Any],
        *,
        notes_work: bool = False,
    ) -> None:
        self.path, self._others, self._what, self._notes_work = path, others, what, notes_work
        self._files = path / files
        self._identity = json.loads(json.dumps(identity))

    def begin(self, origins: Mapping[str, ShardOrigin], more: Mapping[str, Any]) -> set[str]:
        """Make the folder, or see that what it holds is of the same identity and of these shards.

        Args:
            origins: of all shards, by the name of their file.
            more: goes into the manifest as it is, until all is done.

        Returns:
            Names of the shards that are there.

        Raises:
            ConfigError: it has files of another identity, of other shards of the same name, or something else.
            RunError: it cannot be written.
        """
        manifest = self.path / MANIFEST
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--out={self.path} is a file: give a folder")
        # first: another task may be making the manifest
        has_files = self.path.exists() and any(not path.name.startswith(".") for path in self.path.iterdir())
        if manifest.exists():
            before = json.loads(manifest.read_text())
            differing = [key for key, value in self._identity.items() if before.get(key) != value]
            # a start that made nothing binds nobody
            if differing and (self._has_results() or not self._notes_work):
                rows = "\n".join(f"  {key}: {before.get(key)!r} there, {self._identity[key]!r} now" for key in differing)
                raise ConfigError(f"--out={self.path} has other {self._what}:\n{rows}\ngive another folder")
        elif has_files:
            raise ConfigError(f"--out={self.path} holds files that are no {self._what}: give a new folder")
        there = self.finished() & origins.keys()
        found = {name: notes.get(_SHARD) for name, (_, notes) in zip(there, self.notes(list(there)), strict=True)}
        for name in sorted(there):
            noted = found[name]
            origin = None if noted is None else ShardOrigin(**noted)
            if origin != origins[name]:
                raise ConfigError(
                    f"--out={self.path} has {self._what} of another shard called {name}: made of {_named(origin)}, --data "
                    f"now has {_named(origins[name])}; give another folder, or delete {self.file(name)} to make it anew"
                )
        with writes_into(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            # first, so that a process that starts beside this one knows the folder
            self._write_manifest({**more, "complete": False})
            for folder in (self._files, *(self.path / name for name in self._others)):
                folder.mkdir(exist_ok=True)
        return there

    def _has_results(self) -> bool:
        """Or what results are being made of; the manifest and what else processes say of themselves is JSON."""
        return any(path.is_file() and path.suffix != ".json" for path in self.path.rglob("*"))

    def file(self, name: str) -> Path:
        """Of a shard."""
        return self._files / f"{name}{_ENDING}"

    def finished(self) -> set[str]:
        """Names of the shards that are there."""
        files = self._files.glob(f"*{_ENDING}")
        return {file.name.removesuffix(_ENDING) for file in files if not file.name.startswith(".")}

    def write(self, name: str, table: pa.Table, origin: ShardOrigin, notes: Mapping[str, Any]) -> None:
        """Write a shard's file; `notes` come back from `notes`."""
        metadata = json.dumps({**notes, _SHARD: origin._asdict()}, sort_keys=True)
        buffer = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata({_METADATA: metadata}), buffer, compression="zstd", use_dictionary=False)
        write_atomic(self.file(name), buffer.getvalue().to_pybytes())

    def notes(self, names: Iterable[str]) -> list[tuple[int, dict[str, Any]]]:
        """Rows of shards' files, and what was noted with each."""
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            return list(pool.map(self._notes, names))

    def _notes(self, name: str) -> tuple[int, dict[str, Any]]:
        file = pq.read_metadata(self.file(name))
        return file.num_rows, json.loads((file.metadata or {}).get(_METADATA, b"{}"))

    def complete(self, names: Collection[str], more: Mapping[str, Any], *, is_all: bool = True) -> None:
        """These shards are there, and nobody writes them any more. Another job may write others, whose files are left alone.

        Args:
            names: of the shards.
            more: goes into the manifest as it is.
            is_all: nobody writes others.
        """
        sweep(map(self.file, names))
        for partial in self.path.glob(f".{MANIFEST}.*"):
            with contextlib.suppress(FileNotFoundError):  # another has it in place
                if time.time() - partial.stat().st_mtime > _ABANDONED_S:
                    partial.unlink()
        with writes_into(self.path):
            self._write_manifest({**more, "complete": is_all})

    def _write_manifest(self, more: Mapping[str, Any]) -> None:
        write_atomic(self.path / MANIFEST, json.dumps({**self._identity, **more}, indent=2))


def file_names(shards: Sequence[str]) -> list[str]:
    """Names of shards' files, without ending. Raises ConfigError where two shards would share one."""
    names = [(shard.rpartition(".")[0] or shard).replace("/", "_") for shard in shards]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(f"--data names two shards called {twice[0]}: give them a folder each, in two commands")
    return names


def parquet_key(key: str) -> str:
    """A sample's key as a Parquet file has it: one from a file's name may hold half a surrogate pair, which UTF-8 cannot."""
    return key.encode(errors="replace").decode()


def origins(manifest: Manifest, names: Sequence[str]) -> dict[str, ShardOrigin]:
    """Which shard each file is of, by the name of the file, in the order of the manifest."""
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        sizes = pool.map(_num_bytes, manifest.shards)
        rows = zip(names, manifest.shards, manifest.counts.tolist(), sizes, strict=True)
        return {
            name: ShardOrigin(shard if is_remote(shard) else os.path.abspath(shard), count, manifest.kept_digest, size)
            for name, shard, count, size in rows
        }


def _num_bytes(shard: str) -> int | None:
    try:
        return None if is_remote(shard) else os.path.getsize(shard)
    except OSError:  # MDS that lies there compressed; reading says it if it is not there at all
        return None


def _named(origin: ShardOrigin | None) -> str:
    if origin is None:
        return "nobody noted what"
    size = "" if origin.num_bytes is None else f" and {origin.num_bytes:,} bytes"
    subset = f", subset {origin.kept}" if origin.kept else ""
    return f"{origin.path} ({origin.samples:,} samples{size}{subset})"
