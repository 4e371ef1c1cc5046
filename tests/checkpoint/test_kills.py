"""kill -9 at random moments of loading, saving, publishing, deleting, sending to the mirror and fetching from it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from object_store import BUCKET, object_store

SCRIPT = Path(__file__).parent / "kill_jobs.py"


def kill(folder: Path, kills: int, ranks: int, mirror: str, environment: dict[str, str]) -> dict[str, int]:
    """What the kills met; each start has checked what it found."""
    command = [sys.executable, str(SCRIPT), str(folder), "0", str(kills), str(ranks), mirror]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    met = ast.literal_eval(found.stdout.splitlines()[-1])
    assert met["with a part of a checkpoint left"]
    assert met["and came back from the mirror"]
    return met


def test_a_killed_run_goes_on_from_the_last_save(tmp_path):
    kill(tmp_path, 10, 1, str(tmp_path / "mirror"), {})


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_killed_thirty_times(tmp_path, ranks):
    assert kill(tmp_path, 30, ranks, str(tmp_path / "mirror"), {})["before it had loaded"]


@pytest.mark.slow
def test_a_run_with_a_bucket_that_is_killed_thirty_times(tmp_path):
    with object_store() as store:
        kill(tmp_path, 30, 1, f"s3://{BUCKET}/run", store.environment())
