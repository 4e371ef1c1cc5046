"""Time and memory against the batch, drawn from the record: log-log, with the bounds that no implementation can pass."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.ticker import NullLocator

from loss_bench.formulas import step_flop
from loss_bench.points import GEMM
from loss_bench.records import Row

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt

_COLOURS = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
_MARKERS = "osD^vP*X"


def draw(rows: Sequence[Row], path: Path) -> list[str]:
    """Write the picture, one line of two plots for all that differs in nothing but batch and implementation.

    Returns what was left out, in words: comparisons of a single batch beside others of several.

    Raises:
        ValueError: no row has a time.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.impl != GEMM:
            groups.setdefault(_group(row), []).append(row)
    groups = {key: group for key, group in groups.items() if any(row.full_p50_ms is not None for row in group)}
    if not groups:
        raise ValueError("nothing to draw: no loss in the record has a time")
    several = {key: group for key, group in groups.items() if len({row.batch for row in group}) > 1}
    drawn = several or groups
    colours = _colours(rows)
    figure, lines = plt.subplots(len(drawn), 2, figsize=(13, 4.4 * len(drawn)), squeeze=False, layout="constrained")
    for axes, group in zip(lines, drawn.values(), strict=True):
        _draw_line(axes, group, colours)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return [f"not drawn, a single batch: {_title(group)}" for key, group in groups.items() if key not in drawn]


def _group(row: Row) -> tuple[Any, ...]:
    return row.machine, row.device, row.kind, row.dim, row.dtype, row.scale, row.mode, row.world, row.threads


def _title(group: Sequence[Row]) -> str:
    row = group[0]
    ranks, plural = f", {row.world} ranks" if row.world > 1 else "", "s" * (row.threads > 1)
    return f"{row.kind}, D = {row.dim}, {row.dtype}, scale {row.scale:g}, {row.mode}{ranks}, {row.threads} thread{plural}"


def _colours(rows: Sequence[Row]) -> dict[str, Any]:
    """One an implementation, the same in every plot."""
    names = sorted({row.impl for row in rows} - {GEMM})
    return {name: (_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]) for i, name in enumerate(names)}


def _draw_line(axes: Any, group: Sequence[Row], colours: dict[str, Any]) -> None:
    time, memory = axes
    curves: dict[tuple[str, str, str], list[Row]] = {}
    for row in sorted(group, key=lambda row: (row.impl, row.variant, row.precision, row.batch)):
        curves.setdefault((row.impl, row.variant, row.precision), []).append(row)
    for (impl, _, precision), curve in curves.items():
        colour, marker = colours[impl]
        # a setting of its own is dashed, so that one colour is one implementation
        style = {"color": colour, "marker": marker, "markersize": 5, "linestyle": "-" if precision == "highest" else "--"}
        missing = [f"{row.status} at {row.batch:,}" for row in curve if row.full_p50_ms is None]
        label = curve[0].label() + (f" ({', '.join(missing)})" if missing else "")
        measured = [row for row in curve if row.full_p50_ms is not None]
        batches = [row.batch for row in measured]
        p20, p50, p80 = ([getattr(row, f"full_{p}_ms") for row in measured] for p in ("p20", "p50", "p80"))
        below = [middle - low for low, middle in zip(p20, p50, strict=True)]
        above = [high - middle for middle, high in zip(p50, p80, strict=True)]
        time.errorbar(batches, p50, yerr=[below, above], capsize=2, **style)
        memory.plot(batches, [(row.input_mib or 0) + (row.added_mib or 0) for row in measured], label=label, **style)
    _draw_bounds(time, memory, group)
    batches = sorted({row.batch for row in group})
    for plot, unit in ((time, "time of an iteration (ms)"), (memory, "features and memory added (MiB)")):
        plot.set(xscale="log", yscale="log", xlabel="batch N (pairs)", ylabel=unit)
        plot.set_xticks(batches, [f"{batch:,}" for batch in batches])
        plot.xaxis.set_minor_locator(NullLocator())
        plot.grid(visible=True, which="major", alpha=0.3)
    time.set_title(_title(group), loc="left", fontsize=10)
    memory.set_title(group[0].machine, loc="left", fontsize=10)
    # beside the plots, as curves fill them from corner to corner
    memory.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8, frameon=False)


def _draw_bounds(time: Any, memory: Any, group: Sequence[Row]) -> None:
    bound = {"color": "black", "linestyle": ":", "linewidth": 1.5}
    rates = {row.batch: row.gemm_gflop_per_s for row in group if row.gemm_gflop_per_s}
    batches = sorted(rates)
    flop = [step_flop(group[0].kind_of_loss(), replace(group[0].comparison(), batch=batch)) for batch in batches]
    time.plot(batches, [f / rates[batch] / 1e6 for f, batch in zip(flop, batches, strict=True)], **bound)
    inputs = {row.batch: row.input_mib for row in group if row.input_mib is not None}
    is_full = group[0].mode == "full"
    name = "bound: matrix products; features" + (" and gradients" if is_full else "")
    memory.plot(sorted(inputs), [(1 + is_full) * inputs[batch] for batch in sorted(inputs)], label=name, **bound)
