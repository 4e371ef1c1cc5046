"""A local SLURM cluster for the tests of this folder."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

LOCAL_CLUSTER = Path(__file__).with_name("local_cluster.sh")
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")


class Cluster:
    """Submits jobs to the local cluster and waits for them, always with a bound."""

    def __init__(self) -> None:
        export = subprocess.run([LOCAL_CLUSTER, "env"], check=True, capture_output=True, text=True).stdout
        conf = export.strip().removeprefix("export SLURM_CONF=")
        self._env = os.environ | {"SLURM_CONF": conf, "SCALECLIP_PYTHON": sys.executable}

    def run(self, *command: str | Path, cwd: Path | None = None) -> str:
        """Run a SLURM command; returns what it printed, stripped."""
        return subprocess.run(
            command, cwd=cwd, env=self._env, check=True, stdout=subprocess.PIPE, text=True, timeout=60
        ).stdout.strip()

    def submit(self, *arguments: str | Path, cwd: Path) -> str:
        """Submit with sbatch's `arguments` from the folder `cwd`; returns the job's id."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd)

    def final_state(self, job: str, timeout_s: float) -> str:
        """The state that the job ended in; a job that is requeued has not ended. Fails after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        state = "not in sacct"
        while not state.startswith(ENDED):
            if time.monotonic() > deadline:
                self.run("scancel", job)
                pytest.fail(f"job {job} is {state} after {timeout_s} s")
            time.sleep(1)
            state = self.run("sacct", "--allocations", "--noheader", "--parsable2", "--jobs", job, "--format", "state")
        return state


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster of at least two nodes: the one that runs already, else one that is stopped afterwards."""
    # in CI a cluster that is not there is a failure: tests that only skip would pass for ever
    unavailable = pytest.fail if "CI" in os.environ else pytest.skip
    if shutil.which("sbatch") is None:
        unavailable("SLURM is not installed: run tests/slurm/local_cluster.sh install")
    if os.geteuid() != 0:
        unavailable("only root can run a local SLURM cluster")
    was_running = subprocess.run([LOCAL_CLUSTER, "status"], check=False, capture_output=True).returncode == 0
    if not was_running:
        subprocess.run([LOCAL_CLUSTER, "start"], check=True, timeout=180)
    yield Cluster()
    if not was_running:
        subprocess.run([LOCAL_CLUSTER, "stop"], check=True, timeout=60)
