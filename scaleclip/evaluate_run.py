"""Evaluations of a run's checkpoints, after training or beside it."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from scaleclip.checkpoint.folders import damage, saved
from scaleclip.data.cache import ShardCache
from scaleclip.errors import ConfigError
from scaleclip.evaluation.encoder import Encoder
from scaleclip.evaluation.evaluate import evaluate
from scaleclip.evaluation.results import Figure, write_results
from scaleclip.evaluation.splits import open_splits
from scaleclip.files import write_atomic
from scaleclip.run_folder import read_config
from scaleclip.trained_model import load_checkpoint, newest_whole


def evaluate_newest(run: Path, splits: Sequence[str]) -> tuple[int, list[Figure]]:
    """Step and figures of a run's newest whole checkpoint; of the run's own splits, they become its results.json.

    Args:
        run: the run's folder.
        splits: descriptions to take in place of the run's own.

    Raises:
        ConfigError: no run, no whole checkpoint, or no splits.
    """
    step, figures = _evaluate(run, newest_whole(run), splits)
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


def _evaluate(run: Path, path: Path, splits: Sequence[str]) -> tuple[int, list[Figure]]:
    patterns = splits or read_config(run).eval.splits
    if not patterns:
        raise ConfigError("eval.splits of this run is empty: name some with --split")
    step, config, model, tokenizer = load_checkpoint(run, path)
    encoder = Encoder(model, tokenizer, config.model.image.size, config.eval.batch)
    return step, evaluate(encoder, open_splits(patterns, ShardCache(config.data.cache)))
