"""Saves a run in the background and brings it back, on any number of ranks and under any ZeRO stage.

1. `save` copies what the rank holds into a buffer, the only time that training waits, and a thread writes it.
2. `poll` sees that every rank has written; a thread of rank 0 then publishes the checkpoint, deletes old ones and offers it to
   the mirror.
3. `find_newest` names the newest checkpoint that is whole, here or in the mirror; `load` fills the state in place. Where that
   checkpoint is of the stage before, what has other shapes is resized (border.py).

Threads use no collectives: what they find is exchanged by `poll`, `save` and `finish`, which every rank calls.
"""

import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

from scaleclip.checkpoint import loading
from scaleclip.checkpoint.background import begin, failure, finished
from scaleclip.checkpoint.border import Border, Changes, fill_across, merge
from scaleclip.checkpoint.folders import (
    checkpoints,
    first_fault,
    partial,
    publish,
    read_checksums,
    remove_partial,
    retain,
    saved,
    step_name,
    write_durable,
)
from scaleclip.checkpoint.mirror import STANDSTILL_S, Mirror
from scaleclip.checkpoint.rank_file import Piece, rank_file, read_pieces
from scaleclip.checkpoint.shard import Shard, share
from scaleclip.checkpoint.snapshot import Snapshot
from scaleclip.checkpoint.state import STATE, TrainState, encode, read_state
from scaleclip.config import CheckpointConfig
from scaleclip.distributed import World, all_or_none, any_rank, gather_objects, raise_together
from scaleclip.errors import ConfigError, RunError

# work may take longer than a rank may wait in a collective
_LOOK_S = 1.0
_MIRROR_LOOK_S = 0.2
_LONG_WAIT_S = 1.0

log = logging.getLogger("scaleclip")


class _Pending(NamedTuple):
    """A save under way."""

    path: Path
    """Final name of the checkpoint."""
    work: "Future[dict[str, str]]"
    """This rank's part: SHA-256 of the files that it writes; nothing once rank 0 publishes."""
    is_publishing: bool


class Found(NamedTuple):
    """A whole checkpoint of the run."""

    path: Path
    state: TrainState


