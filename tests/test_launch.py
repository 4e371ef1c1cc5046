"""Jobs: what they ask for, that they run on this machine, and how people look at them. tests/slurm has them on a cluster."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from runs import finish, rows, run, start
from scaleclip.cluster import load_cluster
from scaleclip.errors import ConfigError
from scaleclip.jobs import cancel_jobs, jobs_table, log_lines
from scaleclip.launch import sbatch_file
from scaleclip.launch_cli import _swept
from scaleclip.status import StatusFile


def flags(text: str) -> dict[str, str]:
    """SLURM's options in a job's file."""
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH --")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_a_job_asks_for_what_cluster_and_options_say(tmp_path, slurm):
    path = tmp_path / "mine.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "partition": "big",
                "nodes": 8,
                "gpus": 4,
                "cpus": 6,
                "grace_s": 90,
                "setup": ["module load cuda"],
                "srun": ["--mpi=none", "--label"],
            }
        )
    )
    text = sbatch_file(tmp_path / "a b", load_cluster(str(path), {"nodes": 6, "min_nodes": 2, "exclude": "n7", "qos": None}))
    found = flags(text)
    assert found["nodes"] == "2-6"
    assert (found["ntasks-per-node"], found["gpus-per-node"], found["cpus-per-task"]) == ("4", "4", "6")
    assert (found["partition"], found["exclude"], found["signal"], found["time"]) == ("big", "n7", "USR2@90", "1440")
    assert {"requeue", "open-mode"} <= found.keys()
    assert "qos" not in found
    lines = text.splitlines()
    assert lines.index("module load cuda") < next(number for number, line in enumerate(lines) if line.startswith("srun "))
    assert "SCALECLIP_GRACE_S=90 SCALECLIP_SRUN='--mpi=none --label'" in lines
    assert f"check_nodes '{tmp_path}/a b/code/CODE'/${{SLURM_ARRAY_TASK_ID:-0}}.yaml" in lines
    assert text.rstrip().endswith('end_job "$?"')
    assert f"export PYTHONPATH='{tmp_path}/a b/code/CODE'" in text


def test_without_slurm_only_this_machine_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"this machine has no SLURM .* run here with --local"):
        sbatch_file(tmp_path, load_cluster(None, {}))


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("nods: 3", {}, "unknown key 'nods'; did you mean 'nodes'?"),
        ("nodes: 0", {}, "nodes=0: input should be greater than or equal to 1"),
        ("- 3", {}, "holds a list, not keys with values"),
        ("nodes: 2", {"min_nodes": 3}, "min_nodes=3 is above nodes=2"),
    ],
)
def test_a_cluster_that_makes_no_sense_is_refused(tmp_path, content, options, message):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_cluster(str(path), options)


def test_an_unknown_cluster_is_refused_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"--cluster=nowhere: there is no .*; known are example, local"):
        load_cluster("nowhere", {})


@pytest.mark.parametrize(
    ("sweep", "folders"),
    [
        ("data.crop_scale=[0.5,1],[0.9,1]", {"data.crop_scale=[0.5,1]", "data.crop_scale=[0.9,1]"}),
        ("optim.lr=1e-3,1e-4", {"optim.lr=1e-3", "optim.lr=1e-4"}),
    ],
)
def test_values_of_a_sweep_are_told_apart_by_commas_outside_of_brackets(tiny_config_path, tmp_path, sweep, folders):
    root, configs = _swept(tiny_config_path, [f"run.folder={tmp_path}/sweep"], [sweep])
    assert {Path(config.run.folder).relative_to(root).as_posix() for config in configs} == folders


@pytest.mark.slow
def test_a_sweep_runs_here_on_two_ranks_from_a_copy_of_the_code(tiny_config_path, tmp_path):
    arguments = ("launch", tiny_config_path, f"run.folder={tmp_path}/sweep", "--local", "--ranks", 2, "--evaluate")
    split = "eval.splits=package:scaleclip/data/demo/eval/unseen_clipart.json"
    run(*arguments, split, "train.samples=32", "--sweep", "optim.lr=1e-3,1e-4")
    for lr in ("1e-3", "1e-4"):
        folder = tmp_path / "sweep" / f"optim.lr={lr}"
        assert [row["lr"] <= float(lr) for row in rows(folder)] == [True] * 4
        assert {row["world_size"] for row in rows(folder)} == {2}
        assert json.loads((folder / "status.json").read_text())["state"] == "finished"
        assert [path.name for path in (folder / "evaluations").iterdir()] == ["step_00000004.json"]
    [code] = (tmp_path / "sweep" / "code").iterdir()
    assert (code / "scaleclip_kernels").is_dir()
    table = run("jobs", tmp_path / "sweep")
    assert table.count("finished") == 2


@pytest.mark.slow
def test_a_job_here_that_fails_says_where_its_log_is(tiny_config_path, tmp_path):
    code, output = finish(
        start("launch", tiny_config_path, f"run.folder={tmp_path}/a", "--local", "data.sources.tiny.shards=/nowhere/*.tar")
    )
    assert code == 1
    assert "the job on this machine failed: see " in output
    assert "Traceback" not in output


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Commands of SLURM that print `queue` and note what was cancelled."""
    folder = tmp_path / "bin"
    folder.mkdir()
    queue, cancelled = tmp_path / "queue", tmp_path / "cancelled"
    queue.write_text("")
    for name, body in (("squeue", f"cat {queue}"), ("scancel", f"echo $1 >> {cancelled}"), ("srun", "")):
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return queue, cancelled


