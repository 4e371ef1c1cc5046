"""slurm/captions.sh makes texts on two nodes, goes on after a kill, and shares the work of a job array."""

import json
import os
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from captioning_models import tiny_llama
from helpers import make_sample, write_tar
from runs import run
from slurm_cluster import REPOSITORY, Cluster, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
CAPTIONS = REPOSITORY / "slurm" / "captions.sh"
NUM_SHARDS, SHARD_SAMPLES = 8, 48
TIMEOUT_S = 300


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a rewriting of some shards by a tiny model, without where to."""
    folder = tmp_path_factory.mktemp("captions")
    for number in range(NUM_SHARDS):
        first = SHARD_SAMPLES * number
        write_tar(folder / f"{number:05d}.tar", [make_sample(first + place) for place in range(SHARD_SAMPLES)])
    model = tiny_llama(folder / "model")
    return ["rewrite", str(model), "--data", f"{folder}/*.tar", "--source", "human", "--batch", "4", "--max-tokens", "40"]


@pytest.fixture(scope="module")
def undisturbed(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run("captions", *arguments, "--out", out)
    return out


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def submit(cluster: Cluster, folder: Path, arguments: list[str], *options: str) -> str:
    options = ("--gpus-per-node=0", "--cpus-per-task=1", *options)
    return cluster.submit(*options, CAPTIONS, *arguments, "--out", folder / "out", cwd=folder)


def log_of(folder: Path) -> str:
    return "\n".join(path.read_text() for path in folder.glob("*.out"))


def test_a_job_on_two_nodes_with_a_killed_rank_has_every_key_once(
    cluster: Cluster, arguments: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    job, out = submit(cluster, tmp_path, arguments, "--nodes=2"), tmp_path / "out"
    wait_until(lambda: any(out.glob("texts/0*.parquet")) and len(cluster.tasks(job, "captions")) == 2)
    os.kill(cluster.tasks(job, "captions")[1], signal.SIGKILL)
    there = {path: path.stat().st_mtime_ns for path in out.glob("texts/0*.parquet")}
    assert 1 <= len(there) < NUM_SHARDS
    assert cluster.final_state(job, TIMEOUT_S) == "COMPLETED", log_of(tmp_path)
    assert cluster.run("sacct", "--jobs", job, "--allocations", "--duplicates", "--noheader", "--format", "nnodes").split() == [
        "2",
        "2",
    ]
    # what was there was not made again, and all is as if nothing had happened
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert files(out) == files(undisturbed)
    keys = [row["key"] for row in pq.read_table(out / "texts", columns=["key"]).to_pylist()]
    assert keys == [f"{number:09d}" for number in range(NUM_SHARDS * SHARD_SAMPLES)]

    again = submit(cluster, tmp_path, arguments, "--nodes=2")
    assert cluster.final_state(again, TIMEOUT_S) == "COMPLETED", log_of(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert files(out) == files(undisturbed)


def test_tasks_of_an_array_share_the_shards_and_one_is_stopped(
    cluster: Cluster, arguments: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    array, out = submit(cluster, tmp_path, arguments, "--array=0-1"), tmp_path / "out"
    wait_until(lambda: any(out.glob("partial/*.jsonl")))
    cluster.run("scancel", "--signal=USR2", f"{array}_1")
    for task in (0, 1):
        assert cluster.final_state(f"{array}_{task}", TIMEOUT_S) == "COMPLETED", log_of(tmp_path)
    assert files(out) == files(undisturbed)
    assert json.loads((out / "manifest.json").read_text())["complete"]
