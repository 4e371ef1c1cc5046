"""Evaluations of models: checkpoints of a run, after training or while it trains, and models from elsewhere.

Figures are kept a data set a file, RUN/evaluations/step_X/ for a run, and what is there of the same weights and by the same
definition is not measured again: an evaluation that was killed goes on with the data set that it was at.
"""

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from scaleclip.checkpoint.folders import damage, identity, newest_whole, saved, step_name
from scaleclip.checkpoint.state import STATE, read_state
from scaleclip.config import CacheConfig, EvalConfig, ModelConfig
from scaleclip.data.cache import ShardCache
from scaleclip.distributed import all_or_none, gather_objects, on_main
from scaleclip.errors import ConfigError, RunError
from scaleclip.evaluation.encoder import Encoder
from scaleclip.evaluation.evaluate import distinct, occurrences
from scaleclip.evaluation.fingerprint import digest, stamp
from scaleclip.evaluation.results import Figure, write_results
from scaleclip.evaluation.saved import SavedFigures, evaluations
from scaleclip.evaluation.suite import open_evaluations
from scaleclip.exchange.source import files_of
from scaleclip.run_folder import read_config
from scaleclip.status import read_status
from scaleclip.trained_model import TrainedModel, load_model

POLL_S = 20.0
# after which a run that has failed is given up: its job may wait in the queue for that long before it starts again
_FAILED_S = 3600.0
# what folders of other models have
_OF_OTHERS = (STATE, "config.json", "open_clip_config.json")
log = logging.getLogger("scaleclip")
OnDone = Callable[[str, int, int], None]


class Subject(NamedTuple):
    """A model to evaluate, not loaded yet."""

    name: str
    """Of its folder; of a checkpoint, RUN-step_X."""
    reference: str
    """What load_model takes."""
    identity: str
    """Of its weights and of what they are in."""
    step: int | None
    """Optimizer steps, of a checkpoint."""
    architecture: ModelConfig | None = None
    """Of a file of weights that does not say it."""


class Evaluated(NamedTuple):
    """What was measured of a model."""

    subject: Subject
    figures: list[Figure]


Place = Callable[[Subject], Path | None]
"""Where the figures of a model are kept; None: nowhere."""


def in_run(run: Path) -> Place:
    """In the folder of the run whose checkpoints are measured."""
    return lambda subject: evaluations(run) / step_name(subject.step or 0)


def below(folder: Path) -> Place:
    """Below a folder, into one that no other model has."""
    return lambda subject: folder / f"{subject.name}-{subject.identity[:8]}"


class Session:
    """Evaluations, opened, and where their figures are kept. Every rank makes one and calls with the same.

    Args:
        config: what to measure.
        cache: local copies of remote shards.
        place: where figures are kept.
        skip_missing: leave out data sets that are not there.
        on_done: called on every rank with the name, number and count of an evaluation when it is done.

    Raises:
        ConfigError: nothing is to be measured, or something is not there.
    """

    def __init__(
        self,
        config: EvalConfig,
        cache: ShardCache,
        place: Place = lambda _: None,
        *,
        skip_missing: bool = False,
        on_done: OnDone = lambda *_: None,
    ) -> None:
        with all_or_none():
            self.suite = open_evaluations(config, cache, skip_missing=skip_missing)
            if not self.suite.evaluations:
                raise ConfigError(
                    "there is nothing to measure: eval.splits and eval.suite are empty; name a --suite or --split"
                )
        self.suite.check_same_everywhere()
        names = [each.name for each in self.suite.evaluations]
        self._names = [
            name if number == 1 else f"{name} ({number})" for name, number in zip(names, occurrences(names), strict=True)
        ]
        self.config, self.folder, self._on_done = config, place, on_done

    def evaluate(self, subject: Subject) -> Evaluated | None:
        """Its figures; None where it was deleted before it was loaded, which a warning says.

        Raises:
            ConfigError, RunError: it cannot be loaded, or something in the data cannot be used.
        """
        folder = self.folder(subject)
        kept = SavedFigures(folder, subject.identity, subject.step) if folder else None
        items = list(zip(self._names, self.suite.evaluations, strict=True))
        found = on_main(lambda: [kept.find(name, each.definition) if kept else None for name, each in items])
        parts = [part for part in found if part is not None]
        if len(parts) < len(items):
            model = _load(subject)
            if model is None:
                return None
            encoder = Encoder(model.model, model.tokenizer, model.model_config.image.size, self.config.batch)
            try:
                with encoder.evaluating():
                    parts = [
                        self._measure(encoder, number, kept) if part is None else part for number, part in enumerate(found)
                    ]
            except torch.OutOfMemoryError as error:
                raise RunError(f"memory is full at --batch={self.config.batch} (eval.batch): give fewer; {error}") from error
        figures = distinct([figure for part in parts for figure in part])
        means = self.suite.means_of(figures)
        if kept:
            for mean, figure in means:
                on_main(partial(kept.save_mean, f"{figure.metric} {figure.split}", figure, mean.parts))
        return Evaluated(subject, figures + [figure for _, figure in means])

    def _measure(self, encoder: Encoder, number: int, kept: SavedFigures | None) -> list[Figure]:
        name, evaluation = self._names[number], self.suite.evaluations[number]
        figures = evaluation.run(encoder, kept.features(name) if kept else None)
        if kept:
            on_main(lambda: kept.save(name, evaluation.definition, figures))
            # which were for a start after a crash
            on_main(lambda: shutil.rmtree(kept.features(name), ignore_errors=True))
        self._on_done(name, number + 1, len(self._names))
        return figures


