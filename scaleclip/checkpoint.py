"""Checkpoints: written under a temporary name, checksummed, renamed, found again.

checkpoints/step_00010000/ holds DeepSpeed's files, `state.json` (TrainState) and `checksums.json` (SHA-256 of every file);
`latest` beside it names the newest. There is no random state to save: order, augmentation and dropout are functions of
(seed, step, rank). A folder under its final name is whole, and one that is damaged later is noticed and passed over.
"""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scaleclip.distributed import World, barrier, gather_objects, raise_together
from scaleclip.errors import ConfigError, RunError
from scaleclip.files import write_atomic

if TYPE_CHECKING:  # engine.py imports deepspeed, after telling it which accelerator there is
    from deepspeed import DeepSpeedEngine

_PARTIAL = ".partial-"
_CHECKSUMS, _STATE = "checksums.json", "state.json"

log = logging.getLogger("scaleclip")


@dataclass
class TrainState:
    """What a run knows of its past beside the model and the optimizer."""

    step: int = 0
    """Optimizer steps done; the next batch has this number."""
    samples: int = 0
    """Slots of global batches seen, invalid ones included."""
    faults: dict[str, int] = field(default_factory=dict)
    """Samples that could not be used since the run's start, by source and cause (`laion/missing_shard`)."""
    train_s: float = 0.0
    """Seconds spent training, over all starts."""
    world_size: int = 1
    """Ranks that saved."""


def save(engine: "DeepSpeedEngine", folder: Path, state: TrainState, world: World, keep: int) -> None:
    """Write checkpoints/step_X and point `latest` at it; all ranks call. Older checkpoints beyond `keep` are deleted after.

    Raises:
        RunError: it cannot be written (a full disk); earlier checkpoints are untouched.
    """
    root = folder / "checkpoints"
    final, partial = root / step_name(state.step), root / f"{_PARTIAL}{step_name(state.step)}"
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
    barrier()
    engine.save_checkpoint(str(root), tag=partial.name, save_latest=False)
    error: Exception | None = engine.checkpoint_engine.take_error()
    error = _publish(partial, final, state, world, error)
    if error is not None:
        intact = [path.name for path in saved(folder)]
        error = RunError(
            f"cannot save {final}: {error}; free some disk and start again: "
            + (f"the run goes on from {intact[-1]}, which is whole" if intact else "there is no earlier checkpoint")
        )
    try:
        raise_together(error)
    except RunError:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if world.is_main:
        for old in saved(folder)[:-keep]:
            _remove(old)
    barrier()


def find(folder: Path, world: World) -> Path | None:
    """The checkpoint to go on from, the same on every rank.

    1. Files of a save that was cut short are deleted.
    2. The newest checkpoint whose checksums hold; `latest` is for people, the folders themselves decide.
    3. None when the run has no checkpoint at all.

    Raises:
        RunError: there are checkpoints, and all are damaged.
    """
    found: Path | None = None
    error: Exception | None = None
    if world.is_main:
        for partial in (folder / "checkpoints").glob(f"{_PARTIAL}*"):
            shutil.rmtree(partial, ignore_errors=True)
        candidates = saved(folder)
        for path in reversed(candidates):
            fault = damage(path)
            if fault is None:
                found = path
                break
            log.warning("%s is damaged (%s): passed over", path, fault)
        if candidates and found is None:
            error = RunError(f"all checkpoints in {folder / 'checkpoints'} are damaged: delete them to start afresh")
    raise_together(error)
    agreed: Path | None = gather_objects(found)[0]
    return agreed


def load(engine: "DeepSpeedEngine", path: Path, world: World, zero_stage: int) -> TrainState:
    """Model, optimizer and state from a checkpoint; all ranks call.

    Raises:
        ConfigError: a sharded optimizer was saved by another number of ranks.
    """
    state = read_state(path)
    if zero_stage and state.world_size != world.size:
        raise ConfigError(
            f"{path} was saved by {state.world_size} ranks with train.zero_stage={zero_stage}, this start has {world.size}: "
            f"start with {state.world_size} ranks, or in another run.folder"
        )
    loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise RunError(f"DeepSpeed found nothing to load in {path}, whose checksums hold: was it written by another version?")
    state.world_size = world.size
    return state


def read_state(path: Path) -> TrainState:
    """The state.json of a checkpoint."""
    return TrainState(**json.loads((path / _STATE).read_text()))


def load_weights(path: Path) -> dict[str, Tensor]:
    """The model's fp32 weights by parameter name, on the CPU, without DeepSpeed's engine."""
    # our own file, checked by its digest; DeepSpeed pickles more than tensors beside the weights
    file: dict[str, Any] = torch.load(path / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    weights: dict[str, Tensor] = file["module"]
    return weights


def saved(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first, damaged ones included."""
    return sorted((folder / "checkpoints").glob("step_*"))


def newest(folder: Path) -> Path | None:
    """The newest checkpoint whose checksums hold."""
    return next((path for path in reversed(saved(folder)) if damage(path) is None), None)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if their checksums hold."""
    try:
        checksums = json.loads((path / _CHECKSUMS).read_text())
        for name, digest in checksums.items():
            if _digest(path / name) != digest:
                return f"{name} has changed"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def step_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def _publish(partial: Path, final: Path, state: TrainState, world: World, error: Exception | None) -> Exception | None:
    """Add the state, flush and checksum the files, each rank its share, then give the folder its final name.

    `error` is what writing DeepSpeed's files met on this rank. Every rank takes part in every collective, errors or not.
    """
    names: list[str] = []
    if world.is_main and error is None:
        try:
            (partial / _STATE).write_text(json.dumps(asdict(state), indent=2))
            names = sorted(path.name for path in partial.iterdir())
        except OSError as caught:
            error = caught
    names = gather_objects(names)[0]
    digests: dict[str, str] = {}
    try:
        for name in names[world.rank :: world.size]:
            _flush(partial / name)
            digests[name] = _digest(partial / name)
    except OSError as caught:
        error = error or caught
    every = gather_objects((digests, error is None))
    if world.is_main and all(fine for _, fine in every):
        try:
            checksums = {name: digest for part, _ in every for name, digest in part.items()}
            (partial / _CHECKSUMS).write_text(json.dumps(checksums, indent=2))
            _flush(partial / _CHECKSUMS)
            _flush(partial)
            if final.exists():  # only a damaged one is ever written again
                _remove(final)
            os.rename(partial, final)
            _flush(final.parent)
            write_atomic(final.parent / "latest", final.name)
        except OSError as caught:
            error = caught
    return error


def _remove(path: Path) -> None:
    """Delete a checkpoint; under its final name it is whole up to the last moment. What stays behind is a warning."""
    doomed = path.with_name(f"{_PARTIAL}removed-{path.name}")
    try:
        os.rename(path, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        log.warning("%s cannot be deleted: %s", path, error)


def _flush(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
