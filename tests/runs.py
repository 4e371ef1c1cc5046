"""Start the command in a process of its own, watch it and kill it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TIMEOUT_S = 240
SPLITS = "eval.splits=package:scaleclip/data/demo/eval/unseen_clipart.json"
EXACT = ("step", "samples", "loss", "lr", "logit_scale", "grad_norm", "invalid")


def start(*arguments: str | Path, **settings: Any) -> subprocess.Popen[str]:
    """`scaleclip ARGUMENTS` on this interpreter, alone: no launcher's variables, one thread."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    environment |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "COLUMNS": "200"}
    command = [sys.executable, "-m", "scaleclip", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **(pipes | settings))


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output."""
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output


def run(*arguments: str | Path, **settings: Any) -> str:
    """Output of a command that must succeed."""
    code, output = finish(start(*arguments, **settings))
    assert code == 0, output
    return output


def signal_when(process: subprocess.Popen[str], seen: Callable[[], bool], number: signal.Signals) -> tuple[int, str]:
    """Send `number` as soon as `seen()`; the run must not have ended before."""
    wait_until(seen, process)
    process.send_signal(number)
    return finish(process)


def wait_until(seen: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Return as soon as `seen()`; the process must not have ended before."""
    deadline = time.monotonic() + TIMEOUT_S
    while not seen():
        assert process.poll() is None, f"ended before it could be signalled: {process.communicate()[0]}"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def rows(folder: Path) -> list[dict[str, Any]]:
    """Whole rows of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def exact(folder: Path) -> list[dict[str, Any]]:
    """What two runs of one configuration must share bit for bit."""
    return [{name: row[name] for name in EXACT} for row in rows(folder)]


def figures(folder: Path) -> Any:
    """Evaluation results."""
    return json.loads((folder / "results.json").read_text())


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    """Metrics bit for bit, and evaluation results."""
    assert exact(folder) == exact(undisturbed)
    assert figures(folder) == figures(undisturbed)


def assert_same_curve(folder: Path, undisturbed: Path) -> None:
    """Losses and gradient norms to float order."""
    for row, expected in zip(rows(folder), rows(undisturbed), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=2e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
        assert row["samples"] == expected["samples"]
