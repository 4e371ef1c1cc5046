"""slurm/laion400m.sh: accepted by a cluster of its size as it is, and run on a small one with small overrides."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from runs import rows
from slurm_cluster import NODES, REPOSITORY, Cluster, need_slurm, wait_until

SCRIPT = REPOSITORY / "slurm" / "laion400m.sh"
RECIPES = sorted(path for path in SCRIPT.parent.glob("*.sh") if path.stem not in ("job", "demo", "eval"))
NUM_STEPS = 20
SMALL = (
    "data.sources={laion400m: {shards: 'package:scaleclip/data/demo/train/*.tar'}}",
    "data.workers=1",
    "model=tiny",
    "train.global_batch=128",
    f"train.samples={128 * NUM_STEPS}",
    "optim.warmup_samples=256",
    "train.precision=fp32",
    "checkpoint.every_steps=10",
    "metrics.log_every_steps=5",
)


@pytest.fixture(scope="module")
def large_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Nodes as the script asks for; nothing runs there."""
    need_slurm()
    found = Cluster(tmp_path_factory.mktemp("slurm") / "large", port=17100, LOCAL_SLURM_CPUS="128")
    found.control("start", "8")
    yield found
    found.control("stop")


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--nodes=2-8",)])
@pytest.mark.parametrize("script", RECIPES, ids=lambda script: script.stem)
def test_a_cluster_of_its_size_takes_the_script(
    large_cluster: Cluster, script: Path, options: tuple[str, ...], tmp_path: Path
) -> None:
    large_cluster.run("sbatch", "--test-only", *options, script, cwd=tmp_path)


@pytest.mark.slurm
def test_the_script_trains_on_two_small_nodes(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(
        "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0", SCRIPT,
        f"run.folder={tmp_path}/run", *SMALL, cwd=tmp_path,
    )  # fmt: skip
    state = cluster.final_state(job, 300)
    log = (tmp_path / f"scaleclip-laion400m-{job}.out").read_text()
    assert state == "COMPLETED", log
    assert [row["step"] for row in rows(tmp_path / "run")] == [5, 10, 15, 20]
    assert {row["world_size"] for row in rows(tmp_path / "run")} == {4}
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"], status["starts"]) == ("finished", NUM_STEPS, 1)
    assert "finished: all steps are done; step 20 of 20" in " ".join(log.split())


@pytest.mark.slurm
def test_what_is_amiss_is_said_in_one_line_before_training(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(
        "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", SCRIPT,
        f"run.folder={tmp_path}/run", *SMALL, "data.sources.laion400m.shards=/nowhere/*.tar", cwd=tmp_path,
    )  # fmt: skip
    assert cluster.final_state(job, 120).startswith("FAILED")
    log = (tmp_path / f"scaleclip-laion400m-{job}.out").read_text()
    lines = [line for line in log.splitlines() if line.startswith("check failed: ")]
    assert len(lines) == 1
    assert lines[0].startswith("check failed: data.sources.laion400m: no shards match '/nowhere/*.tar'")
    assert lines[0].endswith("(nodes: 2)")
    assert "Traceback" not in log
    assert not rows(tmp_path / "run")


@pytest.mark.slurm
@pytest.mark.slow
def test_a_bad_node_is_left_out(cluster: Cluster, tmp_path: Path) -> None:
    """A node that has fewer GPUs than it says: these nodes have none, so every one is bad, and the job waits for others."""
    job = cluster.submit(
        "--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=1", SCRIPT,
        f"run.folder={tmp_path}/run", *SMALL, cwd=tmp_path,
    )  # fmt: skip

    def excluded() -> set[str]:
        shown = cluster.run("scontrol", "show", "job", job)
        nodes = shown.partition("ExcNodeList=")[2].split()[0]
        return set(cluster.run("scontrol", "show", "hostnames", nodes).split()) if nodes != "(null)" else set()

    wait_until(lambda: excluded() == set(NODES), 180)
    cluster.run("scancel", job)
    log = (tmp_path / f"scaleclip-laion400m-{job}.out").read_text()
    assert "check failed: 1 ranks and 1 GPUs of SLURM's, but torch sees 0 (nodes: 1)" in log
    assert "starting again without n1" in log
