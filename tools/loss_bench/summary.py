"""What the measuring processes answered, as rows of the record and as a table."""

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from loss_bench.formulas import step_flop
from loss_bench.implementations import find
from loss_bench.points import GEMM, Comparison, Errors, Point, RankResult, Sample
from loss_bench.records import Row
from measure_demo import cpu_name

MIB = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """What was found about a point: the ranks' answers in the last round, the samples of all rounds."""

    point: Point
    results: Sequence[RankResult]
    samples: Sequence[Sample]
    """An iteration each: the slowest rank's times, the ranks' processor time added up."""

    @property
    def first(self) -> RankResult:
        """The rank that speaks for all: one that failed, if any did."""
        return next((result for result in self.results if result.status != "ok"), self.results[0])


@dataclass(frozen=True)
class About:
    """What the rows of one run have in common."""

    date: str
    commit: str
    command: str
    cpu: str
    torch: str
    load: float
    rounds: int
    repeats: int

    @classmethod
    def now(cls, command: str, rounds: int, repeats: int) -> "About":
        commit = "unknown"
        if shutil.which("git"):
            described = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
            commit = subprocess.run(described, capture_output=True, text=True, check=False).stdout.strip() or commit
        load = round(os.getloadavg()[0], 2)
        return cls(time.strftime("%Y-%m-%d"), commit, command, cpu_name(), version("torch"), load, rounds, repeats)


def rows(outcomes: Sequence[Outcome], about: About) -> list[Row]:
    """One a point of a comparison, the matrix products first."""
    rates = [_gemm_flop_per_s(outcome) for outcome in outcomes if outcome.point.impl == GEMM and outcome.samples]
    best = {_best_setting(impl, outcomes) for impl in {outcome.point.impl for outcome in outcomes}}
    made = [_row(outcome, max(rates, default=None), about) for outcome in outcomes]
    return [replace(row, is_best_setting=outcome.point in best) for row, outcome in zip(made, outcomes, strict=True)]


def _best_setting(impl: str, outcomes: Sequence[Outcome]) -> Point | None:
    """The fastest of a peer's settings, where several were measured."""
    if impl == GEMM or not find(impl).has_settings:
        return None
    measured = [outcome for outcome in outcomes if outcome.point.impl == impl and outcome.samples]
    return min(measured, key=_median_s).point if len(measured) > 1 else None


def _median_s(outcome: Outcome) -> float:
    return float(np.median([sample.full_s for sample in outcome.samples]))


def _gemm_flop_per_s(outcome: Outcome) -> float:
    """Of all ranks together."""
    return sum(result.flop or 0.0 for result in outcome.results) / _median_s(outcome)


def _row(outcome: Outcome, gemm_flop_per_s: float | None, about: About) -> Row:
    point, comparison, first = outcome.point, outcome.point.comparison, outcome.first
    kind = None if point.impl == GEMM else find(point.impl).kind
    row = Row(
        date=about.date,
        commit=about.commit,
        command=about.command,
        machine=" + ".join(filter(None, [about.cpu, first.device_name])),
        torch=about.torch,
        load=about.load,
        impl=point.name,
        variant=point.variant,
        precision=point.precision,
        kind=kind or "",
        batch=comparison.batch,
        dim=comparison.dim,
        dtype=comparison.dtype,
        scale=comparison.scale,
        mode=comparison.mode,
        world=comparison.world,
        threads=comparison.threads,
        device=comparison.device,
        rounds=about.rounds,
        repeats=about.repeats,
        status=first.status,
        note=first.note,
        input_mib=None if point.impl == GEMM else comparison.input_bytes_per_pair * comparison.batch / MIB,
        gemm_gflop_per_s=None if gemm_flop_per_s is None else gemm_flop_per_s / 1e9,
        **_errors("", first.errors),
        **_errors("plain_", first.plain_errors),
    )
    if first.status != "ok":
        return row  # no speed for what is wrong
    row = replace(row, **_times(outcome))
    if kind is None:
        rate = _gemm_flop_per_s(outcome)
        return replace(row, gemm_gflop_per_s=rate / 1e9, gemm_share=rate / gemm_flop_per_s if gemm_flop_per_s else None)
    if gemm_flop_per_s:
        row = replace(row, gemm_share=step_flop(kind, comparison) / _median_s(outcome) / gemm_flop_per_s)
    added, sent = ([getattr(result, name) for result in outcome.results] for name in ("added_bytes", "sent_bytes"))
    return replace(
        row,
        added_mib=max(added) / MIB,
        sent_bytes=None if None in sent else max(sent),
        formula_bytes=first.formula_bytes,
        loss=float(np.mean([result.loss or 0.0 for result in outcome.results])),
    )


