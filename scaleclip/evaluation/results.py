"""results.json of a run folder: the figures of its newest evaluation."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scaleclip.files import write_atomic

RESULTS = "results.json"


class Figure(NamedTuple):
    """One figure of an evaluation; shares are in 0..1."""

    split: str
    metric: str
    value: float
    chance: float
    """What a random answer gives."""
    majority: float | None = None
    """What always answering the most frequent class gives; None for retrieval."""
    low: float | None = None
    """Lower end of the figure's 95 % interval; None where none was made."""
    high: float | None = None
    """Upper end."""

    @property
    def interval(self) -> str:
        """The interval in per cent, for people; empty where none was made."""
        return "" if self.low is None or self.high is None else f"{100 * self.low:.1f} to {100 * self.high:.1f}"


def write_results(folder: Path, step: int, figures: Sequence[Figure]) -> None:
    """Write the figures of the weights after `step` optimizer steps."""
    rows = [figure._asdict() for figure in figures]
    write_atomic(folder / RESULTS, json.dumps({"step": step, "figures": rows}, indent=2))


def read_results(folder: Path) -> list[Figure]:
    """The figures in a run's folder."""
    return [Figure(**row) for row in json.loads((folder / RESULTS).read_text())["figures"]]


def finished_step(folder: Path) -> int | None:
    """The step that was evaluated; a run is finished when that is its last. None before any evaluation."""
    path = folder / RESULTS
    return int(json.loads(path.read_text())["step"]) if path.exists() else None
