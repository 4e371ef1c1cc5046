"""A run's folder as one page, report.html, and its pictures, report/*.png."""

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from scaleclip.config import RunConfig
from scaleclip.config_io import to_yaml
from scaleclip.data.cache import ShardCache
from scaleclip.errors import ConfigError, RunError
from scaleclip.evaluation.encoder import Encoder
from scaleclip.evaluation.saved import evaluated_steps
from scaleclip.evaluation.splits import open_splits
from scaleclip.evaluation.targets import Target, compare
from scaleclip.files import write_atomic
from scaleclip.metrics import read_rows
from scaleclip.report.curves import Marks, Measured, draw_curves
from scaleclip.report.drawings import draw_sheet
from scaleclip.report.picture import Picture
from scaleclip.report.sheets import Sheet, make_sheet
from scaleclip.report.tables import (
    Evaluated,
    evaluation_history,
    figures_of,
    history_table,
    read_bad_steps,
    read_faults,
    result_groups,
)
from scaleclip.report.templates import render
from scaleclip.run_folder import read_config, read_starts
from scaleclip.status import Status, read_status
from scaleclip.trained_model import load_model

PAGE, PICTURES = "report.html", "report"


def write_report(run: Path, *, seed: int = 0, with_sheets: bool = True, target: Target | None = None) -> Path:
    """Write RUN/report.html, which needs no other file and no network, and RUN/report/*.png; the page's path.

    The run may be going on, and may have nothing but its configuration: what is not there is said on the page.

    Args:
        run: the run's folder.
        seed: of the draw of queries.
        with_sheets: encode the run's own splits with its newest whole checkpoint.
        target: whose reported figures stand beside the measured ones.

    Raises:
        ConfigError: the folder holds no run.
    """
    config = read_config(run)
    rows, starts, status = read_rows(run), read_starts(run), read_status(run)
    evaluations = evaluation_history(run)
    curves = _draw_curves(run, rows, starts, evaluations)
    step, sheets, missing = _make_sheets(run, config, seed) if with_sheets else (None, [], "it was asked to be")
    drawings = [draw_sheet(sheet) for sheet in sheets]
    pictures = [*curves, *(picture for drawn in drawings for picture in drawn)]
    _write_pictures(run / PICTURES, pictures)
    evaluated = evaluated_steps(run)
    figures = figures_of(run, evaluated[-1]) if evaluated else []
    page = render(
        "page.html.jinja",
        run=run.resolve(),
        made=time.strftime("%Y-%m-%d %H:%M %Z"),
        facts=_facts(status, rows, starts),
        status=status,
        curves=curves[1:],
        has_stages=len({row["stage"] for row in rows}) > 1,
        num_restarts=len(_restarts(rows, starts)),
        results=result_groups(figures, target),
        results_step=evaluated[-1] if evaluated else None,
        not_measured=[each.reported for each in compare(target, figures) if each.measured is None] if target else [],
        target=target,
        history=history_table(evaluations),
        sheets=list(zip(sheets, (drawn[0] for drawn in drawings), strict=True)),
        sheets_step=step,
        sheets_missing=missing,
        seed=seed,
        faults=read_faults(run, rows),
        starts=starts,
        config=to_yaml(config),
    )
    write_atomic(run / PAGE, page)
    return run / PAGE


def _draw_curves(
    run: Path, rows: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]], evaluations: Sequence[Evaluated]
) -> list[Picture]:
    if not rows:
        return []
    stages = [
        (before["samples"], f"stage {row['stage']}")
        for before, row in itertools.pairwise(rows)
        if row["stage"] != before["stage"]
    ]
    bad = _samples_at(rows, [row["step"] for row in read_bad_steps(run)])
    evaluated = _samples_at(rows, [each.step for each in evaluations])
    measured = [Measured(samples, each.values) for samples, each in zip(evaluated, evaluations, strict=True)]
    last = rows[-1]
    title = f"{run.resolve().name}: {last['step']:,} steps, {last['samples']:,} pairs, {last['epoch']:.1f} epochs"
    return draw_curves(title, rows, Marks(stages, _samples_at(rows, _restarts(rows, starts)), bad), measured)


def _restarts(rows: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]]) -> list[int]:
    """Steps that later starts went on from; without starts that did nothing, and those of versions that did not note it."""
    last = rows[-1]["step"] if rows else 0
    return sorted({start["step"] for start in starts[1:] if start.get("step", last) < last})


def _samples_at(rows: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> list[int]:
    """Pairs seen after steps, in proportion between the rows."""
    known_steps, known_samples = ([0, *(row[key] for row in rows)] for key in ("step", "samples"))
    return [round(float(samples)) for samples in np.interp(np.array(steps, float), known_steps, known_samples)]


def _make_sheets(run: Path, config: RunConfig, seed: int) -> tuple[int | None, list[Sheet], str]:
    """The step of the weights, a sheet a split, and why there is none."""
    if not config.eval.splits:
        return None, [], "the run has no eval.splits"
    try:
        trained = load_model(str(run))
        splits = open_splits(config.eval.splits, ShardCache(config.data.cache))
        encoder = Encoder(trained.model, trained.tokenizer, trained.model_config.image.size, config.eval.batch)
        columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
        progress = Progress(*columns, transient=True, disable=not Console().is_terminal)
        with progress:
            task = progress.add_task("retrieval", total=sum(each.num_images + len(each.split.gallery) for each in splits))
            sheets = [make_sheet(encoder, each, seed, lambda done: progress.advance(task, done)) for each in splits]
    except (ConfigError, RunError, OSError, torch.OutOfMemoryError) as error:  # the run may go on, on this device too
        return None, [], str(error)
    return trained.step, sheets, ""


def _facts(
    status: Status | None, rows: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """Names and values for the top of the page."""
    found = []
    if rows:
        last = rows[-1]
        loss = "not finite" if last["loss"] is None or not math.isfinite(last["loss"]) else f"{last['loss']:.3f}"
        found.append((f"steps of {status.steps:,}" if status else "steps", f"{last['step']:,}"))
        found += [("pairs seen", f"{last['samples']:,}"), ("epochs", f"{last['epoch']:.1f}"), ("loss", loss)]
        found.append(("pairs / s", f"{float(np.median([row['pairs_per_s'] for row in rows])):,.0f}"))
    if status:
        found.append(("device-hours", f"{status.device_hours:,.2f}"))
        if status.state == "running" and status.eta_s is not None:
            found.append(("to go", f"{status.eta_s / 3600:,.1f} h"))
    if starts:
        found += [("ranks", str(starts[-1]["world_size"])), ("starts", str(len(starts)))]
    return found


def _write_pictures(folder: Path, pictures: Sequence[Picture]) -> None:
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):  # of a split that is no longer the run's, say
        old.unlink()
    for picture in pictures:
        write_atomic(folder / f"{picture.name}.png", picture.png)
