"""The folder of features: a Parquet file a shard, whole or not there, and what all of them share.

OUT/manifest.json says by which model, and once all is done what was counted; OUT/features/NAME.parquet has a row a sample, its
`key` and its unit-length features `image`, `text` or both; OUT/faults/NAME.jsonl the samples that could not be used.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from torch import Tensor

from scaleclip.config import ModelConfig
from scaleclip.data.read_ahead import BadSample
from scaleclip.files import write_atomic
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.models.tensor_digest import tensor_digest
from scaleclip.shard_folder import ShardFolder, ShardOrigin, parquet_key

FEATURES, FAULTS = "features", "faults"
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
        made_of: what the user calls the model; another name for the same one is none the worse.
    """

    def __init__(
        self, path: Path, columns: Sequence[str], width: int, dtype: DType, identity: Mapping[str, Any], made_of: str
    ) -> None:
        self.path, self.columns, self.width, self._dtype = path, columns, width, dtype
        identity = {"columns": list(columns), "width": width, "dtype": dtype, **identity}
        self._folder = ShardFolder(path, FEATURES, [FAULTS], "features", identity)
        self._more = {"reference": made_of}

    def begin(self, origins: Mapping[str, ShardOrigin]) -> set[str]:
        """Make the folder, or see that its features are of the same identity and shards. Once, before anything is written.

        Returns:
            Names of the shards that are there.

        Raises:
            ConfigError: it has features of another identity or of other shards, or other files.
        """
        return self._folder.begin(origins, self._more)

    def finished(self) -> set[str]:
        """Names of the shards that are there."""
        return self._folder.finished()

    def write(
        self, name: str, keys: Sequence[str], features: Mapping[str, Tensor], bad: Sequence[BadSample], origin: ShardOrigin
    ) -> None:
        """Write a shard.

        Args:
            name: of the shard.
            keys: [N].
            features: fp32 [N, E] by column.
            bad: samples that have none.
            origin: which shard it is.
        """
        faults = self.path / FAULTS / f"{name}.jsonl"
        # first: a shard with a file of features is done
        if bad:
            write_atomic(faults, "".join(json.dumps(each._asdict()) + "\n" for each in bad))
        else:
            faults.unlink(missing_ok=True)
        columns = {"key": pa.array([parquet_key(key) for key in keys], pa.string())}
        for column, values_NE in features.items():
            values = pa.array(values_NE.numpy().astype(self._dtype).reshape(-1))
            columns[column] = pa.FixedSizeListArray.from_arrays(values, values_NE.shape[1])
        self._folder.write(name, pa.table(columns), origin, {"faults": Counter(each.cause for each in bad)})

    def summary(self) -> Summary:
        """Of the shards that are there."""
        found = self._folder.notes(sorted(self.finished()))
        samples, faults = 0, Counter[str]()
        for rows, notes in found:
            samples += rows
            faults.update(notes["faults"])
        return Summary(len(found), samples, dict(sorted(faults.items())))

    def complete(self, names: Collection[str], summary: Summary) -> None:
        """These shards are there, and nobody writes them any more."""
        self._folder.complete(names, {**self._more, **summary._asdict()})


def weights_digest(model: DualEncoder) -> str:
    """A digest of all parameters and buffers."""
    return tensor_digest(sorted(model.state_dict().items()))


def architecture_digest(config: ModelConfig) -> str:
    """A digest of what weights do not say, such as activations; wherever the tokenizer lies."""
    text = config.text.model_copy(update={"tokenizer": ""})
    plain = config.without_pretrained().model_copy(update={"text": text.model_copy(update={"pretrained": None})})
    return hashlib.sha256(plain.model_dump_json().encode()).hexdigest()[:16]