def _errors(prefix: str, errors: Errors | None) -> dict[str, Any]:
    if errors is None:
        return {}
    names = ("x", "y", "scale", "bias") if prefix else ("loss", "x", "y", "scale", "bias")
    return {f"{prefix}{name}_error": getattr(errors, name) for name in names}


def _times(outcome: Outcome) -> dict[str, Any]:
    parts = ["full"]
    if outcome.point.impl != GEMM:
        parts += ["forward"] if outcome.point.comparison.mode == "forward" else ["forward", "backward"]
    times: dict[str, Any] = {"cpu_s": float(np.median([sample.cpu_s for sample in outcome.samples]))}
    for part in parts:
        seconds = [getattr(sample, f"{part}_s") for sample in outcome.samples]
        for percent in (20, 50, 80):
            times[f"{part}_p{percent}_ms"] = float(np.percentile(seconds, percent)) * 1e3
    return times


def table(comparison: Comparison, found: Sequence[Row]) -> Table:
    """What a reader compares: rows of one precision are under identical flags."""
    over_ranks = comparison.world > 1
    made = Table(title=comparison.title(), title_justify="left", caption=_caption(over_ranks), caption_justify="left")
    for name in ("implementation", "setting"):
        made.add_column(name, no_wrap=True)
    numbers = ["ms (p20 - p80)", "forward", "backward", "speed", "of GEMM", "cpu s", "added MiB"]
    numbers += ["sent MB a rank", "formula"] if over_ranks else []
    for name in [*numbers, "error", "plain torch's"]:
        made.add_column(name, justify="right")
    made.add_column("note")
    for row in found:
        made.add_row(*_cells(row, found, over_ranks), style="bold red" if row.status == "wrong" else None)
    return made


def _caption(over_ranks: bool) -> str:
    caption = (
        "speed: times that of open_clip's loss at the same precision. of GEMM: what the work needs (softmax 4, sigmoid 3, "
        "forward 1 products of N x N x D) over the time and the best measured rate of plain products (on a CPU in fp32). "
        "added MiB: the peak above inputs and libraries, gradients included. error: of the feature gradients, and of the "
        "scale's and bias's, relative to fp64."
    )
    if not over_ranks:
        return caption
    return caption + (
        "\nTimes are the slowest rank's. sent: counted at torch.distributed; an all-gather as (W - 1) parts, reduce-scatter "
        "and all-to-all as (W - 1) / W of the input, an all-reduce as 2 (W - 1) / W of the tensor."
    )


def _cells(row: Row, found: Sequence[Row], over_ranks: bool) -> list[str]:
    def number(value: float | None, digits: int = 1) -> str:
        return "" if value is None else f"{value:,.{digits}f}"

    time_ms = f"{number(row.full_p50_ms)} ({number(row.full_p20_ms)} - {number(row.full_p80_ms)})"
    cells = [
        row.impl,
        row.variant if row.impl == GEMM else " ".join(word for word in (row.variant, row.precision) if word),
        time_ms if row.full_p50_ms is not None else "WRONG" if row.status == "wrong" else "-",
        number(row.forward_p50_ms),
        number(row.backward_p50_ms),
        number(_speed(row, found), 2),
        "" if row.gemm_share is None else f"{row.gemm_share:.0%}",
        number(row.cpu_s, 2),
        number(row.added_mib),
    ]
    if over_ranks:
        cells += [number(None if value is None else value / 1e6, 3) for value in (row.sent_bytes, row.formula_bytes)]
    cells.append(_worst(row.x_error, row.y_error, row.scale_error, row.bias_error))
    cells.append(_worst(row.plain_x_error, row.plain_y_error, row.plain_scale_error, row.plain_bias_error))
    notes = [row.note, "best setting" if row.is_best_setting else "", "" if row.status == "ok" else row.status]
    if row.impl == GEMM and row.status == "ok":
        notes.append(f"{row.gemm_gflop_per_s:,.0f} GFLOP/s")
    return [*cells, "; ".join(filter(None, reversed(notes)))]


def _worst(x: float | None, y: float | None, scale: float | None, bias: float | None) -> str:
    if x is None or y is None or scale is None:
        return ""
    return f"{max(x, y):.1e}, {max(scale, bias or 0.0):.1e}"


def _speed(row: Row, found: Sequence[Row]) -> float | None:
    """Times the speed of open_clip's loss of the same kind under the same flags (its faster variant)."""
    peers = [
        other.full_p50_ms
        for other in found
        if other.impl in ("open_clip", "open_clip_siglip") and (other.kind, other.precision) == (row.kind, row.precision)
        if other.full_p50_ms is not None
    ]
    return min(peers) / row.full_p50_ms if peers and row.full_p50_ms is not None else None
