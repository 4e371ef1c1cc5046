"""The folder of a run: what started it, with what, and whether it may go on.

config.yaml (resolved), provenance.json, metrics.jsonl, log/<start>/<rank>.log, checkpoints/, latest, results.json.
"""

import importlib.metadata
import json
import logging
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from rich.logging import RichHandler

from scaleclip.config import RunConfig, differing_keys, parse_config, to_yaml
from scaleclip.errors import ConfigError

_PACKAGES = ("scaleclip", "torch", "deepspeed", "transformers", "tokenizers", "numpy", "simplejpeg", "pillow")


def open_run(config: RunConfig, world_size: int, manifest_fingerprint: str) -> Path:
    """Make the run's folder, or check that the one there belongs to the same run, and note this start in it. Rank 0 only.

    Raises:
        ConfigError: the folder cannot be written, or holds a run with another configuration or other data.
    """
    folder = Path(config.run.folder)
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        starts = _check_same_run(folder, config, manifest_fingerprint)
        write_atomic(folder / "config.yaml", to_yaml(config))
        starts.append(_this_start(world_size, manifest_fingerprint))
        write_atomic(folder / "provenance.json", json.dumps({"starts": starts}, indent=2))
    except OSError as error:
        raise ConfigError(
            f"run.folder={config.run.folder}: cannot be written: {error.strerror}; free the disk, mend its rights or name "
            f"another folder"
        ) from None
    return folder


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


def wandb_id(folder: Path) -> str:
    """An id that is the same at every start of a run."""
    starts = json.loads((folder / "provenance.json").read_text())["starts"]
    return str(starts[0]["id"])


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader, or a start after a crash, sees the old text or the new one, whole."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def log_to(folder: Path, rank: int) -> logging.Logger:
    """The logger of this rank: warnings and news on rank 0's terminal, everything in the rank's file."""
    start = os.environ.get("SLURM_JOB_ID") or time.strftime("%Y%m%d-%H%M%S")
    path = folder / "log" / start / f"{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    log = logging.getLogger("scaleclip")
    log.handlers.clear()
    file = logging.FileHandler(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(file)
    if rank == 0:
        log.addHandler(RichHandler(show_path=False, show_level=False))
    log.setLevel(logging.INFO)
    log.propagate = False
    return log


def _check_same_run(folder: Path, config: RunConfig, manifest_fingerprint: str) -> list[dict[str, Any]]:
    """The starts so far; none for a new folder."""
    if not (folder / "config.yaml").exists() or not (folder / "provenance.json").exists():
        return []
    differing = differing_keys(read_config(folder), config)
    if differing:
        rows = "\n".join(f"  {key}: {old!r} there, {new!r} now" for key, old, new in differing)
        raise ConfigError(
            f"run.folder={folder} holds a run with another configuration:\n{rows}\n"
            f"set these back to go on with that run, or name another run.folder for a new one"
        )
    starts: list[dict[str, Any]] = json.loads((folder / "provenance.json").read_text())["starts"]
    if starts[0]["manifest"] != manifest_fingerprint:
        raise ConfigError(
            f"run.folder={folder} was trained on other shards: the names or sample counts of data.shards have changed since; "
            f"restore them to go on, or name another run.folder"
        )
    return starts


def _this_start(world_size: int, manifest_fingerprint: str) -> dict[str, Any]:
    checkout = Path(__file__).parent.parent
    describe = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    # an installed package may lie inside somebody else's repository
    known = shutil.which("git") and (checkout / ".git").exists()
    git = subprocess.run(describe, capture_output=True, text=True, check=False).stdout if known else ""
    return {
        "id": os.urandom(4).hex(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "world_size": world_size,
        "host": socket.gethostname(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "git": git.strip() or None,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "manifest": manifest_fingerprint,
    }
