"""The record of what the kernels' machine code was: a row a variant, kept as CSV."""

import csv
import shutil
import subprocess
import time
from collections.abc import Collection, Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import triton

from kernel_inspection.compiled import Report
from kernel_inspection.variants import Variant
from scaleclip_kernels.tuning import ARCHITECTURES, KERNELS, Kernel, Launch


class VariantKey(NamedTuple):
    """A variant without its launch."""

    architecture: str
    kernel: Kernel
    dtype: str
    products: str
    options: str

    @classmethod
    def of(cls, variant: Variant) -> "VariantKey":
        return cls(variant.architecture, variant.kernel, variant.dtype, variant.products, variant.options)


@dataclass(frozen=True)
class Numbers:
    """What is recorded of a report. Cycles are of one multiprocessor for a tile; None: the chip has no such pipe."""

    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    blocks: int
    matrix_instructions: str
    loop_instructions: int
    loop_matrix: int
    loop_global: int
    loop_shared: int
    path_instructions: int
    """Of the ordinary path beside the main loop; so are the cycles of the pipes."""
    matrix_cycles: float
    loop_cycles: float
    issue_cycles: float
    fp32_cycles: float | None
    alu_cycles: float | None
    special_cycles: float | None
    shuffle_cycles: float | None
    shared_cycles: float | None
    busiest_pipe: str
    epilogue_ratio: float

    @classmethod
    def of(cls, report: Report) -> "Numbers":
        loop, cycles = report.code.main_loop, report.pipe_cycles
        return cls(
            registers=report.registers,
            stack_bytes=report.stack_bytes,
            spills=report.spills,
            shared_bytes=report.shared_bytes,
            blocks=report.blocks,
            matrix_instructions=" ".join(f"{count}*{shape}" for shape, count in sorted(report.matrix_instructions.items())),
            loop_instructions=loop.total,
            loop_matrix=loop.pipes.get("matrix", 0),
            loop_global=loop.pipes.get("global", 0),
            loop_shared=loop.pipes.get("shared", 0),
            path_instructions=report.code.ordinary.total,
            matrix_cycles=report.matrix_cycles,
            loop_cycles=report.loop_cycles,
            issue_cycles=cycles["issue"],
            fp32_cycles=cycles.get("fp32"),
            alu_cycles=cycles.get("alu"),
            special_cycles=cycles.get("special"),
            shuffle_cycles=cycles.get("shuffle"),
            shared_cycles=cycles.get("shared"),
            busiest_pipe=report.busiest_pipe,
            epilogue_ratio=round(report.epilogue_ratio, 4),
        )


@dataclass(frozen=True)
class Row:
    key: VariantKey
    launch: Launch
    numbers: Numbers
    triton: str
    commit: str
    date: str


_HEADER = (
    *VariantKey._fields,
    *(field.name for kind in (Launch, Numbers) for field in fields(kind)),
    "triton",
    "commit",
    "date",
)


def rows(reports: Iterable[Report]) -> list[Row]:
    """As of now."""
    commit = "unknown"
    if shutil.which("git"):
        described = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(described, capture_output=True, text=True, check=False).stdout.strip() or commit
    about = triton.__version__, commit, time.strftime("%Y-%m-%d")
    return [Row(VariantKey.of(report.variant), report.variant.launch, Numbers.of(report), *about) for report in reports]


def read(path: Path) -> dict[VariantKey, Row]:
    """The rows of a file that `write` wrote.

    Raises:
        ValueError: the file does not hold such rows.
    """
    with path.open(newline="") as file:
        entries = list(csv.DictReader(file))
    try:
        return {(row := _row(entry)).key: row for entry in entries}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a record of inspect_kernels.py: {error!r}; write it with --csv") from error


def write(path: Path, found: Iterable[Row], inspected: Collection[tuple[str, str]]) -> None:
    """Put rows in the place of all those of the inspected architectures' kernels; every other row stays as it is."""
    kept = [row for key, row in read(path).items() if key[:2] not in inspected] if path.exists() else []
    listed = sorted([*kept, *found], key=lambda row: (ARCHITECTURES.index(row.key.architecture), KERNELS.index(row.key.kernel)))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_HEADER)
        for row in listed:
            writer.writerow([*row.key, *astuple(row.launch), *astuple(row.numbers), row.triton, row.commit, row.date])
    partial.rename(path)


def _row(entry: dict[str, str]) -> Row:
    key = VariantKey(*(entry[name] for name in VariantKey._fields))  # type: ignore[arg-type]
    about = (entry[name] for name in ("triton", "commit", "date"))
    return Row(key, _parsed(Launch, entry), _parsed(Numbers, entry), *about)


def _parsed(kind: type[Any], entry: dict[str, str]) -> Any:
    return kind(**{field.name: _value(entry[field.name], field.type) for field in fields(kind)})


def _value(text: str, kind: Any) -> Any:
    if kind is bool:
        return text == "True"
    if kind == float | None:
        return float(text) if text else None
    return kind(text)
