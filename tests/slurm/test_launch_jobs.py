"""Jobs that `scaleclip launch` submits: two nodes with two ranks each, an array, a chain, preempted and requeued."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from runs import exact, figures, rows
from scaleclip.run_folder import code_version
from slurm_cluster import REPOSITORY, Cluster, wait_until

pytestmark = pytest.mark.slurm
TIMEOUT_S = 400
NUM_STEPS = 40
OVERRIDES = (
    "train.global_batch=64",
    f"train.samples={64 * NUM_STEPS}",
    "optim.warmup_samples=320",
    "metrics.log_every_steps=2",
    "checkpoint.every_steps=10",
    "eval.splits=package:scaleclip/data/demo/eval/unseen_vendor.json",
)


def launch(cluster: Cluster, folder: Path, *arguments: str) -> list[str]:
    """Ids of the jobs."""
    command = [sys.executable, "-m", "scaleclip", "launch", "package:scaleclip/configs/demo.yaml", f"run.folder={folder}"]
    command += [*OVERRIDES, "--cluster", "local", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=cluster.env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return re.findall(r"job (\S+) trains", done.stdout)


def logs(folder: Path) -> str:
    return "\n".join(path.read_text() for path in folder.glob("jobs/*/*.out"))


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a job of two nodes with two ranks each, and of the one that evaluated it."""
    folder = tmp_path_factory.mktemp("launched") / "run"
    [job] = launch(cluster, folder, "--ranks=2", "--evaluate")
    assert cluster.final_state(job, TIMEOUT_S) == "COMPLETED", logs(folder)
    return folder


def test_two_nodes_with_two_ranks_train_from_a_copy_of_the_code(undisturbed: Path) -> None:
    assert {row["world_size"] for row in rows(undisturbed)} == {4}
    assert rows(undisturbed)[-1]["step"] == NUM_STEPS
    assert len(list((undisturbed / "jobs").glob("*/*_log.out"))) >= 4
    [code] = (undisturbed / "code").iterdir()
    starts = json.loads((undisturbed / "provenance.json").read_text())["starts"]
    assert [start["package"] for start in starts] == [str(code / "scaleclip")]
    assert starts[0]["git"] == code_version()


@pytest.mark.slow
def test_a_job_that_follows_evaluates_every_checkpoint(cluster: Cluster, undisturbed: Path) -> None:
    jobs = [json.loads(line)["job"] for line in (undisturbed / "launches.jsonl").read_text().splitlines()]
    assert cluster.final_state(jobs[1], TIMEOUT_S) == "COMPLETED", logs(undisturbed)
    found = sorted(path.name for path in (undisturbed / "evaluations").iterdir())
    assert found == [path.name for path in sorted((undisturbed / "checkpoints").glob("step_*"))]


@pytest.mark.slow
def test_a_preempted_job_goes_on_and_ends_like_a_whole_one(cluster: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    [job] = launch(cluster, folder, "--ranks=2", "--partition=preemptible")
    wait_until(lambda: any(row["step"] >= 6 for row in rows(folder)), TIMEOUT_S)
    cluster.submit("--partition=main", "--exclusive", "--nodes=3", "--output=/dev/null", "--wrap=sleep 5", cwd=tmp_path)
    assert cluster.final_state(job, TIMEOUT_S) == "COMPLETED", logs(folder)
    starts = json.loads((folder / "provenance.json").read_text())["starts"]
    assert len(starts) == 2
    assert exact(folder) == exact(undisturbed)
    assert figures(folder) == figures(undisturbed)


@pytest.mark.slow
def test_a_sweep_is_an_array(cluster: Cluster, tmp_path: Path) -> None:
    folders = [tmp_path / "sweep" / f"optim.lr={lr}" for lr in ("1e-3", "1e-4")]
    jobs = launch(cluster, tmp_path / "sweep", "--nodes=1", "--sweep=optim.lr=1e-3,1e-4")
    assert len({job.partition("_")[0] for job in jobs}) == 1
    # the last member's own id is that of the whole array
    wait_until(lambda: any(row["step"] >= 6 for row in rows(folders[1])), TIMEOUT_S)
    cluster.run("scontrol", "requeue", jobs[1])
    for job in jobs:
        assert cluster.final_state(job, TIMEOUT_S) == "COMPLETED", logs(tmp_path / "sweep")
    for folder, starts in zip(folders, (1, 2), strict=True):
        status = json.loads((folder / "status.json").read_text())
        assert (status["state"], status["step"]) == ("finished", NUM_STEPS)
        found = json.loads((folder / "provenance.json").read_text())["starts"]
        assert len(found) == starts
        assert len({start["git"] for start in found} - {None}) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_job_of_one_node_or_more_gets_all_that_are_free(cluster: Cluster, tmp_path: Path, ranks: int) -> None:
    options = ("--nodes=3", "--min-nodes=1", f"--ranks={ranks}", "train.global_batch=96", "train.samples=960")
    [job] = launch(cluster, tmp_path / "run", *options)
    assert cluster.final_state(job, TIMEOUT_S) == "COMPLETED", logs(tmp_path / "run")
    assert {row["world_size"] for row in rows(tmp_path / "run")} == {3 * ranks}


@pytest.mark.slow
def test_a_run_can_be_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    [job] = launch(cluster, folder)
    wait_until(lambda: rows(folder), TIMEOUT_S)
    subprocess.run([sys.executable, "-m", "scaleclip", "cancel", folder], env=cluster.env, check=True, timeout=60)
    assert cluster.final_state(job, TIMEOUT_S).startswith("CANCELLED")
