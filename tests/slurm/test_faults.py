"""What happens to jobs on a cluster: each run ends like an undisturbed one, and loses at most what came after its last save."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runs import exact, figures, rows
from slurm_cluster import NODES, REPOSITORY, Cluster, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
DEMO = REPOSITORY / "slurm" / "demo.sh"
NUM_STEPS = 60
OVERRIDES = (
    "train.global_batch=64",
    f"train.samples={64 * NUM_STEPS}",
    "optim.warmup_samples=320",
    "metrics.log_every_steps=2",
    "checkpoint.every_steps=6",
    "eval.splits=package:scaleclip/data/demo/eval/unseen_vendor.json",
)
TIMEOUT_S = 400


def submit(cluster: Cluster, folder: Path, *options: str, more: tuple[str, ...] = ()) -> str:
    return cluster.submit("--nodes=2", *options, DEMO, f"run.folder={folder}/run", *OVERRIDES, *more, cwd=folder)


def log_of(folder: Path) -> str:
    return "\n".join(path.read_text() for path in folder.glob("*.out"))


def starts(folder: Path) -> list[dict]:
    path = folder / "run" / "provenance.json"
    return json.loads(path.read_text())["starts"] if path.exists() else []


def status(folder: Path) -> dict:
    return json.loads((folder / "run" / "status.json").read_text())


def in_the_middle(folder: Path, step: int = 10) -> None:
    """Wait until a run's first start has come so far."""
    wait_until(lambda: any(row["step"] >= step for row in rows(folder / "run")))


def ends_like(undisturbed: Path, cluster: Cluster, job: str, folder: Path) -> None:
    assert cluster.final_state(job, TIMEOUT_S) == "COMPLETED", log_of(folder)
    assert exact(folder / "run") == exact(undisturbed)
    assert figures(folder / "run") == figures(undisturbed)
    assert status(folder)["state"] == "finished"


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a job that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = submit(cluster, folder)
    assert cluster.final_state(job, TIMEOUT_S) == "COMPLETED", log_of(folder)
    assert len(starts(folder)) == 1
    return folder / "run"


def node_states(cluster: Cluster, *options: str) -> list[str]:
    return cluster.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T", *options).split()


@pytest.fixture(autouse=True)
def healthy_nodes(cluster: Cluster) -> Iterator[None]:
    """Every node is back after a test."""
    yield
    for node in NODES:
        cluster.control("revive", node)

    def all_idle() -> bool:
        for node in NODES:
            # one that came back from a crash stays down until somebody says that it is in order
            if node_states(cluster, "--nodes", node)[0].startswith("down"):
                cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
        return set(node_states(cluster)) == {"idle"}

    wait_until(all_idle)


def preempt(cluster: Cluster, job: str, folder: Path) -> None:
    cluster.submit("--partition=main", "--exclusive", "--nodes=3", "--output=/dev/null", "--wrap=sleep 5", cwd=folder)


def requeue(cluster: Cluster, job: str, folder: Path) -> None:
    cluster.run("scontrol", "requeue", job)


def set_down(cluster: Cluster, job: str, folder: Path) -> None:
    cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")


def crash(cluster: Cluster, job: str, folder: Path) -> None:
    cluster.control("crash", "n2")


def kill_rank(cluster: Cluster, job: str, folder: Path) -> None:
    os.kill(cluster.tasks(job)[1], signal.SIGKILL)


EVENTS = [preempt, requeue, set_down, crash, kill_rank]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_a_disturbed_job_starts_again_and_ends_like_a_whole_one(
    cluster: Cluster,
    undisturbed: Path,
    tmp_path: Path,
    event: Callable[[Cluster, str, Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = submit(cluster, tmp_path, "--partition=preemptible")
    in_the_middle(tmp_path)
    begin = time.monotonic()
    event(cluster, job, tmp_path)
    wait_until(lambda: status(tmp_path)["starts"] == 2, TIMEOUT_S)
    wait_until(lambda: status(tmp_path)["step"] > status(tmp_path)["resumed_step"], TIMEOUT_S)
    assert status(tmp_path)["resumed_step"] > 0
    with capsys.disabled():
        print(f"\n{event.__name__}: training again after {time.monotonic() - begin:.0f} s")
    ends_like(undisturbed, cluster, job, tmp_path)
    assert [start["slurm_job"] for start in starts(tmp_path)] == [job, job]


@pytest.mark.parametrize("fault", ["slurmd", "controller"])
def test_ranks_outlive_daemons_of_slurms(cluster: Cluster, undisturbed: Path, tmp_path: Path, fault: str) -> None:
    job = submit(cluster, tmp_path)
    in_the_middle(tmp_path)
    if fault == "slurmd":
        cluster.control("kill-slurmd", "n2")
        time.sleep(3)
        cluster.control("revive", "n2")
    else:
        cluster.control("restart-controller")
    ends_like(undisturbed, cluster, job, tmp_path)
    assert len(starts(tmp_path)) == 1


def test_a_job_goes_on_after_its_time_limit(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "--time=1", "--signal=USR2@30", more=(f"train.samples={64 * 400}",))
    wait_until(lambda: "stopped by SIGUSR2" in log_of(tmp_path), TIMEOUT_S)
    wait_until(lambda: status(tmp_path)["starts"] == 2 and status(tmp_path)["resumed_step"] > 0, TIMEOUT_S)
    cluster.run("scancel", job)
    assert cluster.final_state(job, TIMEOUT_S).startswith("CANCELLED")


def test_ten_preemptions_in_a_row_lose_nothing(cluster: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, more=("checkpoint.every_steps=1", "metrics.log_every_steps=1"))
    for number in range(1, 11):
        wait_until(lambda number=number: len(starts(tmp_path)) == number, TIMEOUT_S)
        before = len(rows(tmp_path / "run"))
        wait_until(lambda before=before: len(rows(tmp_path / "run")) > before + 1, TIMEOUT_S)
        cluster.run("scancel", "--signal=USR2", job)
        wait_until(lambda number=number: len(starts(tmp_path)) > number, TIMEOUT_S)
    assert cluster.final_state(job, TIMEOUT_S) == "COMPLETED", log_of(tmp_path)
    assert figures(tmp_path / "run") == figures(undisturbed)
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, NUM_STEPS + 1))


def test_a_job_that_saves_nothing_again_and_again_is_ended(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, more=("checkpoint.every_steps=1000", "guard.max_idle_starts=1"))
    in_the_middle(tmp_path, step=2)
    os.kill(cluster.tasks(job)[1], signal.SIGKILL)
    assert cluster.final_state(job, TIMEOUT_S).startswith("FAILED"), log_of(tmp_path)
    assert f"2 starts of job {job} in a row have gone on from step 0 and saved nothing" in " ".join(log_of(tmp_path).split())
