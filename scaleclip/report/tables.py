"""The rows of a report's tables, from what lies in a run's folder."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from scaleclip.data.tally import QUARANTINE, read_quarantine
from scaleclip.evaluation.results import Figure
from scaleclip.evaluation.targets import Target
from scaleclip.metrics import read_evaluations, read_whole_lines

_MOST_STEPS, _MOST_SHARDS, _MOST_BAD_STEPS = 8, 5, 10


class TargetValue(NamedTuple):
    """What a figure should be."""

    value: float
    """A share in 0..1, as the figure."""
    source: str
    """Who says so."""


class Result(NamedTuple):
    """A figure with what it is held against."""

    figure: Figure
    target: TargetValue | None

    @property
    def difference(self) -> float | None:
        """Measured less expected."""
        return None if self.target is None else self.figure.value - self.target.value


def target_values(target: Target) -> dict[tuple[str, str], TargetValue]:
    """What a system is reported to reach, by (split, metric)."""
    return {
        (each.dataset, each.metric): TargetValue(each.percent / 100, f"{target.source}, {each.where}")
        for each in target.figures
    }


def result_groups(figures: Sequence[Figure], targets: Mapping[tuple[str, str], TargetValue]) -> list[tuple[str, list[Result]]]:
    """Figures by split, in their order, each with its target by (split, metric)."""
    return [
        (split, [Result(figure, targets.get((figure.split, figure.metric))) for figure in rows])
        for split, rows in groupby(figures, key=lambda figure: figure.split)
    ]


def evaluation_history(run: Path) -> list[dict[str, Any]]:
    """A row a step that was evaluated, oldest first: `step`, and each figure's value by "SPLIT METRIC".

    Of evaluations.jsonl, and of RUN/evaluations, whose figures are those of the same weights.
    """
    found: dict[int, dict[str, Any]] = {row["step"]: dict(row) for row in read_evaluations(run)}
    for path in sorted((run / "evaluations").glob("**/*.json")):
        # a file a data set, below step_00000500/
        named = re.search(r"step_(\d+)", str(path.relative_to(run)))
        content = json.loads(path.read_text())
        if named and "figures" in content:
            step = int(named[1])
            values = {f"{row['split']} {row['metric']}": row["value"] for row in content["figures"]}
            found.setdefault(step, {"step": step}).update(values)
    return [found[step] for step in sorted(found)]


class HistoryTable(NamedTuple):
    """Figures of several steps."""

    steps: tuple[int, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]
    """A figure's name, and its value at each step."""
    num_left_out: int
    """Older steps."""


def history_table(history: Sequence[Mapping[str, Any]]) -> HistoryTable | None:
    """The newest steps beside each other; None where there are fewer than two."""
    if len(history) < 2:
        return None
    shown = history[-_MOST_STEPS:]
    names = dict.fromkeys(name for row in shown for name in row if name != "step")
    rows = tuple((name, tuple(row.get(name) for row in shown)) for name in names)
    return HistoryTable(tuple(row["step"] for row in shown), rows, len(history) - len(shown))


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
