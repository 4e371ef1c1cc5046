"""Evaluations of a run's checkpoints, after training or beside it."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from scaleclip.checkpoint.folders import damage, newest, saved
from scaleclip.checkpoint.loading import load_weights
from scaleclip.checkpoint.state import read_state
from scaleclip.config import RunConfig
from scaleclip.data.cache import ShardCache
from scaleclip.data.tokenizer import Tokenizer, load_tokenizer
from scaleclip.errors import ConfigError
from scaleclip.evaluation.evaluate import evaluate
from scaleclip.evaluation.results import Figure, write_results
from scaleclip.evaluation.splits import open_splits
from scaleclip.files import write_atomic
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.run_folder import read_config
from scaleclip.stages import stage_before, stages_of


def evaluate_newest(run: Path, splits: Sequence[str]) -> tuple[int, list[Figure]]:
    """Step and figures of a run's newest whole checkpoint; of the run's own splits, they become its results.json.

    Args:
        run: the run's folder.
        splits: descriptions to take in place of the run's own.

    Raises:
        ConfigError: no run, no whole checkpoint, or no splits.
    """
    step, figures = _evaluate(run, _newest(run), splits)
    if not splits:
        write_results(run, step, figures)
    return step, figures


def evaluate_all(run: Path) -> Iterator[tuple[int, list[Figure]]]:
    """Steps and figures of every whole checkpoint that a run has kept, oldest first, also in RUN/evaluations/step_X.json; those
    that are there already are read from there.

    Raises:
        ConfigError: no run, no whole checkpoint, or no splits.
    """
    paths = [path for path in saved(run) if damage(path) is None]
    if not paths:
        raise ConfigError(f"{run} has no whole checkpoint to evaluate: train first")
    (run / "evaluations").mkdir(exist_ok=True)
    for path in paths:
        target = run / "evaluations" / f"{path.name}.json"
        if target.exists():
            there = json.loads(target.read_text())
            yield there["step"], [Figure(**row) for row in there["figures"]]
            continue
        step, figures = _evaluate(run, path, ())
        rows = [figure._asdict() for figure in figures]
        write_atomic(target, json.dumps({"step": step, "figures": rows}, indent=2))
        yield step, figures


class Loaded(NamedTuple):
    """A checkpoint's model, ready to encode."""

    step: int
    config: RunConfig
    """Of the stage that saved it."""
    model: DualEncoder
    """In evaluation mode, on a GPU if there is one."""
    tokenizer: Tokenizer


def load_newest(run: Path) -> Loaded:
    """The model of a run's newest whole checkpoint.

    Raises:
        ConfigError: no run, or no whole checkpoint.
    """
    return load_checkpoint(run, _newest(run))


def load_checkpoint(run: Path, path: Path) -> Loaded:
    """The model of a checkpoint whose checksums hold. Raises ConfigError where the folder holds no run."""
    whole, step = read_config(run), read_state(path).step
    config = stage_before(stages_of(whole), step).config
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = DualEncoder(config.model.without_pretrained()).to(device)
    # persistent buffers, which some towers have, are constants and not in a checkpoint
    model.load_state_dict(model.state_dict() | load_weights(path))
    tokenizer = load_tokenizer(config.model.text.tokenizer, config.model.text.context_length)
    return Loaded(step, config, model.eval(), tokenizer)


def _newest(run: Path) -> Path:
    path = newest(run)
    if path is None and (found := saved(run)):
        raise ConfigError(f"{run}: all checkpoints are damaged, the newest one by this: {damage(found[-1])}")
    if path is None:
        raise ConfigError(f"{run} has no checkpoint to evaluate: train first")
    return path


def _evaluate(run: Path, path: Path, splits: Sequence[str]) -> tuple[int, list[Figure]]:
    patterns = splits or read_config(run).eval.splits
    if not patterns:
        raise ConfigError("eval.splits of this run is empty: name some with --split")
    step, config, model, tokenizer = load_checkpoint(run, path)
    return step, evaluate(model, tokenizer, open_splits(patterns, ShardCache(config.data.cache)), config)
