"""Records as CSV: dataclass rows without missing values, in a file that is replaced whole."""

import csv
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

Row = TypeVar("Row")


def write_rows(path: Path, kind: type[Row], rows: Iterable[Row]) -> None:
    """Write a file of these rows; a reader sees the old one or the new one, whole."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)  # type: ignore[call-overload]
    partial.rename(path)


def read_rows(path: Path, kind: type[Row], tool: str) -> list[Row]:
    """The rows of a file that `write_rows` wrote for `tool`.

    Raises:
        ValueError: the file does not hold such rows.
    """
    types: dict[str, Any] = {field.name: field.type for field in fields(kind)}  # type: ignore[arg-type]
    with path.open(newline="") as file:
        entries = list(csv.DictReader(file))
    try:
        return [kind(**{name: parse(entry[name]) for name, parse in types.items()}) for entry in entries]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a record of {tool}: {error!r}; write it with --csv") from error
