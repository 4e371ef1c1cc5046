"""The record: a row a figure of a measured point, kept as CSV. Measuring a point again replaces its rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from csv_rows import read_rows, write_rows
from loss_bench.summary import About
from train_bench.points import Layout

RATE, PER_CPU_S, LOGGED_RATE, STEP_MS = "pairs/s", "pairs per CPU-second", "pairs/s in its own log", "step"
RATIO, CPU_RATIO, BEST_RATIO = (
    "times the peer's pairs/s",
    "times the peer's pairs per CPU-second",
    "times the peer's best pairs/s",
)
PEAK = "peak GPU memory"
ADDED, BOUND, MATCHED, DIFFERENCE = "peak memory added", "peak over bound", "matched", "loss difference over ranks"
ONE_PASS = "times the one-pass step"


@dataclass(frozen=True)
class Row:
    """One figure of one point: median and spread over what `count` counts (rounds, or steps of all rounds)."""

    date: str
    commit: str
    command: str
    machine: str
    torch: str
    load: float
    """Runnable processes on the machine when the run began (the 1-minute load average)."""
    bench: str
    """peers, batch or step"""
    trainer: str
    source: str
    """Where batches come from: memory, shards, or the synthetic pairs of `pairs.py`."""
    setting: str
    towers: str
    parameters: int
    precision: str
    stage: int
    reduce_gradients: str
    world: int
    threads: int
    """A rank."""
    workers: int
    """Loader processes."""
    global_batch: int
    micro_batch: int
    metric: str
    unit: str
    count: int
    p20: float
    p50: float
    p80: float

    def key(self) -> tuple[Any, ...]:
        return (*self.point(), self.metric)

    def point(self) -> tuple[Any, ...]:
        """What a figure is about."""
        return tuple(getattr(self, name) for name in _POINT)


_POINT = (
    "machine", "bench", "trainer", "source", "setting", "towers", "precision", "stage", "reduce_gradients", "world", "threads",
    "workers", "global_batch", "micro_batch",
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A point whose figures become rows."""

    about: About
    bench: str
    layout: Layout
    parameters: int
    trainer: str = "scaleclip"
    source: str = "pairs"
    setting: str = "plain"
    workers: int = 0

    def row(self, metric: str, unit: str, values: Sequence[float]) -> Row:
        """One figure."""
        about, layout = self.about, self.layout
        p20, p50, p80 = (float(value) for value in np.percentile(values, (20, 50, 80)))
        return Row(
            date=about.date,
            commit=about.commit,
            command=about.command,
            machine=about.cpu,
            torch=about.torch,
            load=about.load,
            bench=self.bench,
            trainer=self.trainer,
            source=self.source,
            setting=self.setting,
            towers=layout.towers,
            parameters=self.parameters,
            precision=layout.precision,
            stage=layout.stage,
            reduce_gradients=layout.reduce_gradients,
            world=layout.world,
            threads=layout.threads,
            workers=self.workers,
            global_batch=layout.global_batch,
            micro_batch=layout.micro_batch,
            metric=metric,
            unit=unit,
            count=len(values),
            p20=p20,
            p50=p50,
            p80=p80,
        )


def points(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """The rows of every point by metric, in the order of the record."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.point(), {})[row.metric] = row
    return list(found.values())


def record(path: Path, rows: Iterable[Row]) -> None:
    """Put rows into a .csv file, in the place of all rows about the same points."""
    rows = [_rounded(row) for row in rows]
    measured = {row.point() for row in rows}
    kept = [row for row in read(path) if row.point() not in measured] if path.exists() else []
    write_rows(path, Row, (*kept, *rows))


def read(path: Path) -> list[Row]:
    """The rows of a file that `record` wrote.

    Raises:
        ValueError: the file does not hold such rows.
    """
    return read_rows(path, Row, "bench_train.py")


def _rounded(row: Row) -> Row:
    """Five digits: the rest is noise, and makes differences of the file unreadable."""
    measured: dict[str, Any] = {name: float(f"{getattr(row, name):.5g}") for name in ("load", "p20", "p50", "p80")}
    return replace(row, **measured)
