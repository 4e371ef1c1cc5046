"""What a run is doing: status.json in its folder, for `scaleclip jobs` and for the next start, and a line at each end."""

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from scaleclip.errors import RunError, Stopped
from scaleclip.files import write_atomic

State = Literal["running", "stopped", "finished", "failed"]
LAUNCHES = "launches.jsonl"
"""In a run's folder: a Launch a row."""
_FILE = "status.json"
_DONE = "all steps are done"
log = logging.getLogger("scaleclip")


class Launch(NamedTuple):
    """A job that `scaleclip launch` submitted for a run."""

    time: str
    job: str
    """SLURM's id, of an array's member ARRAY_MEMBER."""
    kind: Literal["train", "evaluate"]
    log: str
    """File of the job's own output: what is said before its ranks have logs."""


class Status(NamedTuple):
    """A run's status.json. A run that was killed says `running`, and `updated_s` since when it no longer is."""

    state: State
    why: str
    """Of the end: the signal or the error."""
    step: int
    steps: int
    """Of the whole run."""
    samples: int
    """Pairs seen."""
    whole_samples: int
    """Pairs of the whole run."""
    pairs_per_s: float | None
    """Since the log step before the last one; none before the first."""
    starts: int
    """Of the run, this one included."""
    resumed_step: int
    """That the last start went on from."""
    idle_starts: int
    """Starts of this job in a row, up to the last one, that went on from the same step."""
    job: str | None
    """SLURM's id of the last start, of an array's member ARRAY_MEMBER."""
    host: str
    """Of rank 0."""
    world_size: int
    device_hours: float
    """Hours times ranks over all starts, work that was lost included."""
    updated_s: float
    """Seconds since 1970."""

    @property
    def eta_s(self) -> float | None:
        """Seconds that the run has still to go."""
        if not self.pairs_per_s:
            return None
        return (self.whole_samples - self.samples) / self.pairs_per_s


def read_status(folder: Path) -> Status | None:
    """The status in a run's folder; None where there is none, or one of another version."""
    try:
        return Status(**json.loads((folder / _FILE).read_text()))
    except (FileNotFoundError, TypeError, ValueError):
        return None


def note_launch(folder: Path, launch: Launch) -> None:
    """Add a job to those that were submitted for the run in a folder."""
    with (folder / LAUNCHES).open("a") as file:
        file.write(json.dumps(launch._asdict()) + "\n")


def read_launches(folder: Path) -> list[Launch]:
    """The jobs that were submitted for the run in a folder, oldest first; rows of another version are left out."""
    path, found = folder / LAUNCHES, []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(TypeError, ValueError):
            found.append(Launch(**json.loads(line)))
    return found


def slurm_job() -> str | None:
    """SLURM's id of the job that this process belongs to, of an array's member ARRAY_MEMBER."""
    array, member = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{member}" if array and member else os.environ.get("SLURM_JOB_ID")


def mark_finished(folder: Path) -> None:
    """The run in a folder was finished by a start that could no longer say so."""
    status = read_status(folder)
    if status is not None and status.state != "finished":
        write_atomic(folder / _FILE, json.dumps(status._replace(state="finished", why=_DONE)._asdict(), indent=2))


def newest_step(folder: Path) -> int:
    """Of the newest checkpoint, by its name; 0 where there is none."""
    return max((int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*")), default=0)


class StatusFile:
    """Keeps a run's status.json. Rank 0 only; made early, so that starts which die before they train are counted too.

    Args:
        folder: the run's.
        world_size: ranks.
        steps: of the whole run.
        samples: of the whole run.
        most_idle: starts of a job in a row that may go on from the same step.

    Raises:
        RunError: more starts than that have saved nothing.
    """

    def __init__(self, folder: Path, world_size: int, steps: int, samples: int, most_idle: int) -> None:
        before, job, step = read_status(folder), slurm_job(), newest_step(folder)
        is_again = before is not None and job is not None and before.job == job and before.resumed_step == step
        idle_starts = before.idle_starts + 1 if before is not None and is_again else 0
        self._path, self._begin_s = folder / _FILE, psutil.Process().create_time()
        self._device_hours = before.device_hours if before else 0.0
        self._status = Status(
            state="running",
            why="",
            step=step,
            steps=steps,
            samples=before.samples if before else 0,
            whole_samples=samples,
            pairs_per_s=None,
            starts=before.starts + 1 if before else 1,
            resumed_step=step,
            idle_starts=idle_starts,
            job=job,
            host=socket.gethostname(),
            world_size=world_size,
            device_hours=self._device_hours,
            updated_s=time.time(),
        )
        if idle_starts >= most_idle:
            error = RunError(
                f"{idle_starts + 1} starts of job {job} in a row have gone on from step {step} and saved nothing "
                f"(guard.max_idle_starts={most_idle}): see log/ in {folder} for what ended them, and submit again"
            )
            self._end("failed", str(error))
            raise error
        self._write(self._status)

    def resume(self, step: int, samples: int) -> None:
        """Training begins, from this step."""
        self._write(self._status._replace(step=step, samples=samples, resumed_step=step))

    def advance(self, step: int, samples: int, pairs_per_s: float) -> None:
        """A log step."""
        self._write(self._status._replace(step=step, samples=samples, pairs_per_s=pairs_per_s))

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Note how what is inside ends."""
        try:
            yield
        except Stopped as stop:
            self._end("stopped", str(stop))
            raise
        except BaseException as error:
            self._end("failed", f"{type(error).__name__}: {error}")
            raise
        self._end("finished", _DONE)

    def _end(self, state: State, why: str) -> None:
        self._write(self._status._replace(state=state, why=why))
        now = self._status
        log.info(
            f"{state}: {why}; step {now.step:,} of {now.steps:,}, {now.samples:,} pairs, start {now.starts}, "
            f"{now.device_hours:,.2f} device-hours on {now.world_size} rank(s)"
        )

    def _write(self, status: Status) -> None:
        hours = (time.time() - self._begin_s) / 3600 * status.world_size
        self._status = status._replace(device_hours=self._device_hours + hours, updated_s=time.time())
        try:
            write_atomic(self._path, json.dumps(self._status._asdict(), indent=2))
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, error.strerror)
