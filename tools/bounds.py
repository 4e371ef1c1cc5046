"""Figures that the project sets bounds for: shown, appended to a record, judged."""

import csv
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table


class Row(NamedTuple):
    """A figure."""

    what: str
    value: float
    unit: str
    bound: str = ""
    """What the project asks for."""


def report(rows: Sequence[Row], console: Console, record: Path | None) -> bool:
    """Print the figures, append them to `record`, and say which bounds are missed: whether any is."""
    table = Table("what", "value", "unit", "bound")
    for row in rows:
        table.add_row(row.what, f"{row.value:,.4g}", row.unit, row.bound)
    console.print(table)
    if record:
        _append(record, rows)
    missed = [row.what for row in rows if row.bound and not row.value <= float(row.bound.removeprefix("<= "))]
    if missed:
        console.print("missed: " + ", ".join(missed))
    return bool(missed)


def _append(path: Path, rows: Sequence[Row]) -> None:
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(["date", *Row._fields])
        for row in rows:
            writer.writerow([datetime.date.today().isoformat(), row.what, f"{row.value:.5g}", row.unit, row.bound])
