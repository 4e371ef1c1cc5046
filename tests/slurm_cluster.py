"""A real SLURM cluster on this machine for tests (tests/slurm/local_cluster.sh)."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
LOCAL_CLUSTER = REPOSITORY / "tests" / "slurm" / "local_cluster.sh"
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
NODES = ("n1", "n2", "n3")


class Cluster:
    """Submits jobs to a local cluster and waits for them, always with a bound."""

    def __init__(self, folder: Path, port: int, **settings: str) -> None:
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.env |= {"LOCAL_SLURM_DIR": str(folder), "LOCAL_SLURM_PORT": str(port), "SCALECLIP_PYTHON": sys.executable}
        self.env |= {"OMP_NUM_THREADS": "1"} | settings
        self.env["SLURM_CONF"] = self.control("env").strip().removeprefix("export SLURM_CONF=")

    def control(self, *arguments: str) -> str:
        """Run local_cluster.sh."""
        return subprocess.run([LOCAL_CLUSTER, *arguments], check=True, env=self.env, stdout=subprocess.PIPE, text=True).stdout

    def run(self, *command: str | Path, cwd: Path | None = None) -> str:
        """Run a SLURM command; returns what it printed, stripped."""
        return subprocess.run(
            command, cwd=cwd, env=self.env, check=True, stdout=subprocess.PIPE, text=True, timeout=60
        ).stdout.strip()

    def submit(self, *arguments: str | Path, cwd: Path) -> str:
        """Submit with sbatch's `arguments` from the folder `cwd`; returns the job's id."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd)

    def state(self, job: str) -> str:
        """As accounting knows it; a job that is requeued has not ended."""
        found = self.run("sacct", "--allocations", "--noheader", "--parsable2", "--jobs", job, "--format", "state")
        return found or "not in sacct"

    def final_state(self, job: str, timeout_s: float) -> str:
        """The state that the job ended in. Fails after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not (state := self.state(job)).startswith(ENDED):
            if time.monotonic() > deadline:
                self.run("scancel", job)
                pytest.fail(f"job {job} is {state} after {timeout_s} s")
            time.sleep(1)
        return state

    def tasks(self, job: str, scaleclip: str = "train") -> dict[int, int]:
        """Process of each rank of a job's training, or other command of scaleclip's, by rank."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environment = dict(line.split("=", 1) for line in (path / "environ").read_text().split("\0") if "=" in line)
                command = (path / "cmdline").read_text().split("\0")
            except (OSError, UnicodeDecodeError, ProcessLookupError):
                continue
            ours = environment.get("SLURM_JOB_ID") == job and "SLURM_STEP_ID" in environment
            if ours and command[1:4] == ["-m", "scaleclip", scaleclip]:
                rank = int(environment["SLURM_PROCID"])
                found[rank] = min(int(path.name), found.get(rank, sys.maxsize))
        return found


def wait_until(seen: Callable[[], Any], timeout_s: float = 120.0) -> None:
    """Return as soon as `seen()`."""
    deadline = time.monotonic() + timeout_s
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def need_slurm() -> None:
    """Skip, or in CI fail, where no local cluster can be: tests that only skip would pass for ever."""
    unavailable = pytest.fail if "CI" in os.environ else pytest.skip
    if shutil.which("sbatch") is None:
        unavailable("SLURM is not installed: run tests/slurm/local_cluster.sh install")
    if os.geteuid() != 0:
        unavailable("only root can run a local SLURM cluster")
