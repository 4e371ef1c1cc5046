"""Runs and their SLURM jobs as people look at them: a table, logs, an end."""

import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from scaleclip.errors import ConfigError
from scaleclip.run_folder import read_starts
from scaleclip.status import LAUNCHES, Launch, Status, read_launches, read_status

_SILENT_S = 600.0  # a run without a log step for so long, and without a job, has been killed
_POLL_S = 0.5
_NARROW = 110  # columns


class _Queued(NamedTuple):
    """A job in SLURM's queue."""

    state: str
    reason: str
    """Why it waits."""


def jobs_table(root: Path, width: int) -> Table:
    """A row a run below `root`, the one that moved last first; the main columns only where `width` is small.

    Raises:
        ConfigError: there is no such folder.
    """
    if not root.is_dir():
        raise ConfigError(f"there is no folder {root}: name the one where runs lie")
    narrow = width < _NARROW
    table = Table(title=str(root), title_justify="left", caption_justify="left")
    table.add_column("run", overflow="fold")
    for column in ("state", "job"):
        table.add_column(column, no_wrap=True)
    for column in ("step", "left") if narrow else ("step", "pairs/s", "left", "starts", "device-hours", "moved"):
        table.add_column(column, justify="right", no_wrap=narrow)
    in_queue: dict[str, _Queued] = {}
    notes = []
    try:
        in_queue = _queue()
    except ConfigError as error:
        notes.append(f"What is in the queue is unknown: {error}")
    found = [(folder, read_status(folder)) for folder in _runs(root)]
    rows = [(folder, status, _job(folder, status, in_queue)) for folder, status in found]
    never_ran = [job for _, status, job in rows if job and job not in in_queue and (status is None or status.job != job)]
    ended = {} if notes else _ended(never_ran)
    for folder, status, job in sorted(rows, key=lambda row: -(row[1].updated_s if row[1] else 0)):
        queued = in_queue.get(job or "")
        name = str(folder.relative_to(root)) if folder != root else folder.name
        state = _state(status, job, queued, ended.get(job or ""))
        if queued and queued.state == "PENDING" and queued.reason != "None":
            notes.append(f"{job} waits: {queued.reason}")
        step = left = ""
        more = [""] * 4
        if status is not None:
            step = f"{status.step:,} / {status.steps:,}"
            left = _duration(status.eta_s) if status.eta_s is not None and status.state != "finished" else ""
            more = [
                f"{status.pairs_per_s:,.0f}" if status.pairs_per_s else "",
                str(status.starts),
                f"{status.device_hours:,.1f}",
                f"{_duration(time.time() - status.updated_s)} ago",
            ]
        table.add_row(name, state, job or "", *([step, left] if narrow else [step, more[0], left, *more[1:]]))
    table.caption = "\n".join(notes) or None
    return table


def log_lines(run: Path, rank: int, lines: int, follow: bool) -> Iterator[str]:
    """The last lines of a rank's newest log, and with `follow` for ever what is written there and by later starts.

    Until the run's newest job has started training, the job's own output, where failed checks are.

    Raises:
        ConfigError: no such folder, several runs below it, or no log yet; with `follow` that is waited for.
    """
    if not run.is_dir():
        raise ConfigError(f"there is no folder {run}")
    below = [str(folder) for folder in _runs(run)]
    if below and str(run) not in below:
        raise ConfigError(f"{run} is no run, but has some below; name one of {', '.join(below)}")
    path = _newest_log(run, rank)
    if path is None and follow:
        yield f"--- waiting for a log of rank {rank} in {run}/log"
    while path is None and follow:
        time.sleep(_POLL_S)
        path = _newest_log(run, rank)
    if path is None:
        raise ConfigError(f"{run}/log has no log of rank {rank}: the run has not started, or {run} is none")
    if follow:
        yield f"--- {path}"
    content = path.read_bytes()
    position = content.rfind(b"\n") + 1 if follow else len(content)
    yield from content[:position].decode(errors="replace").splitlines()[-lines:] if lines else []
    while follow:
        time.sleep(_POLL_S)
        with path.open("rb") as file:
            file.seek(position)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        position += len(whole)
        yield from whole.decode(errors="replace").splitlines()
        newest = _newest_log(run, rank)
        if not whole and newest is not None and newest != path:
            path, position = newest, 0
            yield f"--- {path}"


