"""The folder of a run: what started it, with what, and whether it may go on.

config.yaml (resolved), provenance.json, metrics.jsonl, evaluations.jsonl, results.json, log/<start>/<rank>.log, checkpoints/
with step_<step>/ and latest, evaluations/step_<step>/, report.html and report/.
"""

import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml
from rich.logging import RichHandler

from scaleclip.config import RunConfig
from scaleclip.config_io import differing_keys, parse_config, to_yaml
from scaleclip.errors import ConfigError
from scaleclip.files import write_atomic
from scaleclip.status import newest_step, slurm_job

PROGRESS = "scaleclip.progress"
"""Logger of a line a log step."""
CODE_VERSION = "version.txt"
"""Beside a copy of the code: what git said of it."""
_PROVENANCE = "provenance.json"
_LOCK_WAIT_S = 10.0
_PACKAGES = ("scaleclip", "torch", "deepspeed", "transformers", "tokenizers", "numpy", "simplejpeg", "pillow")


def open_run(config: RunConfig, world_size: int, data_fingerprints: Sequence[str], loss_gemm: str) -> TextIO:
    """Make the run's folder, or check that the one there belongs to the same run, and note this start in it. Rank 0 only.

    `data_fingerprints` are the stages'; further ones may be added. `loss_gemm` names the library of the loss's fp32 products: a
    run that goes on with another has other rounding.
    Returns a lock: while it is open no other process opens the run.

    Raises:
        ConfigError: the folder cannot be written, is in use, or holds a run with another configuration or other data.
    """
    folder = Path(config.run.folder)
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        held = lock(folder)
        check_same_run(config)
        starts = read_starts(folder)
        if starts and "data" not in starts[-1]:
            raise ConfigError(
                f"run.folder={folder} was written by another version of scaleclip: use that one, or another folder"
            )
        then = starts[-1]["data"] if starts else ()
        changed = [number for number, pair in enumerate(zip(then, data_fingerprints, strict=False)) if pair[0] != pair[1]]
        if changed:
            where = f" in stage {changed[0]}" if len(data_fingerprints) > 1 else ""
            raise ConfigError(
                f"run.folder={folder} was trained on other data{where}: the names or sample counts of what data.sources or "
                f"data.text_pairs.sources name have changed since; restore them to go on, or name another run.folder"
            )
        write_atomic(folder / "config.yaml", to_yaml(config))
        starts.append(_this_start(newest_step(folder), world_size, data_fingerprints, loss_gemm))
        write_atomic(folder / _PROVENANCE, json.dumps({"starts": starts}, indent=2))
    except OSError as error:
        raise ConfigError(
            f"run.folder={config.run.folder}: cannot be written: {error.strerror}; free the disk, mend its rights or name "
            f"another folder"
        ) from None
    return held


def check_same_run(config: RunConfig) -> None:
    """Whether a run may start in its folder: that is new, or holds the same run. Changes nothing, and does not look at data.

    Raises:
        ConfigError: the folder holds a run with another configuration, or checkpoints of who knows what.
    """
    folder = Path(config.run.folder)
    if not (folder / "config.yaml").exists() or not (folder / _PROVENANCE).exists():
        if any((folder / "checkpoints").glob("step_*")):
            raise ConfigError(
                f"run.folder={folder} has checkpoints, but no config.yaml and {_PROVENANCE} to say of what: "
                f"restore them, or name another folder"
            )
        return
    differing = differing_keys(read_config(folder), config)
    if differing:
        rows = "\n".join(f"  {key}: {old!r} there, {new!r} now" for key, old, new in differing)
        raise ConfigError(
            f"run.folder={folder} holds a run with another configuration:\n{rows}\n"
            f"set these back to go on with that run, or name another run.folder for a new one"
        )


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Where, when and with what each start of a run was made, oldest first; none for a new folder."""
    path = folder / _PROVENANCE
    starts: list[dict[str, Any]] = json.loads(path.read_text())["starts"] if path.exists() else []
    return starts


def read_config(folder: Path) -> RunConfig:
    """The configuration that a run's folder was made with.

    Raises:
        ConfigError: the folder holds no run.
    """
    path = folder / "config.yaml"
    try:
        return parse_config(yaml.safe_load(path.read_text()))
    except OSError as error:
        raise ConfigError(f"{folder} is no run folder: {path.name} cannot be read: {error.strerror}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}, written by another version?\n{error}") from None


def wandb_id(folder: Path) -> str:
    """An id that is the same at every start of a run."""
    return str(read_starts(folder)[0]["id"])


def lock(folder: Path) -> TextIO:
    """Keep other processes out of the run's folder for as long as the returned file is open. Rank 0 only.

    Raises:
        ConfigError: another run holds it, for longer than a killed one and its loader processes need to end.
    """
    file = (folder / ".lock").open("a+")
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            if time.monotonic() > deadline:
                file.seek(0)
                raise ConfigError(
                    f"run.folder={folder} is being written by another run ({file.read().strip()}): wait for it, stop it, or "
                    f"name another folder"
                ) from None
            time.sleep(0.2)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def start_name() -> str:
    """Name of this start among the run's: SLURM's job, else the time."""
    return slurm_job() or time.strftime("%Y%m%d-%H%M%S")


def log_to(folder: Path, rank: int, start: str) -> logging.Logger:
    """The logger of this rank: news and warnings on rank 0's terminal; they and its progress in log/<start>/<rank>.log."""
    path = folder / "log" / start / f"{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    terminal = [RichHandler(show_path=False, show_level=False)] if rank == 0 else []
    for name in ("scaleclip", "scaleclip_kernels"):
        log = logging.getLogger(name)
        log.handlers = [file, *terminal]
        log.setLevel(logging.INFO)
        log.propagate = False
    # the terminal has a bar for it
    progress = logging.getLogger(PROGRESS)
    progress.handlers, progress.propagate = [file], False
    return logging.getLogger("scaleclip")


def code_version() -> str | None:
    """What `git describe` says of the code that runs, or said when it was copied; None where neither is known."""
    checkout = Path(__file__).parent.parent
    if (checkout / CODE_VERSION).exists():
        return (checkout / CODE_VERSION).read_text() or None
    # an installed package may lie inside somebody else's repository
    if not shutil.which("git") or not (checkout / ".git").exists():
        return None
    describe = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    return subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip() or None


def _this_start(step: int, world_size: int, data_fingerprints: Sequence[str], loss_gemm: str) -> dict[str, Any]:
    return {
        "id": os.urandom(4).hex(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "command": sys.argv,
        "world_size": world_size,
        "host": socket.gethostname(),
        "slurm_job": slurm_job(),
        "git": code_version(),
        "package": str(Path(__file__).parent),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "data": list(data_fingerprints),
        "loss_gemm": loss_gemm,
    }
