"""Figures of evaluations on a terminal."""

import itertools
from collections.abc import Sequence

from rich.table import Table

from scaleclip.evaluation.results import Figure


def results_table(title: str, figures: Sequence[Figure]) -> Table:
    """Figures with 95 % interval, chance and majority class beside each."""
    table = Table(title=title, title_justify="left")
    table.add_column("split")
    table.add_column("figure")
    for column in ("measured", "95 %", "chance", "majority class"):
        table.add_column(column, justify="right")
    for split, rows in itertools.groupby(figures, key=lambda figure: figure.split):
        for row in rows:
            majority = "" if row.majority is None else f"{row.majority:.1%}"
            table.add_row(split, row.metric, f"{row.value:.1%}", row.interval, f"{row.chance:.1%}", majority)
        table.add_section()
    return table
