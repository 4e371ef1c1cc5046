"""Labelled images in Parquet files: bytes, or Hugging Face's struct of bytes and path, beside an integer.

A file is read a row group at a time and the last one is kept, so rows are cheap in order. RowReader lays files out for rows
in any order, at the price of a second copy of all images.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scaleclip.data.cache import ShardCache
from scaleclip.data.sample import SampleError
from scaleclip.errors import ConfigError

_LABELS = ("label", "labels", "cls", "fine_label")


class Columns(NamedTuple):
    """Which columns hold what."""

    image: str
    label: str
    class_names: tuple[str, ...] | None
    """As Hugging Face's metadata have them."""


class ImageRows:
    """Rows of Parquet files by number, counted through all files.

    Args:
        key: for errors.
        files: path or URL of every file.
        cache: local copies of remote files.

    Raises:
        ConfigError: a file is no Parquet or has not one column of images and one of labels.
    """

    def __init__(self, key: str, files: Sequence[str], cache: ShardCache) -> None:
        self._files = files
        self._opened = [_open(key, file, cache) for file in files]
        self.columns = _find_columns(f"{key}: {files[0]}", self._opened[0].schema_arrow)
        for file, opened in zip(files, self._opened, strict=True):
            if _find_columns(f"{key}: {file}", opened.schema_arrow) != self.columns:
                raise ConfigError(f"{key}: {file} has other columns or class names than {files[0]}: make them two data sets")
        groups = [(file, group) for file, opened in enumerate(self._opened) for group in range(opened.num_row_groups)]
        counts = np.array([self._opened[file].metadata.row_group(group).num_rows for file, group in groups], np.int64)
        self._groups, self._first_row = groups, np.cumsum(counts) - counts
        self.num_rows = int(counts.sum())
        self._kept: tuple[int, Any] = (-1, None)

    def where(self, row: int) -> str:
        """The row, for people."""
        group = self._group_of(row)
        file = self._groups[group][0]
        first = next(number for number, (other, _) in enumerate(self._groups) if other == file)
        return f"{self._files[file]} row {row - self._first_row[first]}"

    def __call__(self, row: int) -> tuple[bytes, int]:
        """Encoded image and label. Raises SampleError where the row has none."""
        group = self._group_of(row)
        if self._kept[0] != group:
            file, number = self._groups[group]
            try:
                table = self._opened[file].read_row_group(number, columns=[self.columns.image, self.columns.label])
            except (pa.ArrowException, OSError) as error:
                raise SampleError("corrupt_shard", f"{self._files[file]}: {error}") from error
            self._kept = (group, table)
        table, ordinal = self._kept[1], row - int(self._first_row[group])
        image, label = (table.column(name)[ordinal].as_py() for name in (self.columns.image, self.columns.label))
        data = image["bytes"] if isinstance(image, dict) else image
        if data is None:
            raise SampleError("no_image", f"column {self.columns.image} holds no bytes, at most a path: embed the images")
        if label is None:
            raise SampleError("no_label", f"column {self.columns.label} is empty")
        return data, int(label)

    def _group_of(self, row: int) -> int:
        return int(np.searchsorted(self._first_row, row, side="right")) - 1


def _open(key: str, file: str, cache: ShardCache) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(cache.path(file))
    except (pa.ArrowException, OSError, SampleError) as error:
        raise ConfigError(f"{key}: {file} cannot be read as Parquet: {error}") from error


def _find_columns(key: str, schema: pa.Schema) -> Columns:
    images = [field.name for field in schema if _holds_bytes(field.type)]
    integers = [field.name for field in schema if pa.types.is_integer(field.type)]
    labels = integers if len(integers) == 1 else [name for name in _LABELS if name in integers][:1]
    if len(images) != 1 or len(labels) != 1:
        raise ConfigError(
            f"{key} has the columns {', '.join(schema.names)}: one must hold images (bytes, or a struct with bytes) and one "
            f"integer labels, called {_LABELS[0]} where there are other integers; write such a file"
        )
    said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = said.get("info", {}).get("features", {}).get(labels[0], {})
    names = feature.get("names")
    return Columns(images[0], labels[0], tuple(names) if names else None)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