def cancel_jobs(root: Path) -> list[str]:
    """Cancel the jobs in the queue of a run, or of every run below a folder; their ids.

    Raises:
        ConfigError: none is.
    """
    in_queue = _queue()
    found = [job for run in _runs(root) for job in _jobs(run, read_status(run)) if job in in_queue]
    if not found:
        raise ConfigError(f"{root} has no job in SLURM's queue")
    subprocess.run(["scancel", *found], check=True)
    return found


def _runs(root: Path) -> list[Path]:
    return sorted({path.parent for name in ("status.json", LAUNCHES) for path in root.glob(f"**/{name}")})


def _state(status: Status | None, job: str | None, queued: _Queued | None, ended: str | None) -> str:
    """What a run does, by its status and by the job that is shown, which may be one that the status does not know yet."""
    state: str = status.state if status else "not started"
    is_its = status is not None and status.job == job
    if status and state == "running" and not (queued and is_its) and time.time() - status.updated_s > _SILENT_S:
        state = "killed"
    if queued and queued.state == "RUNNING":
        return state if state == "finished" or (is_its and state == "running") else "starting"
    news = queued.state.lower() if queued else ended
    return f"{state}, {news}" if news else state


def _jobs(run: Path, status: Status | None) -> list[str]:
    """Ids of the jobs that ran a run, or were submitted for it, oldest first; without those of `sbatch` that never started."""
    ran = [start["slurm_job"] for start in read_starts(run)]
    launched = [launch.job for launch in read_launches(run)]
    return [job for job in dict.fromkeys([*ran, status.job if status else None, *launched]) if job]


def _waiting_launch(run: Path, status: Status | None) -> Launch | None:
    """The newest job that was launched to train a run, unless it has started."""
    launched = [launch for launch in read_launches(run) if launch.kind == "train"]
    started = {start["slurm_job"] for start in read_starts(run)} | {status.job if status else None}
    return launched[-1] if launched and launched[-1].job not in started else None


def _job(run: Path, status: Status | None, in_queue: Mapping[str, _Queued]) -> str | None:
    """The job to show for a run: the one that runs it, else the newest that may, else the last one that was to train it."""
    if status and status.job in in_queue:
        return status.job
    evaluates = {launch.job for launch in read_launches(run) if launch.kind == "evaluate"}
    queued = [job for job in _jobs(run, status) if job in in_queue and job not in evaluates]
    if queued:
        return queued[-1]
    launch = _waiting_launch(run, status)
    return launch.job if launch else status.job if status else None


def _queue() -> dict[str, _Queued]:
    """Every job in SLURM's queue by id, of an array's member ARRAY_MEMBER; empty without SLURM."""
    if shutil.which("squeue") is None:
        return {}
    listed = subprocess.run(
        ["squeue", "--noheader", "--array", "--format", "%i %T %r"], capture_output=True, text=True, check=False
    )
    if listed.returncode:
        raise ConfigError(f"squeue does not answer: {listed.stderr.strip()}")
    rows = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
    return {job: _Queued(state, reason) for job, state, reason in rows}


def _ended(jobs: Sequence[str]) -> dict[str, str]:
    """How jobs that are no longer in the queue ended, by id; `not in the queue` where accounting does not know."""
    found = dict.fromkeys(jobs, "not in the queue")
    if found and shutil.which("sacct"):
        command = ["sacct", "--allocations", "--noheader", "--parsable2", "--format", "jobid,state", "--jobs", ",".join(found)]
        listed = subprocess.run(command, capture_output=True, text=True, check=False)
        for line in listed.stdout.splitlines():
            job, _, state = line.partition("|")
            if job in found:
                found[job] = state.split()[0].lower()  # CANCELLED by 0
    return found


def _newest_log(run: Path, rank: int) -> Path | None:
    found = list((run / "log").glob(f"*/{rank}.log"))
    launch = _waiting_launch(run, read_status(run))
    if launch and Path(launch.log).exists():
        found.append(Path(launch.log))
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.0f} s"