def begin(folder, monkeypatch, job="7"):
    folder.mkdir(parents=True)
    monkeypatch.setenv("SLURM_JOB_ID", job)
    status = StatusFile(folder, world_size=4, steps=100, most_idle=3)
    status.advance(40, 320, 20.0)
    return status


def shown(root) -> str:
    console = Console(width=160, record=True, file=sys.stderr)
    console.print(jobs_table(root))
    return console.export_text()


def test_runs_are_listed_with_what_slurm_says_of_them(tmp_path, monkeypatch, slurm):
    queue, _ = slurm
    begin(tmp_path / "runs" / "one", monkeypatch)
    (tmp_path / "runs" / "two").mkdir()
    (tmp_path / "runs" / "two" / "launches.jsonl").write_text('{"time": "now", "job": "9_0"}\n')
    queue.write_text("7 RUNNING\n9_0 PENDING\n9_1 RUNNING\n")
    text = shown(tmp_path / "runs")
    assert "40 / 100" in text
    assert "24 s" in text  # 480 pairs at 20 a second
    assert "pending" in text
    queue.write_text("7 PENDING\n")
    assert "running, pending" in shown(tmp_path / "runs")
    queue.write_text("")
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 3600)
    assert "killed" in shown(tmp_path / "runs")


def test_cancelling_ends_the_jobs_that_are_in_the_queue(tmp_path, monkeypatch, slurm):
    queue, cancelled = slurm
    folder = tmp_path / "runs" / "one"
    begin(folder, monkeypatch)
    with pytest.raises(ConfigError, match="has no job in SLURM's queue"):
        cancel_jobs(folder)
    queue.write_text("7 RUNNING\n8 RUNNING\n")
    assert cancel_jobs(folder) == ["7"]
    assert cancelled.read_text() == "7\n"


def test_logs_follow_a_run_over_its_starts(tmp_path):
    with pytest.raises(ConfigError, match="has no log of rank 1"):
        next(log_lines(tmp_path, 1, 3, follow=False))
    first = tmp_path / "log" / "7" / "0.log"
    first.parent.mkdir(parents=True)
    first.write_text("a\nb\nc\n")
    assert list(log_lines(tmp_path, 0, 2, follow=False)) == ["b", "c"]
    lines = log_lines(tmp_path, 0, 1, follow=True)
    assert next(lines) == "c"
    with first.open("a") as file:
        file.write("d\nhalf of a l")
    assert next(lines) == "d"
    second = tmp_path / "log" / "8" / "0.log"
    second.parent.mkdir()
    second.write_text("e\n")
    assert [next(lines), next(lines)] == [f"--- {second}", "e"]
