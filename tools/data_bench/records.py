"""The record: a row a part of a measured point, kept as CSV. Measuring a point again replaces its rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from csv_rows import read_rows, write_rows
from data_bench.points import OURS, Answer, Point
from data_bench.shards import Made
from loss_bench.summary import About


@dataclass(frozen=True)
class Row:
    """What a sample costs in one pipeline or in a part of it."""

    date: str
    commit: str
    command: str
    machine: str
    torch: str
    load: float
    """Runnable processes on the machine when the run began (the 1-minute load average)."""
    task: str
    pipeline: str
    part: str
    """`whole`, or a stage."""
    format: str
    size: int
    """Height and width in pixels of the stored JPEGs."""
    bytes_per_pixel: float
    crop: int
    workers: int
    """Loader processes; 0 loads in the process itself."""
    batch: int
    samples: int
    """Measured in each round."""
    rounds: int
    cpu_us_min: float
    """Processor microseconds a sample, the loader processes' included: lowest, median and highest round."""
    cpu_us_p50: float
    cpu_us_max: float
    wall_us_p50: float

    def key(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in _KEY)

    @property
    def per_cpu_s(self) -> float:
        """Samples a processor second."""
        return 1e6 / self.cpu_us_p50

    def label(self) -> str:
        """The pipeline, with the format where it reads several."""
        return f"{self.pipeline} ({self.format})" if self.pipeline == OURS else self.pipeline


_KEY = ("machine", "task", "pipeline", "part", "format", "size", "crop", "workers", "batch")


def rows(point: Point, answers: Sequence[Answer], made: Made, batch: int, crop: int, about: About) -> list[Row]:
    """A point's rounds as a row a part."""
    found = []
    for part in answers[0]:
        costs = [answer[part] for answer in answers]
        cpu_us = [1e6 * cost.cpu_s / cost.samples for cost in costs]
        found.append(
            Row(
                date=about.date,
                commit=about.commit,
                command=about.command,
                machine=about.cpu,
                torch=about.torch,
                load=about.load,
                task=point.task,
                pipeline=point.pipeline,
                part=part,
                format=point.format,
                size=point.size,
                bytes_per_pixel=made.bytes_per_pixel,
                crop=crop,
                workers=point.workers,
                batch=batch,
                samples=min(cost.samples for cost in costs),
                rounds=len(answers),
                cpu_us_min=min(cpu_us),
                cpu_us_p50=float(np.median(cpu_us)),
                cpu_us_max=max(cpu_us),
                wall_us_p50=float(np.median([1e6 * cost.wall_s / cost.samples for cost in costs])),
            )
        )
    return found


def peer(row: Row, found: Iterable[Row]) -> Row | None:
    """The other project's row that one of ours is compared with: the same task, size and loader processes, on tars."""
    if row.pipeline != OURS or row.task == "stages":
        return None
    same = ("machine", "task", "part", "size", "crop", "workers", "batch")
    return next(
        (
            other
            for other in found
            if other.pipeline != OURS and other.format == "tar" and all(getattr(other, n) == getattr(row, n) for n in same)
        ),
        None,
    )


def record(path: Path, rows: Iterable[Row]) -> None:
    """Put rows into a .csv file, each in the place of the one with the same key."""
    merged = {row.key(): row for row in read(path)} if path.exists() else {}
    merged |= {row.key(): _rounded(row) for row in rows}
    write_rows(path, Row, merged.values())


def read(path: Path) -> list[Row]:
    """The rows of a file that `record` wrote.

    Raises:
        ValueError: the file does not hold such rows.
    """
    return read_rows(path, Row, "bench_data.py")


def _rounded(row: Row) -> Row:
    """Four digits: the rest is noise, and makes differences of the file unreadable."""
    measured: dict[str, Any] = {
        field.name: float(f"{getattr(row, field.name):.4g}") for field in fields(Row) if field.type is float
    }
    return replace(row, **measured)
