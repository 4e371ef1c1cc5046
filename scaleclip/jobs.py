"""Runs and their SLURM jobs as people look at them: a table, logs, an end."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from scaleclip.errors import ConfigError
from scaleclip.status import LAUNCHES, Status, read_status

_SILENT_S = 600.0  # a run without a log step for so long, and without a job, has been killed
_POLL_S = 0.5


def jobs_table(root: Path) -> Table:
    """A row a run below `root`, the one that moved last first."""
    table = Table(title=str(root), title_justify="left")
    for column in ("run", "state", "job"):
        table.add_column(column, overflow="fold")
    for column in ("step", "pairs/s", "left", "starts", "device-hours", "moved"):
        table.add_column(column, justify="right")
    in_queue: dict[str, str] = {}
    try:
        in_queue = _queue()
    except ConfigError as error:
        table.caption = f"What is in the queue is unknown: {error}"
    folders = {path.parent for name in ("status.json", LAUNCHES) for path in root.glob(f"**/{name}")}
    rows = [(folder, read_status(folder)) for folder in sorted(folders)]
    for folder, status in sorted(rows, key=lambda row: -(row[1].updated_s if row[1] else 0)):
        job = _last_job(folder, status, in_queue)
        queued = in_queue.get(job or "")
        name = str(folder.relative_to(root)) if folder != root else folder.name
        if status is None:
            table.add_row(name, (queued or "not started").lower(), job or "", *[""] * 6)
            continue
        table.add_row(
            name,
            _state(status, queued),
            job or "",
            f"{status.step:,} / {status.steps:,}",
            f"{status.pairs_per_s:,.0f}" if status.pairs_per_s else "",
            _duration(status.eta_s) if status.eta_s is not None and status.state != "finished" else "",
            str(status.starts),
            f"{status.device_hours:,.1f}",
            f"{_duration(time.time() - status.updated_s)} ago",
        )
    return table


def log_lines(run: Path, rank: int, lines: int, follow: bool) -> Iterator[str]:
    """The last lines of a rank's newest log, and with `follow` for ever what is written there and by later starts.

    Raises:
        ConfigError: the run has no log of that rank yet; with `follow` that is waited for.
    """
    while (path := _newest_log(run, rank)) is None and follow:
        time.sleep(_POLL_S)
    if path is None:
        raise ConfigError(f"{run}/log has no log of rank {rank}: the run has not started, or {run} is none")
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


def cancel_jobs(run: Path) -> list[str]:
    """Cancel the jobs of a run that are in the queue; their ids.

    Raises:
        ConfigError: none is.
    """
    in_queue = _queue()
    found = [job for job in _jobs(run, read_status(run)) if job in in_queue]
    if not found:
        raise ConfigError(f"{run} has no job in SLURM's queue")
    for job in found:
        subprocess.run(["scancel", job], check=True)
    return found


def _state(status: Status, queued: str | None) -> str:
    if queued and queued != "RUNNING":
        return f"{status.state}, {queued.lower()}"
    if status.state == "running" and not queued and time.time() - status.updated_s > _SILENT_S:
        return "killed"
    return status.state


def _jobs(run: Path, status: Status | None) -> list[str]:
    """Ids of the jobs that were submitted for a run, or ran it, oldest first."""
    found = [str(row["job"]) for row in _launches(run)]
    if status and status.job and status.job not in found:
        found.append(status.job)
    return found


def _launches(run: Path) -> list[dict[str, Any]]:
    path = run / LAUNCHES
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _last_job(run: Path, status: Status | None, in_queue: Mapping[str, str]) -> str | None:
    """The newest job that is in the queue, else the one that ran last."""
    waiting = [job for job in _jobs(run, status) if job in in_queue]
    return waiting[-1] if waiting else status.job if status else None


def _queue() -> dict[str, str]:
    """State of every job in SLURM's queue by id, of an array's member ARRAY_MEMBER; empty without SLURM."""
    if shutil.which("squeue") is None:
        return {}
    listed = subprocess.run(
        ["squeue", "--noheader", "--array", "--format", "%i %T"], capture_output=True, text=True, check=False
    )
    if listed.returncode:
        raise ConfigError(f"squeue does not answer: {listed.stderr.strip()}")
    return dict(line.split() for line in listed.stdout.splitlines())


def _newest_log(run: Path, rank: int) -> Path | None:
    found = sorted((run / "log").glob(f"*/{rank}.log"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.0f} s"