class Checkpointer:
    """A run's checkpoints. Every rank makes one and calls each method at the same step.

    Args:
        folder: the run's.
        world: this rank.
        config: when old checkpoints are deleted, and the mirror.
        origin: what the run is, see TrainState.

    Raises:
        ConfigError: fsspec does not know the mirror's place.
    """

    def __init__(self, folder: Path, world: World, config: CheckpointConfig, origin: dict[str, Any]) -> None:
        self._folder, self._world, self._config, self._origin = folder, world, config, origin
        self._pending: _Pending | None = None
        # of this rank: weights that the checkpoint of the stage before lacks, for a roll-back to it
        self._fresh: dict[str, Tensor] = {}
        with all_or_none():
            self._mirror = Mirror(config.mirror, config.keep, origin) if config.mirror and world.is_main else None

    def attach(self, shard: Callable[[], Shard]) -> "Checkpointer":
        """Save and load this from now on: what this rank holds, as views of the live state, always of one layout.

        Raises:
            RuntimeError, MemoryError: the host has no room for a copy of the shard.
        """
        self._settle()
        self._shard, self._fresh = shard, {}
        with all_or_none():
            self._snapshot = Snapshot(share(shard().fragments, self._world.rank, self._world.size), self._world.device)
        return self

    def detach(self) -> None:
        """Let go of the state, when the last save of it is done. Every rank calls."""
        self._settle()
        del self._shard, self._snapshot

    @property
    def mirror_failures(self) -> int:
        """Tries to send a checkpoint to the mirror that failed; 0 on other ranks than 0."""
        return self._mirror.failures if self._mirror else 0

    def save(self, state: TrainState) -> None:
        """Take a copy of the shard and begin to write it as checkpoints/step_X.

        Raises:
            RunError: the save before could not be written (a full disk); earlier checkpoints are untouched.
        """
        path = checkpoints(self._folder) / step_name(state.step)
        if self._pending is not None:
            start = time.perf_counter()
            name = self._pending.path.name
            self._settle()
            waited_s = time.perf_counter() - start
            if waited_s > _LONG_WAIT_S:
                log.warning("%s waited %.1f s for %s to be written: save less often", path.name, waited_s, name)
        shard = self._shard()
        self._snapshot.take(share(shard.fragments, self._world.rank, self._world.size))
        once: dict[str, bytes] = {}
        if self._world.is_main:
            scalars = {name: scalar.cpu() for name, scalar in shard.scalars.items()}
            once = {loading.SCALARS: safetensors.torch.save(scalars), STATE: encode(replace(state, origin=self._origin))}
        self._pending = _Pending(path, begin(lambda: self._write(partial(path), once)), is_publishing=False)

    def poll(self) -> None:
        """Bring a save one step on if every rank can; costs nothing while there is none.

        Raises:
            RunError: a rank could not write its part.
        """
        if self._pending is not None and not any_rank(not self._pending.work.done()):
            self._advance(self._pending)

    def finish(self) -> None:
        """Wait until the last save is published and mirrored; a mirror that does not move is not waited for.

        Raises:
            RunError: the save could not be written.
        """
        self._settle()
        if self._config.mirror is None:
            return
        newest = saved(self._folder)[-1:]
        if self._mirror and newest:
            self._mirror.offer(newest[0])  # one that a start before did not send; what is there already is skipped
        goes_on = self._mirror.drain() if self._mirror else lambda: False
        if goes_on():
            log.info("waiting until checkpoint.mirror=%s has %s", self._config.mirror, newest[0].name)
        while any_rank(goes_on()):
            time.sleep(_MIRROR_LOOK_S)
        if self._mirror and self._mirror.missing:
            log.warning("%s is not in checkpoint.mirror=%s: copy it there", self._mirror.missing, self._config.mirror)

    def find_newest(self, *, ask_mirror: bool = True) -> Found | None:
        """The newest whole checkpoint; None when the run has none at all.

        1. Files of a save or a fetch that was cut short are deleted.
        2. The newest checkpoint in the run's folder whose checksums hold; `latest` is for people, the folders decide.
        3. One from the mirror, where that has a newer one.

        Raises:
            RunError: all checkpoints are damaged, or the mirror cannot be read and there is no checkpoint here.
        """
        self._settle()
        with all_or_none():
            if self._world.is_main:
                remove_partial(self._folder)
        candidates: list[Path] = gather_objects(saved(self._folder))[0]
        path = next((path for path in reversed(candidates) if self._is_whole(path)), None)
        if self._config.mirror is not None and ask_mirror:
            path = self._fetch_newer(path)
        if path is None and candidates:
            raise RunError(
                f"all checkpoints in {checkpoints(self._folder)} are damaged, or not every node sees them: see the warnings "
                f"before this, and delete them to start afresh"
            )
        if path is None:
            return None
        with all_or_none():
            return Found(path, read_state(path))

    def load(self, found: Found, border: Border | None = None) -> None:
        """Fill the shard from a checkpoint.

        One of the `border`'s step was saved by the stage before: what fits is taken over, resized where `border.fit` can, what
        it lacks stays as it was made (at a roll-back too), and what the model no longer has is dropped. Every other one must
        have the same parameters.

        Raises:
            RunError: it is of another model.
        """
        path, state = found
        with all_or_none():
            names = loading.rank_files(path)[self._world.rank :: self._world.size]
            mine = {name: read_pieces(path / name) for name in names}
        pieces: dict[str, list[Piece]] = {name: held for part in gather_objects(mine) for name, held in part.items()}
        crossed = border if border is not None and path.name == step_name(border.step) else None
        changes = Changes()
        with all_or_none():
            if crossed is None:
                loading.fill(self._shard(), path, pieces)
            else:
                changes = fill_across(self._shard(), path, pieces, crossed, self._fresh)
        if crossed is not None:
            told = merge(gather_objects(changes)).told(piece.name for held in pieces.values() for piece in held)
            optimizer = "kept" if crossed.keeps_optimizer else "reset"
            log.info("a stage begins at step %d: optimizer state %s; %s", crossed.step, optimizer, told)
        log.info("going on from %s, saved by %d rank(s) with train.zero_stage=%d", path, state.world_size, state.zero_stage)

    def _write(self, folder: Path, once: dict[str, bytes]) -> dict[str, str]:
        """Write this rank's file, and those that one rank writes; their SHA-256."""
        folder.mkdir(parents=True, exist_ok=True)
        name = rank_file(self._world.rank)
        digests = {name: write_durable(folder / name, self._snapshot.blocks())}
        return digests | {name: write_durable(folder / name, [content]) for name, content in once.items()}

    def _settle(self) -> None:
        """Wait until the last save is published."""
        while self._pending is not None:
            _wait_together(self._pending.work)
            self._advance(self._pending)

    def _advance(self, pending: _Pending) -> None:
        """From written by every rank to being published, or from published to done."""
        self._raise_if_failed(pending)
        if pending.is_publishing:
            self._pending = None
            return
        digests = {name: digest for part in gather_objects(pending.work.result()) for name, digest in part.items()}
        work: Future[dict[str, str]] = finished({})
        if self._world.is_main:
            work = begin(lambda: self._publish(pending.path, digests))
        self._pending = _Pending(pending.path, work, is_publishing=True)

    def _publish(self, path: Path, digests: dict[str, str]) -> dict[str, str]:
        publish(path, digests)
        if self._mirror:
            self._mirror.offer(path)
        retain(path, self._config.keep, self._mirror.sending if self._mirror else None)
        return {}

    def _raise_if_failed(self, pending: _Pending) -> None:
        """Raise on every rank what the pending work met on any; the disk is freed of its files."""
        error = failure(pending.work)
        if isinstance(error, OSError):
            intact = [path.name for path in saved(self._folder)]
            error = RunError(
                f"cannot save {pending.path}: {error}; free some disk and start again: "
                + (f"the run goes on from {intact[-1]}, which is whole" if intact else "there is no earlier checkpoint")
            )
        try:
            raise_together(error)
        except Exception:
            self._pending = None
            if self._world.is_main:
                shutil.rmtree(partial(pending.path), ignore_errors=True)
            raise

    def _is_whole(self, path: Path) -> bool:
        """Whether a checkpoint's checksums hold; each rank reads its share of the files."""
        digests: dict[str, str] = {}
        fault: str | None = None
        try:
            digests = read_checksums(path)
        except (OSError, ValueError) as error:
            fault = str(error)
        names = sorted(digests)[self._world.rank :: self._world.size]
        fault = fault or first_fault(path, {name: digests[name] for name in names})
        faults = [fault for fault in gather_objects(fault) if fault is not None]
        if faults and self._world.is_main:
            log.warning("%s is damaged (%s): passed over", path, faults[0])
        return not faults

    def _fetch_newer(self, path: Path | None) -> Path | None:
        """The mirror's newest whole checkpoint, brought here, where it is newer than `path`; else `path`."""
        root, mirror = checkpoints(self._folder), self._mirror
        work: Future[Path | None] = begin(lambda: mirror.fetch_newer(root, path)) if mirror else finished(None)
        if not _wait_together(work, None if path is None else STANDSTILL_S):
            log.warning("checkpoint.mirror=%s does not answer: going on without it", self._config.mirror)
            return path
        error = failure(work)
        if isinstance(error, ConfigError):
            pass  # it is another run's
        elif error is not None and path is not None:
            log.warning("checkpoint.mirror=%s cannot be read (%s): going on without it", self._config.mirror, error)
        elif error is not None:
            error = RunError(
                f"checkpoint.mirror={self._config.mirror} cannot be read ({type(error).__name__}: {error}), and no whole "
                f"checkpoint is here: whether one is there is unknown; check address and credentials, or unset the key"
            )
        raise_together(error if path is None or isinstance(error, ConfigError) else None)
        fetched: Path | None = gather_objects(None if error else work.result())[0]
        return fetched or path


def _wait_together(work: "Future[Any]", most_s: float | None = None) -> bool:
    """Wait until the work of every rank is done; False where that takes longer than `most_s`."""
    end_s = None if most_s is None else time.monotonic() + most_s
    while any_rank(not work.done()):
        if any_rank(end_s is not None and time.monotonic() > end_s):
            return False
        wait([work], _LOOK_S)
    return True