def evaluate_all(run: Path) -> Iterator[tuple[int, list[Figure]]]:
    """Steps and figures of every whole checkpoint that a run has kept, oldest first, by what the run measures itself.

    Raises:
        ConfigError: no run, no whole checkpoint, or nothing to measure.
    """
    config = read_config(run)
    session = Session(config.eval, ShardCache(config.data.cache), in_run(run))
    for evaluated in map(session.evaluate, subjects(whole_checkpoints(run))):
        if evaluated and evaluated.subject.step is not None:
            yield evaluated.subject.step, evaluated.figures


def write_run_results(run: Path, evaluated: Evaluated) -> None:
    """The figures of its newest checkpoint become a run's results.json. By rank 0."""
    assert evaluated.subject.step is not None
    write_results(run, evaluated.subject.step, evaluated.figures)


def wait_for_run(reference: str, poll_s: float = POLL_S) -> Path | None:
    """The run that was submitted together with this process, when it has begun; None where something else is there. Every rank
    calls."""
    path, said = Path(reference), False

    def look() -> tuple[Path | None, bool]:
        nonlocal said
        run = _run_of(reference)
        waits = run is None and (
            not path.exists() or (path.is_dir() and not any((path / name).exists() for name in _OF_OTHERS))
        )
        if waits and not said:
            log.warning(f"{reference} has not begun yet: waiting for it")  # which shows where nobody set up logging
            said = True
        return run, waits

    while True:
        run, waits = on_main(look)
        if not waits:
            return run
        time.sleep(poll_s)


def run_of(reference: str) -> Path | None:
    """The run that a folder is, or whose checkpoint it is; None for models from elsewhere. Every rank calls."""
    return on_main(lambda: _run_of(reference))


def _run_of(reference: str) -> Path | None:
    path = Path(reference).absolute()
    if (path / STATE).exists():
        path = path.parent.parent
    return path if (path / "config.yaml").exists() and (path / "checkpoints").is_dir() else None


def subject_of(reference: str, architecture: ModelConfig | None = None) -> Subject:
    """The model that a reference names: of a run, its newest whole checkpoint.

    Args:
        reference: a path.
        architecture: of a file of weights that does not say it.

    Raises:
        ConfigError: there is nothing of that name, or the run has no whole checkpoint.
    """
    path = Path(reference)
    if not path.exists():
        raise ConfigError(f"{reference}: there is no such run, checkpoint or model")
    if _run_of(reference) is not None:
        return _checkpoint(path if (path / STATE).exists() else newest_whole(path))
    of_all = digest([*((str(each), *stamp(each)) for each in files_of(reference)), (architecture,)])
    return Subject(path.absolute().name, reference, of_all, None, architecture)


def whole_checkpoints(run: Path) -> list[Path]:
    """Of a run, oldest first, as rank 0 sees them. Every rank calls. Raises ConfigError where there are none."""
    found = on_main(lambda: [path for path in saved(run) if damage(path) is None])
    if not found:
        raise ConfigError(f"{run} has no whole checkpoint to evaluate: train first")
    return found


def checkpoints_as_they_come(run: Path, poll_s: float = POLL_S) -> Iterator[Path]:
    """A run's checkpoints, oldest first, each once, until the run is finished. Every rank iterates.

    One that was written anew, since the run went back to an earlier one, is another.

    Raises:
        RunError: the run has failed, and was not started again for an hour.
    """
    given: set[str] = set()

    def look() -> tuple[str, dict[str, Path]]:
        status = read_status(run)  # first: what a run that has ended has saved is there
        ended = status.state if status is not None and status.state in ("finished", "failed") else ""
        if status is not None and ended == "failed" and time.time() - status.updated_s < _FAILED_S:
            ended = ""
        new = {}
        for path in saved(run):
            with contextlib.suppress(FileNotFoundError):  # by retention, meanwhile
                new[identity(path)] = path
        return ended, {key: path for key, path in new.items() if key not in given}

    while True:
        ended, new = on_main(look)
        given.update(new)
        yield from new.values()
        if ended == "failed" and not new:
            raise RunError(
                f"{run} has failed and was not started again for {_FAILED_S / 60:.0f} minutes: it is not followed any longer; "
                f"start this command again when it goes on"
            )
        if ended and not new:
            return
        if not new:
            time.sleep(poll_s)


def subjects(paths: Iterable[Path]) -> Iterator[Subject]:
    """The checkpoints, but for those that are deleted or damaged by then, which a warning says. Every rank iterates."""

    def look(path: Path) -> Subject | str:
        fault = damage(path)
        if fault is not None:
            return fault
        try:
            return _checkpoint(path)
        except OSError as error:
            return str(error)

    for path in paths:
        found = on_main(lambda path=path: look(path))  # type: ignore[misc]
        if isinstance(found, Subject):
            yield found
        elif path.exists():
            log.warning(f"{path} is damaged ({found}): it is left out")
        else:
            _warn_of_deletion(path)


def _checkpoint(path: Path) -> Subject:
    run = path.absolute().parent.parent
    return Subject(f"{run.name}-{path.name}", str(path), identity(path), read_state(path).step)


def _load(subject: Subject) -> TrainedModel | None:
    try:
        with all_or_none():
            return load_model(subject.reference, subject.architecture)
    except Exception:
        # by retention, since the run goes on
        if any(gather_objects(not Path(subject.reference).exists())):
            _warn_of_deletion(Path(subject.reference))
            return None
        raise


def _warn_of_deletion(path: Path) -> None:
    log.warning(f"{path} was deleted before it was evaluated: checkpoint.keep says how many are kept")


def own_config(run: Path | None) -> tuple[EvalConfig, CacheConfig]:
    """What a run measures itself and its cache; the defaults for models from elsewhere."""
    if run is None:
        return EvalConfig(), CacheConfig()
    config = read_config(run)
    return config.eval, config.data.cache
