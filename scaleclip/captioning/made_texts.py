"""Made texts, a shard at a time: those of a captions job (OUT/texts/SHARD.parquet), or of a sidecar (SHARD.arrow)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from scaleclip.captioning.folder import SIDECAR, TEXTS
from scaleclip.data.manifest import Manifest
from scaleclip.data.sidecar import Sidecar, sidecar_path
from scaleclip.errors import ConfigError, RunError
from scaleclip.shard_folder import MANIFEST, ShardFolder, file_names, origins, parquet_key

_COLUMNS = ["key", "source", "text", "reason"]


class MadeText(NamedTuple):
    """A text that was made of a sample."""

    text: str
    """As it was made; empty where there is none."""
    reason: str | None
    """Why it is not fit for training, or None."""


class Origin(NamedTuple):
    """Where texts come from, as far as that is known."""

    task: str = ""
    """`rewrite`, `recaption`, or empty."""
    model: str = ""
    complete: bool | None = None
    """Whether the job has finished; None where nothing tells."""
    sidecar: str = ""
    """Folder that training can read them from, or empty."""
    text: str = ""
    """Where the job read the originals: `txt`, `json:a.b`; empty where it read none."""
    unknown_rows: int = 0
    """Rows whose key no sample has, where that was seen before a shard was opened."""
    repeated_rows: int = 0
    """Rows left out since an earlier one has their key."""
    shared_rows: int = 0
    """Samples that got a row which another sample of their key got as well."""


class ShardTexts(Protocol):
    """Those of one shard."""

    def num_unknown(self, keys: Sequence[str]) -> int:
        """Rows whose key is none of these, which are the shard's."""

    def of(self, ordinal: int, key: str) -> Mapping[str, MadeText]:
        """By source. Raises SampleError where they cannot be had."""


class MadeTexts(Protocol):
    """Those of all shards."""

    @property
    def origin(self) -> Origin:
        """Where they come from."""

    def open(self, shard: int) -> ShardTexts | None:
        """Those of shard `shard`, or None where its file is missing.

        Raises:
            ConfigError: the file is of another shard of the same name, or not of a captions job.
            RunError: the file is damaged.
        """


def job_of(folder: Path) -> Path | None:
    """Folder of the captions job whose texts or sidecar lie in `folder`; None for any other.

    Raises:
        ConfigError: the manifest of the job cannot be read.
    """
    folder = folder.absolute()
    return folder.parent if folder.name in (TEXTS, SIDECAR) and "task" in _read_manifest(folder.parent) else None


def open_made_texts(folder: Path, manifest: Manifest) -> MadeTexts:
    """What lies in a job's folder, or in a sidecar's.

    Args:
        folder: of either.
        manifest: the samples' shards.

    Raises:
        ConfigError: it is neither, or has no file for any of the shards.
    """
    if not folder.is_dir():
        raise ConfigError(f"OUT={folder} is no folder: give that of a captions job or of a sidecar, or tables with --text")
    if (folder / TEXTS).is_dir():
        return _JobTexts(folder, manifest)
    if any(folder.rglob("*.arrow")):
        job = job_of(folder)
        origin = _job_origin(job) if job else Origin()
        return SidecarTexts(folder, manifest.names, origin._replace(sidecar=str(folder.absolute())))
    raise ConfigError(
        f"OUT={folder} holds neither {TEXTS}/*.parquet of a captions job nor the *.arrow of `scaleclip data sidecar`: give "
        f"such a folder, or tables with --text"
    )


class SidecarTexts:
    """The columns of a sidecar; a null is no text.

    Args:
        folder: of the sidecar.
        shards: names of the shards, as in their manifest.
        origin: where the texts come from.

    Raises:
        ConfigError: it has no file for any of the shards.
    """

    def __init__(self, folder: Path, shards: Sequence[str], origin: Origin) -> None:
        self._folder, self._shards, self.origin = folder, shards, origin
        self._sidecar = Sidecar("OUT", str(folder), shards, may_lack=True)

    def open(self, shard: int) -> ShardTexts | None:
        """See MadeTexts."""
        there = sidecar_path(self._folder, self._shards[shard]).exists()
        return _SidecarShard(self._sidecar, shard) if there else None


class _SidecarShard(NamedTuple):
    sidecar: Sidecar
    shard: int

    def num_unknown(self, keys: Sequence[str]) -> int:
        return 0  # a sidecar has a row a sample

    def of(self, ordinal: int, key: str) -> Mapping[str, MadeText]:
        found = {column: self.sidecar.text(self.shard, ordinal, column, key) for column in self.sidecar.columns}
        return {column: MadeText(text, None) for column, text in found.items() if text is not None}


class _JobTexts:
    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = ShardFolder(folder, TEXTS, [], "texts", {})
        self._names = file_names(manifest.names)
        there = sorted(self._folder.finished())
        if not set(self._names) & set(there):
            example = f"there is {self._folder.file(there[0]).name}" if there else "there is none at all"
            raise ConfigError(
                f"OUT={folder} has no texts of these shards: {self._folder.file(self._names[0]).name} and so on are wanted, "
                f"{example}: give --data as the job had it, or wait for its first shard"
            )
        self._origins = origins(manifest, self._names)
        self.origin = _job_origin(folder)

    def open(self, shard: int) -> ShardTexts | None:
        name = self._names[shard]
        path = self._folder.file(name)
        try:
            noted = self._folder.notes([name])[0][1].get("shard", {})
            with pq.ParquetFile(path) as file:
                missing = sorted(set(_COLUMNS) - set(file.schema_arrow.names))
                table = file.read(_COLUMNS)
        except FileNotFoundError:
            return None
        except (OSError, pa.ArrowException) as error:
            raise RunError(f"{path} cannot be read: {error}: delete it, and start its job again") from None
        if missing:
            raise ConfigError(f"{path} has no column {missing[0]!r}: it is not of a captions job; give tables with --text")
        origin = self._origins[name]
        # not by the path: a shard may lie elsewhere by now
        differing = [
            f"{figure}: {noted[figure]:,} there, {now:,} now"
            for figure, now in (("samples", origin.samples), ("num_bytes", origin.num_bytes))
            if now is not None and noted.get(figure) not in (None, now)
        ]
        if differing:
            raise ConfigError(
                f"{path} has texts of another shard of that name, made of {noted['path']}, --data now has {origin.path} "
                f"({'; '.join(differing)}): give --data and --manifest as the job had them"
            )
        found: dict[str, dict[str, MadeText]] = {}
        for key, source, text, reason in zip(*(table[name].to_pylist() for name in _COLUMNS), strict=True):
            # of two samples with one key both have the first's texts
            found.setdefault(key, {}).setdefault(source, MadeText(text or "", reason))
        return _JobShard(found)


class _JobShard(NamedTuple):
    texts: Mapping[str, Mapping[str, MadeText]]

    def num_unknown(self, keys: Sequence[str]) -> int:
        return sum(len(self.texts[key]) for key in self.texts.keys() - set(map(parquet_key, keys)))

    def of(self, ordinal: int, key: str) -> Mapping[str, MadeText]:
        return self.texts.get(parquet_key(key), {})


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        said = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    return said if isinstance(said, dict) else {}


def _job_origin(folder: Path) -> Origin:
    said = _read_manifest(folder)
    return Origin(
        task=str(said.get("task") or ""),
        model=str(said.get("model") or ""),
        complete=bool(said["complete"]) if "complete" in said else None,
        sidecar=str((folder / SIDECAR).absolute()) if (folder / SIDECAR).is_dir() else "",
        text=str(said.get("text") or ""),
    )
