"""A run folder as pictures and tables."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from rich.table import Table

from scaleclip.errors import ConfigError
from scaleclip.evaluation.results import Figure
from scaleclip.metrics import read_rows

_CURVES = {
    "loss": "loss",
    "lr": "learning rate",
    "logit_scale": "logit scale",
    "grad_norm": "gradient norm",
    "pairs_per_s": "pairs / s",
    "data_wait": "share of time waiting for data",
}


def plot_run(folder: Path) -> Path:
    """Write curves.png, the training curves of a run against samples seen, into its folder.

    Raises:
        ConfigError: the folder has no metrics.
    """
    rows = read_rows(folder)
    if not rows:
        raise ConfigError(f"{folder} has no metrics.jsonl with rows: train first, or name the run's folder")
    samples = [row["samples"] for row in rows]
    figure, panels = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained", sharex=True)
    for panel, (name, title) in zip(panels.flat, _CURVES.items(), strict=True):
        panel.plot(samples, [row[name] for row in rows], linewidth=1.2)
        panel.set_title(title, loc="left", fontsize=10)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        if name in ("pairs_per_s", "data_wait"):
            panel.set_ylim(bottom=0)
    for panel in panels[-1]:
        panel.set_xlabel("pairs seen")
        panel.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    last = rows[-1]
    ranks = f"{last['world_size']} rank" + ("s" if last["world_size"] > 1 else "")
    title = f"{folder.name}: {last['step']:,} steps, {last['samples']:,} pairs, {last['epoch']:.1f} epochs, {ranks}"
    figure.suptitle(title, fontsize=11)
    path = folder / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def results_table(title: str, figures: Sequence[Figure]) -> Table:
    """Figures with chance and majority class beside each."""
    table = Table(title=title, title_justify="left")
    table.add_column("split")
    table.add_column("figure")
    for column in ("measured", "chance", "majority class"):
        table.add_column(column, justify="right")
    for split, rows in itertools.groupby(figures, key=lambda figure: figure.split):
        for row in rows:
            majority = "" if row.majority is None else f"{row.majority:.1%}"
            table.add_row(split, row.metric, f"{row.value:.1%}", f"{row.chance:.1%}", majority)
        table.add_section()
    return table
