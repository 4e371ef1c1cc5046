"""Samples a processor second by pipeline, size and number of loader processes, and where the time goes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.patches import Patch

from data_bench.records import Row, peer

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt

_COLOURS = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
_STAGES = ("fetch", "read", "caption", "decode", "resize", "tokenize", "collate")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the picture: a plot for each of pipelines, readers, stages and loader processes that the rows have.

    Raises:
        ValueError: there are no rows.
    """
    plots: list[tuple[Callable[[Any, Sequence[Row]], None], list[Row]]] = [
        (_draw_bars, [row for row in rows if row.task == "whole" and row.workers == 0]),
        (_draw_bars, [row for row in rows if row.task == "reader"]),
        (_draw_stages, [row for row in rows if row.task == "stages"]),
        (_draw_processes, [row for row in rows if row.task == "whole" and row.workers > 0]),
    ]
    plots = [(plot, chosen) for plot, chosen in plots if chosen]
    if not plots:
        raise ValueError("nothing to draw: the record is empty")
    lines = -(-len(plots) // 2)
    figure, axes = plt.subplots(lines, min(2, len(plots)), figsize=(13, 4.6 * lines), squeeze=False, layout="constrained")
    for axis in axes.flat[len(plots) :]:
        axis.set_visible(False)
    for axis, (plot, chosen) in zip(axes.flat, plots, strict=False):
        plot(axis, chosen)
    figure.suptitle(f"{rows[0].machine}, one thread, batch {rows[0].batch}, crop {rows[0].crop} px", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _colours(rows: Sequence[Row]) -> dict[str, Any]:
    """One a pipeline, the same in every plot, ours first."""
    names = ("scaleclip (tar)", "scaleclip (mds)", "open_clip", "webdataset", "streaming")
    return {name: colour for name, colour in zip(names, _COLOURS, strict=False) if any(row.label() == name for row in rows)}


def _draw_bars(axis: Any, rows: Sequence[Row]) -> None:
    colours, sizes = _colours(rows), sorted({row.size for row in rows})
    width = 0.8 / len(colours)
    for number, (label, colour) in enumerate(colours.items()):
        for row in (row for row in rows if row.label() == label):
            at = sizes.index(row.size) + (number - (len(colours) - 1) / 2) * width
            best, worst = 1e6 / row.cpu_us_min, 1e6 / row.cpu_us_max
            error = [[row.per_cpu_s - worst], [best - row.per_cpu_s]]
            axis.bar(at, row.per_cpu_s, 0.92 * width, color=colour, yerr=error, capsize=2)
            other = peer(row, rows)
            said = f"{row.per_cpu_s:,.0f}" + (f"\n{row.per_cpu_s / other.per_cpu_s:.1f}x" if other else "")
            axis.annotate(said, (at, best), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    axis.set_xticks(range(len(sizes)), [f"{size} px" for size in sizes])
    axis.margins(y=0.18)
    axis.set_ylabel("samples a CPU-second")
    title = "reader alone" if rows[0].task == "reader" else "training pipeline, in one process"
    axis.set_title(title, loc="left", fontsize=10)
    axis.legend(handles=[Patch(color=colour, label=label) for label, colour in colours.items()], fontsize=8, frameon=False)
    axis.grid(visible=True, axis="y", alpha=0.3)
    axis.set_axisbelow(True)


def _draw_stages(axis: Any, rows: Sequence[Row]) -> None:
    bars = sorted({(row.size, row.label()) for row in rows}, key=lambda bar: (-bar[0], bar[1]))
    parts = [part for part in _STAGES if any(row.part == part for row in rows)]
    left = np.zeros(len(bars))
    for number, part in enumerate(parts):
        us = {(row.size, row.label()): row.cpu_us_p50 for row in rows if row.part == part}
        lengths = np.array([us.get(bar, 0.0) for bar in bars])
        axis.barh(range(len(bars)), lengths, left=left, color=_COLOURS[number], label=part)
        left += lengths
    for place, total in enumerate(left):
        axis.annotate(f"{total:,.0f}", (total, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(bars)), [f"{size} px, {label}" for size, label in bars], fontsize=8)
    axis.margins(x=0.1)
    axis.set_xlabel("CPU microseconds a sample")
    axis.set_title("stages (resize: to the model's input; open_clip's makes it float)", loc="left", fontsize=10)
    axis.legend(fontsize=8, frameon=False)


def _draw_processes(axis: Any, rows: Sequence[Row]) -> None:
    colours = _colours(rows)
    for number, size in enumerate(sorted({row.size for row in rows})):
        for label, colour in colours.items():
            line = sorted((row for row in rows if row.size == size and row.label() == label), key=lambda row: row.workers)
            if line:
                style = {"color": colour, "marker": "osD^v"[number % 5], "linestyle": ("-", "--", ":", "-.")[number % 4]}
                axis.plot([row.workers for row in line], [row.per_cpu_s for row in line], label=f"{label}, {size} px", **style)
    axis.set(yscale="log", xlabel="loader processes", ylabel="samples a CPU-second")
    axis.set_xticks(sorted({row.workers for row in rows}))
    axis.set_title("training pipeline, in loader processes", loc="left", fontsize=10)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, frameon=False)
    axis.grid(visible=True, alpha=0.3)
