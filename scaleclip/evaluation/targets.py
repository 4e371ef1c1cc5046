"""What papers report of the systems that are reproduced here (configs/targets.yaml), held against what was measured."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from rich.table import Table

from scaleclip.config import Section
from scaleclip.config_io import parse_section
from scaleclip.errors import ConfigError
from scaleclip.evaluation.results import Figure
from scaleclip.files import resolve_path

TARGETS = "package:scaleclip/configs/targets.yaml"


class TargetFigure(Section):
    dataset: str
    """As suites and results name it; `laclip-15` is the mean over those data sets."""
    metric: str
    """As results name it."""
    percent: float
    """In per cent, as reported."""
    where: str
    """Which of the source's experiments, tables or pages it is from."""
    checked: str | None = None
    """Public page at which the figure was read again; none: it is as recorded from the source."""


class Target(Section):
    """A system and its reported figures."""

    system: str
    """Method, model and pre-training data."""
    source: str
    """Paper or page."""
    figures: tuple[TargetFigure, ...]
    """What it reports."""


class Compared(NamedTuple):
    """What is reported beside what was measured."""

    reported: TargetFigure | None
    measured: Figure | None

    @property
    def difference(self) -> float | None:
        """Measured less reported, in points (per cent of the whole); None without one of them."""
        if self.reported is None or self.measured is None:
            return None
        return 100 * self.measured.value - self.reported.percent


class _Targets(Section):
    targets: Mapping[str, Target]


def load_targets() -> Mapping[str, Target]:
    """Every target by name."""
    tree = yaml.safe_load(Path(resolve_path(TARGETS)).read_text())
    return parse_section(_Targets, {"targets": tree}).targets


def load_target(name: str) -> Target:
    """The target of this name. Raises ConfigError where there is none."""
    targets = load_targets()
    if name not in targets:
        close = difflib.get_close_matches(name, list(targets), n=3, cutoff=0.5)
        hint = f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
        raise ConfigError(f"--against={name}: there is no such target{hint}; configs/targets.yaml has {', '.join(targets)}")
    return targets[name]


def compare(target: Target, figures: Sequence[Figure]) -> list[Compared]:
    """Every reported figure with the measured one of its data set and metric, the first of `figures` if there are several."""
    measured: dict[tuple[str, str], Figure] = {}
    for figure in figures:
        measured.setdefault((figure.split, figure.metric), figure)
    return [Compared(each, measured.get((each.dataset, each.metric))) for each in target.figures]


def beside(figures: Sequence[Figure], target: Target | None) -> list[Compared]:
    """Every measured figure with what is reported of its data set and metric."""
    reported = {(each.dataset, each.metric): each for each in target.figures} if target else {}
    return [Compared(reported.get((figure.split, figure.metric)), figure) for figure in figures]


def targets_table(target: Target, figures: Sequence[Figure]) -> Table:
    """Reported figures beside the measured ones, in per cent."""
    table = Table(title=f"against {target.system}: {target.source}", title_justify="left")
    for column in ("data set", "figure"):
        table.add_column(column, no_wrap=True, overflow="fold")
    for column in ("expected", "measured", "difference", "95 %"):
        table.add_column(column, justify="right")
    table.add_column("source")
    for reported, each in zip(target.figures, compare(target, figures), strict=True):
        columns = ["not measured", "", ""]
        if each.measured is not None and each.difference is not None:
            columns = [f"{100 * each.measured.value:.2f}", f"{each.difference:+.2f}", each.measured.interval]
        where = reported.where + (f" ({reported.checked})" if reported.checked else "")
        table.add_row(reported.dataset, reported.metric, f"{reported.percent:.2f}", *columns, where)
    return table
