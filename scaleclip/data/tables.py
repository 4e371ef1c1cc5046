"""Small tables of texts, whole: CSV, TSV, JSON lines, Parquet."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from scaleclip.errors import ConfigError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a table by column. CSV and TSV have a line of names first, and give strings.

    Raises:
        ConfigError: it cannot be read, or is of none of these kinds.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: tables are {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".parquet":
            return list(pq.read_table(path).to_pylist())
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".jsonl":
                return [json.loads(line) for line in file if line.strip()]
            if path.suffix == ".tsv":  # whose texts hold quotation marks as they are
                return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
            return list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise ConfigError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
