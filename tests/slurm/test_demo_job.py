"""slurm/demo.sh trains the demo on two nodes, goes on after a signal, and works without SLURM."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runs import assert_same_curve, run
from runs import rows as read_rows
from slurm_cluster import REPOSITORY

DEMO = REPOSITORY / "slurm" / "demo.sh"
NUM_STEPS = 40  # enough for a signal sent at the first row to arrive before the last
LOG_EVERY_STEPS = 5
OVERRIDES = (
    "train.global_batch=64",
    "optim.warmup_samples=320",
    f"metrics.log_every_steps={LOG_EVERY_STEPS}",
    "eval.splits=package:scaleclip/data/demo/eval/unseen_vendor.json",
)
TIMEOUT_S = 300


def overrides(folder: Path, num_steps: int) -> list[str]:
    """Of a run of `num_steps` steps in `folder`/run."""
    return [*OVERRIDES, f"train.samples={64 * num_steps}", f"run.folder={folder / 'run'}"]


def check_finished(folder: Path, num_steps: int, world_size: int) -> None:
    rows = read_rows(folder)
    assert [row["step"] for row in rows] == list(range(LOG_EVERY_STEPS, num_steps + 1, LOG_EVERY_STEPS))
    assert {row["world_size"] for row in rows} == {world_size}
    losses = [row["loss"] for row in rows]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    assert json.loads((folder / "results.json").read_text())["figures"]


def log_of(folder: Path, job: str) -> str:
    return (folder / f"scaleclip-demo-{job}.out").read_text()


def submit_demo(cluster, folder: Path) -> str:
    """Submit from `folder`, where the job's log goes, with `folder`/run as run folder."""
    return cluster.submit("--nodes=2", "--ntasks-per-node=2", DEMO, *overrides(folder, NUM_STEPS), cwd=folder)


@pytest.fixture(scope="module")
def undisturbed_run(cluster, tmp_path_factory) -> Path:
    """Run folder of a job that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = submit_demo(cluster, folder)
    state = cluster.final_state(job, TIMEOUT_S)
    assert state == "COMPLETED", log_of(folder, job)
    return folder / "run"


@pytest.mark.slurm
def test_sbatch_trains_on_two_nodes_as_one_process_does(undisturbed_run: Path, tmp_path: Path) -> None:
    check_finished(undisturbed_run, NUM_STEPS, world_size=4)
    run("train", "package:scaleclip/configs/demo.yaml", *overrides(tmp_path, NUM_STEPS))
    assert_same_curve(undisturbed_run, tmp_path / "run")


@pytest.mark.slurm
def test_signalled_job_saves_requeues_itself_and_ends_with_the_same_figures(
    cluster, tmp_path: Path, undisturbed_run: Path
) -> None:
    job = submit_demo(cluster, tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT_S
    while not (metrics.exists() and metrics.read_text()):
        assert time.monotonic() < deadline, log_of(tmp_path, job)
        time.sleep(0.1)
    cluster.run("scancel", "--signal=USR2", job)

    state = cluster.final_state(job, TIMEOUT_S)

    assert state == "COMPLETED", log_of(tmp_path, job)
    starts = json.loads((tmp_path / "run" / "provenance.json").read_text())["starts"]
    assert [start["slurm_job"] for start in starts] == [job, job]
    assert "stopped by SIGUSR2" in log_of(tmp_path, job)
    exact = [[(row["step"], row["loss"]) for row in read_rows(folder)] for folder in (tmp_path / "run", undisturbed_run)]
    assert exact[0] == exact[1]
    results = [json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "run", undisturbed_run)]
    assert results[0] == results[1]


@pytest.mark.slurm
@pytest.mark.slow
def test_a_job_of_one_node_or_more_gets_all_that_are_free(cluster, tmp_path: Path) -> None:
    job = cluster.submit("--nodes=1-2", DEMO, *overrides(tmp_path, 15), cwd=tmp_path)
    assert cluster.final_state(job, TIMEOUT_S) == "COMPLETED", log_of(tmp_path, job)
    check_finished(tmp_path / "run", 15, world_size=2)


@pytest.fixture
def env_without_slurm(tmp_path: Path) -> dict[str, str]:
    """The environment on a machine that has never seen SLURM: no variable of it and none of its commands."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "git"):
        (tools / name).symlink_to(shutil.which(name))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return kept | {"PATH": str(tools), "SCALECLIP_PYTHON": sys.executable}


@pytest.mark.slow
def test_bash_trains_without_slurm(env_without_slurm: dict[str, str], tmp_path: Path) -> None:
    command = ["bash", DEMO, *overrides(tmp_path, num_steps=15)]
    subprocess.run(command, cwd=tmp_path, env=env_without_slurm, check=True, timeout=TIMEOUT_S)
    check_finished(tmp_path / "run", num_steps=15, world_size=1)


@pytest.mark.parametrize("missing", ["SCALECLIP_HOME", "SCALECLIP_PYTHON"])
def test_what_is_missing_is_named(env_without_slurm: dict[str, str], tmp_path: Path, missing: str) -> None:
    env = env_without_slurm | {missing: str(tmp_path / "nowhere")}
    demo = subprocess.run(["bash", DEMO], env=env, check=False, capture_output=True, text=True, timeout=60)
    assert demo.returncode == 2
    assert str(tmp_path / "nowhere") in demo.stderr
    assert missing in demo.stderr
    assert demo.stderr.count("\n") == 1
