"""Training curves: a run's rows of metrics, and of evaluations, against the pairs that it has seen."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from scaleclip.report.picture import COLOURS, FAINT, INK, Picture, clean, to_picture

Rows = Sequence[Mapping[str, Any]]
Floats = NDArray[np.float64]
_COLUMNS = 4
_WIDEST = 50  # rows to each side of a median
_STEPS = (1, 2, 2.5, 5, 10)  # between ticks
_SMOOTHED = 60  # rows from which on a noisy curve gets a median
_MOST_STAGES = 7  # of the loader; what is left is "other"
_ZERO_SHOT = "zero-shot"
_NO_TERM = "contrastive"  # alone, it is the loss itself


class Marks(NamedTuple):
    """What stands beside every curve, at pairs seen."""

    stages: Sequence[tuple[int, str]]
    """Where each stage but the first begins, and its name."""
    restarts: Sequence[int]
    """Where later starts of the run went on from."""
    bad: Sequence[int]
    """Steps that were left out."""


class Measured(NamedTuple):
    """What an evaluation found."""

    samples: int
    """Pairs seen by then."""
    values: Mapping[tuple[str, str], float]
    """Of figures, by (split, metric)."""


class _Panel(NamedTuple):
    name: str
    title: str
    alt: str
    draw: Callable[[Axes], None]
    span: int = 1
    """Columns that it takes."""


def draw_curves(title: str, rows: Rows, marks: Marks, evaluations: Sequence[Measured] = ()) -> list[Picture]:
    """`curves` with all panels, and then a picture for each.

    Args:
        title: of the picture with all.
        rows: of metrics.jsonl, at least one; values that are not finite may be null or NaN and leave gaps.
        marks: beside all of them.
        evaluations: what was measured, oldest first.
    """
    panels = [*_metric_panels(rows, marks.bad), *_evaluation_panels(evaluations)]
    limit = (0.0, 1.02 * max(rows[-1]["samples"], 1))
    places, lines = _places(panels)
    overview = Figure((3.6 * _COLUMNS, 2.6 * lines + 0.4), layout="constrained")
    overview.suptitle(title, fontsize=12, color=INK)
    grid = overview.add_gridspec(lines, _COLUMNS)
    for panel, (line, column) in zip(panels, places, strict=True):
        axes = overview.add_subplot(grid[line, column : column + panel.span])
        axes.set_title(panel.title, loc="left", fontsize=10, color=INK, pad=14 if marks.stages else 6)
        _draw(panel, axes, marks, limit)
    names = ", ".join(panel.title for panel in panels)
    pictures = [to_picture("curves", "Curves", f"Curves against pairs seen: {names}", overview)]
    for panel in panels:
        figure = Figure((3.6 * panel.span, 2.4), layout="constrained")
        _draw(panel, figure.subplots(), marks, limit)
        pictures.append(to_picture(panel.name, panel.title, panel.alt, figure))
    return pictures


def _places(panels: Sequence[_Panel]) -> tuple[list[tuple[int, int]], int]:
    """Line and column of each panel, and the number of lines."""
    places, line, column = [], 0, 0
    for panel in panels:
        if column + panel.span > _COLUMNS:
            line, column = line + 1, 0
        places.append((line, column))
        column += panel.span
    return places, line + 1


def _draw(panel: _Panel, axes: Axes, marks: Marks, limit: tuple[float, float]) -> None:
    panel.draw(axes)
    clean(axes)
    axes.set_xlim(limit)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(6 * panel.span, steps=_STEPS, min_n_ticks=3))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    axes.set_xlabel("pairs seen", fontsize=9, color=FAINT)
    top = axes.get_xaxis_transform()
    for samples, name in marks.stages:
        axes.axvline(samples, color=FAINT, linewidth=0.9, linestyle=(0, (5, 3)))
        axes.annotate(
            name, (samples, 1.0), (0, 2), xycoords=top, textcoords="offset points", fontsize=8, color=FAINT, ha="center"
        )
    if marks.restarts:
        axes.plot(
            marks.restarts, [0.0] * len(marks.restarts), "^", transform=top, color=INK, markersize=6, clip_on=False, zorder=5
        )
    if axes.get_legend() is None and axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, framealpha=0.85, edgecolor="none", loc="best", labelcolor=INK, handlelength=1.4)


def _metric_panels(rows: Rows, bad: Sequence[int]) -> list[_Panel]:
    samples = _column(rows, "samples")

    def line(
        name: str, title: str, key: str, *, smooth: bool = False, from_zero: bool = False, is_share: bool = False
    ) -> _Panel:
        values = _column(rows, key)

        def draw(axes: Axes) -> None:
            _plot(axes, samples, values, COLOURS[0], smooth=smooth)
            if from_zero:
                axes.set_ylim(0, _headroom(values))
            if name == "throughput":
                axes.yaxis.set_major_formatter(EngFormatter(sep=""))
            if name == "learning_rate":
                axes.ticklabel_format(axis="y", scilimits=(-2, 5))
            if is_share:
                axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))

        return _Panel(name, title, _said(title, samples, values), draw)

    loss = line("loss", "loss", "loss", smooth=True)
    terms = list(dict.fromkeys(term for row in rows for term in row["terms"]))
    if len(terms) > 1 or terms not in ([], [_NO_TERM]):
        loss = _with_terms(loss, samples, rows, terms)
    return [
        _with_bad_steps(loss, bad),
        line("learning_rate", "learning rate", "lr", from_zero=True),
        line("logit_scale", "logit scale", "logit_scale"),
        line("gradient_norm", "gradient norm", "grad_norm", smooth=True, from_zero=True),
        line("throughput", "pairs / s", "pairs_per_s", smooth=True, from_zero=True),
        line("data_wait", "share of time waiting for data", "data_wait", smooth=True, from_zero=True, is_share=True),
        *_loader_panel(samples, rows),
    ]


def _with_terms(loss: _Panel, samples: Floats, rows: Rows, terms: Sequence[str]) -> _Panel:
    values = {term: np.array([_number(row["terms"].get(term)) for row in rows]) for term in terms}

    def draw(axes: Axes) -> None:
        limits = []
        for number, term in enumerate(terms):
            _plot(axes, samples, values[term], COLOURS[1 + number % (len(COLOURS) - 1)], label=term, smooth=True)
            limits.append(axes.get_ylim())
        _plot(axes, samples, _column(rows, "loss"), COLOURS[0], label="loss, weighted", smooth=True)
        # each curve sets the axis to itself
        lows, highs = zip(*limits, axes.get_ylim(), strict=True)
        axes.set_ylim(min(lows), max(highs))

    said = "; ".join(_said(term, samples, values[term]) for term in terms)
    return loss._replace(title="loss and its terms", alt=f"{loss.alt}; {said}", draw=draw)


def _with_bad_steps(loss: _Panel, bad: Sequence[int]) -> _Panel:
    if not bad:
        return loss

    def draw(axes: Axes) -> None:
        loss.draw(axes)
        place = axes.get_xaxis_transform()
        label = "step left out: not finite"
        axes.plot(bad, [0.03] * len(bad), "x", transform=place, color=COLOURS[1], markersize=5, label=label)

    return loss._replace(alt=f"{loss.alt}; {len(bad)} steps were left out as not finite", draw=draw)


def _loader_panel(samples: Floats, rows: Rows) -> list[_Panel]:
    totals: dict[str, float] = {}
    for row in rows:
        for stage, share in row["loader"].items():
            totals[stage] = totals.get(stage, 0.0) + share
    if not totals:
        return []
    stages = sorted(totals, key=lambda stage: -totals[stage])
    shown, rest = stages[:_MOST_STAGES], stages[_MOST_STAGES:]
    shares = {stage: np.array([row["loader"].get(stage, 0.0) for row in rows]) for stage in stages}
    layers = [shares[stage] for stage in shown]
    if rest:
        layers.append(np.sum([shares[stage] for stage in rest], axis=0))
    labels = [*shown, *(["other"] if rest else [])]

    def draw(axes: Axes) -> None:
        # a row tells of the time before it, and an area has two ends
        at, heights = np.array([0.0, *samples]), [np.array([layer[0], *layer]) for layer in layers]
        axes.stackplot(at, *heights, labels=labels, colors=COLOURS[: len(labels)], linewidth=0, alpha=0.9)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.legend(
            *(each[::-1] for each in axes.get_legend_handles_labels()), fontsize=8, frameon=False, loc="center left",
            bbox_to_anchor=(1, 0.5), labelcolor=INK, handlelength=1, borderpad=0,
        )  # fmt: skip

    mean = ", ".join(f"{stage} {totals[stage] / len(rows):.0%}" for stage in stages)
    return [
        _Panel("loader", "what the loader spends its time on", f"Share of the loader's time by stage, mean: {mean}", draw, 2)
    ]


def _evaluation_panels(evaluations: Sequence[Measured]) -> list[_Panel]:
    """A panel a figure, with a curve a split; without one point beside another there is no curve."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for each in evaluations:
        for (split, metric), value in each.values.items():
            kind, curve = metric, split
            if metric.startswith(_ZERO_SHOT):
                kind, curve = _ZERO_SHOT, f"{split}:{metric.removeprefix(_ZERO_SHOT)}"
            elif not metric.startswith("mean ") and not metric.endswith("R@1"):
                continue
            found.setdefault(kind, {}).setdefault(curve, []).append((each.samples, _number(value)))
    panels = []
    for metric, splits in found.items():
        if max(map(len, splits.values())) > 1:
            panels.append(_evaluation_panel(metric, splits))
    return panels


