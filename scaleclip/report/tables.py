"""The rows of a report's tables, from what lies in a run's folder."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from scaleclip.checkpoint.folders import checkpoints, identity, step_name
from scaleclip.data.tally import QUARANTINE, read_quarantine
from scaleclip.evaluation.results import Figure
from scaleclip.evaluation.saved import checkpoint_figures, evaluated_steps
from scaleclip.evaluation.targets import Compared, Target, beside
from scaleclip.metrics import read_evaluations, read_whole_lines

_MOST_STEPS, _MOST_SHARDS, _MOST_BAD_STEPS = 8, 5, 10


def result_groups(figures: Sequence[Figure], target: Target | None) -> list[tuple[str, list[Compared]]]:
    """Figures by split, in their order, each with what a target reports of it."""
    compared = [(figure.split, each) for figure, each in zip(figures, beside(figures, target), strict=True)]
    return [(split, [each for _, each in rows]) for split, rows in groupby(compared, key=lambda pair: pair[0])]


def figures_of(run: Path, step: int) -> list[Figure]:
    """Every figure of a run's checkpoint: of the one that is there, or else of what was measured last."""
    try:
        weights = identity(checkpoints(run) / step_name(step))
    except FileNotFoundError:
        weights = None
    return checkpoint_figures(run, step, weights)


class Evaluated(NamedTuple):
    """What was measured of a step's weights."""

    step: int
    values: Mapping[tuple[str, str], float]
    """By (split, metric)."""


def evaluation_history(run: Path) -> list[Evaluated]:
    """Every step that was evaluated, oldest first: while the run trained, and after."""
    found = dict(read_evaluations(run))
    for step in evaluated_steps(run):
        found[step] = [*found.get(step, ()), *figures_of(run, step)]
    return [Evaluated(step, {(figure.split, figure.metric): figure.value for figure in found[step]}) for step in sorted(found)]


class HistoryTable(NamedTuple):
    """Figures of several steps."""

    steps: tuple[int, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]
    """A figure's name, and its value at each step."""
    num_left_out: int
    """Older steps."""


def history_table(history: Sequence[Evaluated]) -> HistoryTable | None:
    """The newest steps beside each other; None where there are fewer than two."""
    if len(history) < 2:
        return None
    shown = history[-_MOST_STEPS:]
    names = dict.fromkeys(name for each in shown for name in each.values)
    rows = tuple((" ".join(name), tuple(each.values.get(name) for each in shown)) for name in names)
    return HistoryTable(tuple(each.step for each in shown), rows, len(history) - len(shown))


class Faults(NamedTuple):
    """What went wrong in a run and was borne."""

    samples: tuple[tuple[str, str, int], ...]
    """Source, cause and number of samples that could not be used, the most first."""
    shards: tuple[tuple[str, int], ...]
    """Those with the most of them."""
    num_bad_steps: int
    bad_steps: tuple[tuple[int, str], ...]
    """The last steps that were left out as not finite, each with the keys of some of its samples."""
    counts: tuple[tuple[str, int], ...]
    """Anything else that is counted and was not zero."""


def read_faults(run: Path, rows: Sequence[Mapping[str, Any]]) -> Faults:
    """The faults of a run with these rows of metrics."""
    last = rows[-1] if rows else {}
    samples = sorted(last.get("invalid", {}).items(), key=lambda item: -item[1])
    quarantine = run / QUARANTINE
    worst = Counter(row["shard"] for row in read_quarantine(quarantine)) if quarantine.exists() else Counter[str]()
    bad = read_bad_steps(run)
    shown = [(row["step"], ", ".join([key for key in row["keys"] if key][:3])) for row in bad[-_MOST_BAD_STEPS:]]
    counted = {
        "loader processes that died and were replaced, in the last start": last.get("lost_workers", 0),
        "failed tries to send a checkpoint to its mirror, in the last start": last.get("mirror_failures", 0),
    }
    return Faults(
        tuple((*name.rpartition("/")[::2], count) for name, count in samples),
        tuple(worst.most_common(_MOST_SHARDS)),
        max(last.get("bad_steps", 0), len(bad)),
        tuple(shown),
        tuple((name, count) for name, count in counted.items() if count),
    )


def read_bad_steps(run: Path) -> list[dict[str, Any]]:
    """Steps that were left out as not finite, oldest first, each with its samples' `keys`."""
    return read_whole_lines(run / "bad_steps.jsonl")
