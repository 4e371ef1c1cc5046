"""The folder of features: a Parquet file a shard, whole or not there, and what all of them share.

OUT/manifest.json says by which model, and once all is done what was counted; OUT/features/NAME.parquet has a row a sample, its
`key` and its unit-length features `image`, `text` or both; OUT/faults/NAME.jsonl the samples that could not be used.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from scaleclip.embedding.chunks import BadSample
from scaleclip.errors import ConfigError
from scaleclip.files import write_atomic
from scaleclip.models.dual_encoder import DualEncoder

MANIFEST, FEATURES, FAULTS = "manifest.json", "features", "faults"
_ENDING = ".parquet"
_METADATA = b"scaleclip"  # in a file's schema: faults by cause
DType = Literal["float32", "float16"]


class Summary(NamedTuple):
    """What lies in a folder."""

    shards: int
    samples: int
    """That have features."""
    faults: dict[str, int]
    """Samples that have none, by cause."""


class FeatureFolder:
    """A folder of features.

    Args:
        path: of the folder.
        columns: of features, `image`, `text` or both.
        width: of a feature.
        dtype: of the features on disk.
        identity: what else all features in it share.
    """

    def __init__(self, path: Path, columns: Sequence[str], width: int, dtype: DType, identity: Mapping[str, Any]) -> None:
        self.path, self.columns, self.width, self._dtype = path, columns, width, dtype
        self._identity = {"columns": list(columns), "width": width, "dtype": dtype, **identity}

    def begin(self, made_of: str) -> None:
        """Make the folder, or see that its features are of the same identity. Once, before anything is written.

        Args:
            made_of: what the user calls the model; another name for the same one is none the worse.

        Raises:
            ConfigError: it has features of another identity, or other files.
        """
        manifest = self.path / MANIFEST
        if manifest.exists():
            before = json.loads(manifest.read_text())
            differing = [key for key, value in self._identity.items() if before.get(key) != value]
            if differing:
                rows = "\n".join(f"  {key}: {before.get(key)!r} there, {self._identity[key]!r} now" for key in differing)
                raise ConfigError(f"--out={self.path} has other features:\n{rows}\ngive another folder")
        elif self.path.exists() and any(self.path.iterdir()):
            raise ConfigError(f"--out={self.path} holds files that are no features: give a new folder")
        for folder in (FEATURES, FAULTS):
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        self._write_manifest({"reference": made_of, "complete": False})

    def finished(self) -> set[str]:
        """Names of the shards that are there."""
        files = (self.path / FEATURES).glob(f"*{_ENDING}")
        return {file.name.removesuffix(_ENDING) for file in files if not file.name.startswith(".")}

    def write(self, name: str, keys: Sequence[str], features: Mapping[str, Tensor], bad: Sequence[BadSample]) -> None:
        """Write a shard.

        Args:
            name: of the shard.
            keys: [N].
            features: fp32 [N, E] by column.
            bad: samples that have none.
        """
        faults = self.path / FAULTS / f"{name}.jsonl"
        # first: a shard with a file of features is done
        if bad:
            write_atomic(faults, "".join(json.dumps(each._asdict()) + "\n" for each in bad))
        else:
            faults.unlink(missing_ok=True)
        columns = {"key": pa.array([key.encode(errors="replace").decode() for key in keys], pa.string())}
        for column, values_NE in features.items():
            values = pa.array(values_NE.numpy().astype(self._dtype).reshape(-1))
            columns[column] = pa.FixedSizeListArray.from_arrays(values, values_NE.shape[1])
        counts = json.dumps(Counter(each.cause for each in bad), sort_keys=True)
        buffer = pa.BufferOutputStream()
        pq.write_table(
            pa.table(columns).replace_schema_metadata({_METADATA: counts}), buffer, compression="zstd", use_dictionary=False
        )
        write_atomic(self.path / FEATURES / f"{name}{_ENDING}", buffer.getvalue().to_pybytes())

    def summary(self, names: Sequence[str]) -> Summary:
        """Of shards that are there."""
        samples, faults = 0, Counter[str]()
        for name in names:
            file = pq.read_metadata(self.path / FEATURES / f"{name}{_ENDING}")
            samples += file.num_rows
            faults.update(json.loads(file.metadata[_METADATA]))
        return Summary(len(names), samples, dict(sorted(faults.items())))

    def complete(self, made_of: str, summary: Summary) -> None:
        """All shards are there, and nobody writes any more."""
        for cut_short in (self.path / FEATURES).glob(".*"):
            cut_short.unlink()
        self._write_manifest({"reference": made_of, "complete": True, **summary._asdict()})

    def _write_manifest(self, more: Mapping[str, Any]) -> None:
        write_atomic(self.path / MANIFEST, json.dumps({**self._identity, **more}, indent=2))


def file_names(shards: Sequence[str]) -> list[str]:
    """Names of shards' files, without ending. Raises ConfigError where two shards would share one."""
    names = [(shard.rpartition(".")[0] or shard).replace("/", "_") for shard in shards]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(f"--data names two shards called {twice[0]}: write their features into two folders")
    return names


def weights_digest(model: DualEncoder) -> str:
    """A digest of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