def _evaluation_panel(metric: str, splits: Mapping[str, Sequence[tuple[float, float]]]) -> _Panel:
    curves = {split: np.array(points, dtype=float).T for split, points in splits.items()}

    def draw(axes: Axes) -> None:
        for number, (split, (at, values)) in enumerate(curves.items()):
            axes.plot(at, values, ".-", color=COLOURS[number % len(COLOURS)], linewidth=1.3, markersize=4, label=split)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))

    said = "; ".join(_said(split, at, values) for split, (at, values) in curves.items())
    return _Panel(f"evaluation_{metric}", f"evaluation: {metric}", said, draw)


def _plot(axes: Axes, samples: Floats, values: Floats, colour: str, *, label: str | None = None, smooth: bool = False) -> None:
    finite = int(np.isfinite(values).sum())
    if smooth and finite > _SMOOTHED:
        axes.plot(samples, values, color=colour, linewidth=0.6, alpha=0.35)
        axes.plot(samples, _running_median(values, min(len(values) // 30, _WIDEST)), color=colour, linewidth=1.5, label=label)
        low, high = np.nanquantile(values, [0.0, 0.995])
        axes.set_ylim(min(axes.get_ylim()[0], low), max(high * 1.05, low + 1e-9))
        return
    # a lone point between gaps would not be seen as a line
    axes.plot(samples, values, color=colour, linewidth=1.5, label=label, marker="." if finite < 20 else None, markersize=5)


def _running_median(values: Floats, window: int) -> Floats:
    """The median of the finite values around each; NaN where that is none itself."""
    padded = np.pad(values, window, constant_values=np.nan)
    medians, is_finite = np.full_like(values, np.nan), np.isfinite(values)
    medians[is_finite] = np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, 2 * window + 1)[is_finite], axis=1)
    return medians


def _headroom(values: Floats) -> float:
    """An upper end of the axis that a single spike does not decide."""
    finite = values[np.isfinite(values)]
    if not len(finite) or finite.max() <= 0:
        return 1.0
    return float(min(finite.max(), 3 * np.quantile(finite, 0.95)) * 1.1)


def _said(name: str, samples: Floats, values: Floats) -> str:
    finite = np.flatnonzero(np.isfinite(values))
    if not len(finite):
        return f"{name}: never finite"
    first, last = finite[0], finite[-1]
    return f"{name}: {values[first]:.4g} at {samples[first]:,.0f} pairs, {values[last]:.4g} at {samples[last]:,.0f}"


def _column(rows: Rows, key: str) -> Floats:
    return np.array([_number(row[key]) for row in rows])


def _number(value: float | None) -> float:
    return math.nan if value is None or not math.isfinite(value) else value
