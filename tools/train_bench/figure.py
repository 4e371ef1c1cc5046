"""The record, drawn: both trainers, the losses of large batches, steps by part."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from train_bench.points import OPEN_CLIP, OURS, PARTS
from train_bench.records import RATE, RATIO, Row, points

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt

_COLOURS = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the picture: a plot a bench that the rows have.

    Raises:
        ValueError: there are no rows.
    """
    plots: dict[str, Callable[[Any, Sequence[Row]], None]] = {"peers": _draw_peers, "batch": _draw_losses, "step": _draw_steps}
    chosen = [(plot, found) for bench, plot in plots.items() if (found := [row for row in rows if row.bench == bench])]
    if not chosen:
        raise ValueError("nothing to draw: the record is empty")
    figure, axes = plt.subplots(1, len(chosen), figsize=(7 * len(chosen), 5), squeeze=False, layout="constrained")
    for axis, (plot, found) in zip(axes.flat, chosen, strict=True):
        plot(axis, found)
    figure.suptitle(rows[0].machine, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_peers(axis: Any, rows: Sequence[Row]) -> None:
    """Rates relative to the peer's at the same setting: towers differ by orders of magnitude."""
    found = {(_comparison(point[RATE]), point[RATE].trainer): point for point in points(rows)}
    names = list(dict.fromkeys(name for name, _ in found))
    for (name, trainer), point in found.items():
        row, is_ours = point[RATE], trainer == OURS
        unit = found[name, OPEN_CLIP][RATE].p50
        at = names.index(name) + (-0.2 if is_ours else 0.2)
        error = [[(row.p50 - row.p20) / unit], [(row.p80 - row.p50) / unit]]
        axis.barh(at, row.p50 / unit, 0.38, color=_COLOURS[0 if is_ours else 1], xerr=error, capsize=3)
        said = f"{row.p50:,.4g}/s" + (f", {point[RATIO].p50:.2f} x" if RATIO in point else "")
        axis.annotate(said, (row.p80 / unit, at), (5, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.25)
    axis.set_xlabel("pairs a second, times the peer's median")
    axis.set_title("scaleclip (above) and open_clip (below)", loc="left", fontsize=10)
    axis.grid(visible=True, axis="x", alpha=0.3)
    axis.set_axisbelow(True)


def _comparison(row: Row) -> str:
    """What both trainers of a comparison have in common, said short."""
    loaders = f", {row.workers} loader(s)" if row.source == "shards" else ""
    return (
        f"{row.towers}, {row.global_batch} pairs from {row.source}\n"
        f"{row.setting}, {row.precision}, {row.threads} thread(s), ZeRO-{row.stage}{loaders}"
    )


def _draw_losses(axis: Any, rows: Sequence[Row]) -> None:
    for number, point in enumerate(points(rows)):
        curve = sorted((int(metric.split()[-1]), row.p50) for metric, row in point.items() if metric.startswith("loss at"))
        if curve:
            row = next(iter(point.values()))
            label = f"{row.world} ranks, {row.global_batch:,} pairs in chunks of {row.micro_batch:,}"
            axis.plot(*zip(*curve, strict=True), label=label, color=_COLOURS[number], marker="osD^"[number % 4], markersize=4)
    axis.set(xlabel="step", ylabel="loss")
    axis.set_title("synthetic labelled pairs", loc="left", fontsize=10)
    axis.legend(fontsize=8, frameon=False)
    axis.grid(visible=True, alpha=0.3)


def _draw_steps(axis: Any, rows: Sequence[Row]) -> None:
    found = points(rows)
    left = [0.0] * len(found)
    for number, part in enumerate(PARTS):
        lengths = [point[f"{part} of a step"].p50 if f"{part} of a step" in point else 0.0 for point in found]
        if any(lengths):
            axis.barh(range(len(found)), lengths, left=left, color=_COLOURS[number], label=part)
        left = [begin + length for begin, length in zip(left, lengths, strict=True)]
    names = [
        f"ZeRO-{row.stage}, {row.reduce_gradients}: {row.global_batch:,} = {row.world} x {row.micro_batch} x "
        f"{row.global_batch // row.world / row.micro_batch:g}"
        for row in (point[RATE] for point in found)
    ]
    axis.set_yticks(range(len(found)), names, fontsize=8)
    axis.set_xlabel("milliseconds a step, medians by part")
    axis.set_title("pairs = ranks x micro batch x chunks, by ZeRO stage and reduction", loc="left", fontsize=10)
    axis.legend(fontsize=8, frameon=False)
