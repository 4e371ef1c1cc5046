"""Figures on disk, a file a data set, so that what was measured of a model is not measured again."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

from scaleclip.evaluation.results import RESULTS, Figure, finished_step, read_results
from scaleclip.files import write_atomic

# of how figures are made and of the files' form: another one makes what was saved unfindable
_VERSION = 1
_log = logging.getLogger("scaleclip")


class SavedFigures:
    """The figures of one model in a folder.

    Args:
        folder: made when something is saved.
        identity: what the model's weights are; figures of others are none.
        step: optimizer steps of a checkpoint, for readers; None for models from elsewhere.
    """

    def __init__(self, folder: Path, identity: str, step: int | None) -> None:
        self.folder, self._identity, self._step = folder, identity, step

    def find(self, name: str, definition: str) -> list[Figure] | None:
        """What was saved of an evaluation; None where nothing was, or of other weights or by another definition."""
        tree = _read(self.path(name))
        return _figures(tree) if tree and tree["of"] == self._digest(definition) else None

    def save(self, name: str, definition: str, figures: Sequence[Figure]) -> None:
        """Keep the figures of an evaluation."""
        self._save(name, self._digest(definition), {}, figures)

    def save_mean(self, name: str, figure: Figure, parts: Sequence[str]) -> None:
        """Keep a mean of evaluations that were saved; it holds for as long as they stay what they are."""
        files = [self.path(part) for part in parts]
        of = {path.name: (_read(path) or {})["of"] for path in files}
        self._save(name, self._digest(json.dumps(of)), of, [figure])

    def path(self, name: str) -> Path:
        """Of an evaluation's file."""
        return self.folder / f"{quote_plus(name)}.json"

    def features(self, name: str) -> Path:
        """Folder for what an evaluation has encoded, until its figures are saved."""
        return self.path(name).with_suffix(".features")

    def _save(self, name: str, of: str, parts: dict[str, str], figures: Sequence[Figure]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tree = {
            "version": _VERSION, "evaluation": name, "step": self._step, "weights": self._identity, "of": of, "parts": parts,
            "figures": [figure._asdict() for figure in figures],
        }  # fmt: skip
        write_atomic(self.path(name), json.dumps(tree, indent=2))

    def _digest(self, definition: str) -> str:
        return hashlib.sha256(f"{self._identity}\n{definition}".encode()).hexdigest()[:16]


def evaluations(run: Path) -> Path:
    """Where a run's evaluations lie, a folder a checkpoint, which is called as that is."""
    return run / "evaluations"


def read_saved(folder: Path, identity: str) -> list[Figure]:
    """Every figure of these weights in such a folder, by file name, but means of what was measured anew since."""
    trees = {path.name: tree for path in sorted(folder.glob("*.json")) if (tree := _read(path))}
    return [
        figure
        for tree in trees.values()
        if tree["weights"] == identity and all(trees.get(part, {}).get("of") == of for part, of in tree["parts"].items())
        for figure in _figures(tree)
    ]


def checkpoint_figures(run: Path, step: int, identity: str | None = None) -> list[Figure]:
    """Every figure that a run's folder has of a checkpoint: what the run measures itself, then what else was measured.

    Args:
        run: its folder.
        step: the checkpoint's.
        identity: of its weights; none: those that were measured last.
    """
    own = read_results(run) if finished_step(run) == step else []
    known = {(figure.split, figure.metric) for figure in own}
    folder = _by_step(run).get(step)
    if folder is None:
        return own
    saved = read_saved(folder, identity or _last_measured(folder))
    return own + [figure for figure in saved if (figure.split, figure.metric) not in known]


def evaluated_steps(run: Path) -> list[int]:
    """Steps of a run's checkpoints of which there are figures, in order."""
    of_its_end = finished_step(run)
    steps = {*_by_step(run), *([] if of_its_end is None else [of_its_end])}
    return sorted(step for step in steps if checkpoint_figures(run, step))  # a folder may be of one that is being measured


def drop_after(run: Path, step: int) -> None:
    """Delete the figures of a run's later checkpoints: it went back to `step`, and their weights are none of its any more.

    What cannot be deleted is a warning: a job may be writing there, and training goes before figures.
    """
    if (finished_step(run) or 0) > step:
        (run / RESULTS).unlink()
    for number, path in _by_step(run).items():
        if number > step:
            doomed = path.with_name(f".{path.name}-left-behind")
            try:
                os.rename(path, doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                _log.warning(f"{path}, figures of weights that the run left behind, cannot be deleted: {error}")


def _by_step(run: Path) -> dict[int, Path]:
    return {int(path.name.removeprefix("step_")): path for path in evaluations(run).glob("step_*")}


def _last_measured(folder: Path) -> str:
    files = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return next((tree["weights"] for path in reversed(files) if (tree := _read(path))), "")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        tree: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return tree if tree.get("version") == _VERSION else None


def _figures(tree: dict[str, Any]) -> list[Figure]:
    return [Figure(**row) for row in tree["figures"]]
