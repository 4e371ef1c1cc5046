"""Figures of evaluations on a terminal."""

import itertools
import os
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from scaleclip.evaluation.results import Figure

_WIDE = 160


def wide_console(*, quiet: bool = False) -> Console:
    """A console that cuts no table short where no terminal says how wide it is."""
    console = Console(quiet=quiet)
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(quiet=quiet, width=_WIDE)


def results_table(title: str, figures: Sequence[Figure]) -> Table:
    """Figures with chance, majority class and, where any has one, the 95 % interval beside each."""
    table = Table(title=title, title_justify="left")
    for column in ("split", "figure"):
        table.add_column(column, no_wrap=True, overflow="fold")
    intervals = ["95 %"] if any(figure.interval for figure in figures) else []
    majorities = ["majority class"] if any(figure.majority is not None for figure in figures) else []
    for column in ("measured", *intervals, "chance", *majorities):
        table.add_column(column, justify="right")
    for split, rows in itertools.groupby(figures, key=lambda figure: figure.split):
        for row in rows:
            majority = ["" if row.majority is None else f"{row.majority:.1%}"] if majorities else []
            interval = [row.interval] if intervals else []
            table.add_row(split, row.metric, f"{row.value:.1%}", *interval, f"{row.chance:.1%}", *majority)
        table.add_section()
    return table
