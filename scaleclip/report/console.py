"""Figures of evaluations on a terminal."""

import itertools
from collections.abc import Sequence

from rich.table import Table

from scaleclip.evaluation.results import Figure


def results_table(title: str, figures: Sequence[Figure]) -> Table:
    """Figures with chance, majority class and, where any has one, the 95 % interval beside each."""
    table = Table(title=title, title_justify="left")
    table.add_column("split")
    table.add_column("figure")
    intervals = ["95 %"] if any(figure.interval for figure in figures) else []
    for column in ("measured", *intervals, "chance", "majority class"):
        table.add_column(column, justify="right")
    for split, rows in itertools.groupby(figures, key=lambda figure: figure.split):
        for row in rows:
            majority = "" if row.majority is None else f"{row.majority:.1%}"
            interval = [row.interval] if intervals else []
            table.add_row(split, row.metric, f"{row.value:.1%}", *interval, f"{row.chance:.1%}", majority)
        table.add_section()
    return table
