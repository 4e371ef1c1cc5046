"""Random access to the rows of JSON lines and Parquet files, of texts above all.

A file is laid out once a node as an Arrow table in the cache, which all processes map: a row then costs microseconds, wherever
it lies, and the processes share its pages.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scaleclip.data.cache import ShardCache
from scaleclip.data.open_shards import OpenShards
from scaleclip.data.sample import Sample, SampleError
from scaleclip.data.shards import stem
from scaleclip.errors import ConfigError

TABLES = (".jsonl", ".jsonl.gz", ".parquet")


class RowReader:
    """Reads a row by its file's number and its own number in the file, its ordinal.

    A sample's members are the row's columns: texts in UTF-8, anything else as JSON; what is null is left out.

    Args:
        files: path or URL of every file.
        cache: local copies of remote files, and the tables.
    """

    def __init__(self, files: Sequence[str], cache: ShardCache) -> None:
        self._files, self._cache = files, cache
        self.open = OpenShards(files, cache, self._open_file)

    def counts(self, key: str) -> NDArray[np.int64]:
        """Rows of every file [files]; `key` is for errors. Raises ConfigError where a file is none."""
        try:
            return np.array([len(self.open(file)) for file in range(len(self._files))], np.int64)
        except SampleError as error:
            raise ConfigError(f"{key}: {error}") from error

    def fetch(self, shard: int) -> None:
        """Have the file at hand. Raises SampleError when it cannot be had."""
        self.open(shard)

    def __call__(self, shard: int, ordinal: int) -> Sample:
        """Raises SampleError when the row cannot be had."""
        table = self.open(shard)
        if ordinal >= len(table):
            raise SampleError("missing_sample", f"{self._files[shard]} holds {len(table)} rows, row {ordinal} was asked for")
        row = {name: table.column(name)[ordinal].as_py() for name in table.column_names}
        return Sample(self._key(shard, ordinal), {name: _encode(value) for name, value in row.items() if value is not None})

    def keys(self, shard: int) -> Sequence[str]:
        """Of all rows. Raises SampleError when the file cannot be had."""
        return [self._key(shard, ordinal) for ordinal in range(len(self.open(shard)))]

    def _key(self, shard: int, ordinal: int) -> str:
        return f"{stem(self._files[shard])}/{ordinal}"

    def _open_file(self, shard: int) -> pa.Table:
        path = self._cache.path(self._files[shard])
        return pa.ipc.open_file(pa.memory_map(self._cache.derived_path(path, "rows", _lay_out))).read_all()


def _lay_out(path: str) -> bytes:
    """A file as an Arrow table, uncompressed, in one batch."""
    try:
        table = pq.read_table(path) if path.endswith(".parquet") else pyarrow.json.read_json(path)
        table = table.combine_chunks()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise SampleError("corrupt_shard", f"{path}: {error}") from error
    out = pa.BufferOutputStream()
    with pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    return bytes(out.getvalue())


def _encode(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return (value if isinstance(value, str) else json.dumps(value, default=str)).encode("utf-8", "surrogatepass")
