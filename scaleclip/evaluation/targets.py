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
    """A reported figure beside the measured one."""

    target: TargetFigure
    measured: Figure | None
    """None where that was not measured."""

    @property
    def difference(self) -> float | None:
        """Measured less reported, in points (per cent of the whole)."""
        return None if self.measured is None else 100 * self.measured.value - self.target.percent


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


def targets_table(target: Target, compared: Sequence[Compared]) -> Table:
    """Reported figures beside the measured ones, in per cent."""
    table = Table(title=f"against {target.system}: {target.source}", title_justify="left", caption_justify="left")
    for column in ("data set", "figure"):
        table.add_column(column)
    for column in ("expected", "measured", "difference", "95 %"):
        table.add_column(column, justify="right")
    table.add_column("source")
    for each in compared:
        measured, difference = each.measured, each.difference
        columns = ["not measured", "", ""]
        if measured is not None and difference is not None:
            columns = [f"{100 * measured.value:.2f}", f"{difference:+.2f}", measured.interval]
        where = each.target.where + (f" ({each.target.checked})" if each.target.checked else "")
        table.add_row(each.target.dataset, each.target.metric, f"{each.target.percent:.2f}", *columns, where)
    absent = [each for each in compared if each.measured is None]
    if absent:
        named = ", ".join(dict.fromkeys(f"{each.target.metric} of {each.target.dataset}" for each in absent))
        table.caption = f"without a measured figure: {named}"
    return table
