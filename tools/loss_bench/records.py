"""The record: a row a measured point, kept as CSV or JSON. Measuring a point again replaces its row."""

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, cast, get_args

from loss_bench.points import Comparison, Device, Kind, Mode


@dataclass(frozen=True)
class Row:
    """One point of a comparison. None: not measured, not applicable, or refused."""

    date: str
    commit: str
    command: str
    machine: str
    """Processor, and the GPU where one was used."""
    torch: str
    load: float
    """Runnable processes on the machine when the run began (the 1-minute load average): what else may have been measured."""
    impl: str
    variant: str
    precision: str
    kind: str
    """softmax or sigmoid; empty for matrix products."""
    batch: int
    """Pairs over all ranks."""
    dim: int
    dtype: str
    scale: float
    mode: str
    world: int
    threads: int
    """A rank."""
    device: str
    rounds: int
    repeats: int
    status: str
    note: str
    is_best_setting: bool = False
    """Of a peer's measured settings, the fastest."""
    forward_p20_ms: float | None = None
    forward_p50_ms: float | None = None
    forward_p80_ms: float | None = None
    backward_p20_ms: float | None = None
    backward_p50_ms: float | None = None
    backward_p80_ms: float | None = None
    full_p20_ms: float | None = None
    full_p50_ms: float | None = None
    full_p80_ms: float | None = None
    cpu_s: float | None = None
    """Processor seconds of all ranks, an iteration."""
    gemm_gflop_per_s: float | None = None
    """Of all ranks together, measured in the same rounds."""
    gemm_share: float | None = None
    added_mib: float | None = None
    """On the rank that adds most."""
    input_mib: float | None = None
    """A rank's x and y."""
    sent_bytes: float | None = None
    """By the rank that sends most, in one iteration."""
    formula_bytes: float | None = None
    loss: float | None = None
    loss_error: float | None = None
    x_error: float | None = None
    y_error: float | None = None
    scale_error: float | None = None
    bias_error: float | None = None
    plain_x_error: float | None = None
    plain_y_error: float | None = None
    plain_scale_error: float | None = None
    plain_bias_error: float | None = None

    def key(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in _KEY)

    def kind_of_loss(self) -> Kind:
        return cast(Kind, self.kind)

    def comparison(self) -> Comparison:
        return Comparison(
            self.batch,
            self.dim,
            self.dtype,
            self.scale,
            cast(Mode, self.mode),
            self.world,
            self.threads,
            cast(Device, self.device),
        )

    def label(self) -> str:
        """For legends: what tells rows of one comparison apart."""
        return " ".join(word for word in (self.impl, self.variant, self.precision) if word)


_KEY = (
    "machine", "impl", "variant", "precision", "batch", "dim", "dtype", "scale", "mode", "world", "threads", "device"
)  # fmt: skip


def record(path: Path, rows: Iterable[Row]) -> None:
    """Put rows into a .csv or .json file, each in the place of the one with the same key."""
    merged = {row.key(): row for row in read(path)} if path.exists() else {}
    for row in rows:
        merged[row.key()] = _rounded(row)
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", newline="") as file:
        if path.suffix == ".json":
            json.dump([_as_dict(row) for row in merged.values()], file, indent=1)
        else:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(_as_dict(row) for row in merged.values())
    partial.rename(path)


def read(path: Path) -> list[Row]:
    """The rows of a file that `record` wrote.

    Raises:
        ValueError: the file does not hold such rows.
    """
    with path.open(newline="") as file:
        found = json.load(file) if path.suffix == ".json" else list(csv.DictReader(file))
    try:
        return [Row(**{field.name: _parse(entry[field.name], field.type) for field in fields(Row)}) for entry in found]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a record of bench_loss.py: {error!r}; write it with --csv or --json") from error


def _as_dict(row: Row) -> dict[str, Any]:
    return {field.name: getattr(row, field.name) for field in fields(Row)}


def _rounded(row: Row) -> Row:
    """Five digits: the rest is noise, and makes differences of the file unreadable."""
    measured = [field.name for field in fields(Row) if field.type == float | None and getattr(row, field.name) is not None]
    exact = ("sent_bytes", "formula_bytes")
    digits: dict[str, Any] = {name: float(f"{getattr(row, name):.5g}") for name in measured if name not in exact}
    return replace(row, **digits)


def _parse(value: Any, kind: Any) -> Any:
    if NoneType in get_args(kind):
        if value in ("", None):
            return None
        kind = get_args(kind)[0]
    if kind is bool:
        return value in (True, "True")
    return kind(value)
