"""Jobs: what they ask for, that they run on this machine, and how people look at them. tests/slurm has them on a cluster."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from runs import finish, rows, run, signal_when, start
from scaleclip.cluster import Cluster, load_cluster
from scaleclip.config import RunConfig
from scaleclip.config_io import load_config
from scaleclip.errors import ConfigError, Stopped
from scaleclip.evaluate_run import evaluate_all
from scaleclip.jobs import cancel_jobs, jobs_table, log_lines
from scaleclip.launch import sbatch_files, submit
from scaleclip.launch_cli import _swept
from scaleclip.run_folder import open_run
from scaleclip.status import Launch, StatusFile, note_launch, read_launches


def flags(text: str) -> dict[str, str]:
    """SLURM's options in a job's file."""
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH --")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def sbatch_file(folder: Path, cluster: Cluster) -> str:
    """A single run's."""
    config = RunConfig.model_validate({"run": {"folder": str(folder)}})
    [(_, file)] = sbatch_files([config], folder, cluster, evaluate=False)
    return file


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
    text = sbatch_file(tmp_path / "a b", load_cluster(str(path), {"nodes": 6, "exclude": "n7", "qos": None}))
    found = flags(text)
    assert found["nodes"] == "6"
    assert (found["ntasks-per-node"], found["gpus-per-node"], found["cpus-per-task"]) == ("4", "4", "6")
    assert (found["partition"], found["exclude"], found["signal"], found["time"]) == ("big", "n7", "USR2@90", "1440")
    assert {"requeue", "open-mode"} <= found.keys()
    assert "qos" not in found
    lines = text.splitlines()
    assert lines.index("module load cuda") < next(number for number, line in enumerate(lines) if line.startswith("srun "))
    assert "SCALECLIP_GRACE_S=90 SCALECLIP_SRUN='--mpi=none --label'" in lines
    assert f"check_nodes '{tmp_path}/a b/code/TIME'/${{SLURM_ARRAY_TASK_ID:-0}}.yaml" in lines
    assert text.rstrip().endswith('end_job "$?"')
    assert f"export PYTHONPATH='{tmp_path}/a b/code/TIME'" in text


def test_a_job_of_some_nodes_leaves_its_tasks_to_srun(tmp_path, slurm):
    """SLURM 22.05 gives a job of --nodes=1-3 --ntasks-per-node=1 one node, whatever is free."""
    text = sbatch_file(tmp_path / "run", load_cluster(None, {"nodes": 3, "min_nodes": 1, "ranks": 2, "cpus": 4}))
    found = flags(text)
    assert (found["nodes"], found["cpus-per-task"]) == ("1-3", "8")
    assert "ntasks-per-node" not in found
    assert "export SLURM_NTASKS_PER_NODE=2 SRUN_CPUS_PER_TASK=4" in text.splitlines()


def test_a_dry_run_shows_the_array_and_what_follows(tiny_config_path, tmp_path, slurm):
    output = run(
        "launch", tiny_config_path, f"run.folder={tmp_path}/a", "--dry-run", "--evaluate", "--sweep=optim.lr=1e-3,1e-4"
    )
    assert f"# member 0 trains {tmp_path}/a/optim.lr=1e-3; member 1 trains {tmp_path}/a/optim.lr=1e-4" in output
    first, second = output.split("# for each member, evaluates its run when that is finished")
    assert flags(first)["array"].startswith("0-1")
    assert flags(first)["job-name"] == "scaleclip-a"
    found = flags(second)
    assert (found["dependency"], found["job-name"]) == ("afterok:JOB_MEMBER", "scaleclip-a-evaluate")
    assert "array" not in found
    assert not (tmp_path / "a").exists()
    code, output = finish(start("launch", tiny_config_path, "--dry-run", "--local"))
    assert code == 2
    assert "--dry-run prints what sbatch would get" in output


def test_without_slurm_only_this_machine_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"this machine has no SLURM .* run here with --local"):
        sbatch_file(tmp_path, load_cluster(None, {}))


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("nods: 3", {}, r"mine\.yaml: unknown key 'nods'; did you mean 'nodes'\?"),
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


@pytest.mark.parametrize(
    ("options", "ranks"), [({}, 1), ({"gpus": 2}, 2), ({"gpus": 2, "ranks": 3}, 3), ({"ranks": 4}, 4), ({"gpus": None}, 1)]
)
def test_gpus_of_the_command_bring_their_ranks(tmp_path, options, ranks):
    path = tmp_path / "mine.yaml"
    path.write_text("ranks: 1")
    assert load_cluster(str(path), options).ranks_per_node == ranks


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


@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        (["optim.lr=1e-3,1e-3"], r"optim\.lr=1e-3 is the same run as .*/sweep/optim\.lr=1e-3: leave out one"),
        (["optim.lr=1e-3,0.001"], r"optim\.lr=0\.001 is the same run as"),
        (["optim.lr=1e-3", "optim.lr=1e-4"], r"--sweep=optim\.lr=1e-4: optim\.lr has a --sweep already"),
        (["run.folder=a,b"], r"--sweep=run\.folder=a,b: each run has a folder of its own"),
        (["optim.lr"], "give a key and values"),
    ],
)
def test_a_sweep_with_runs_that_are_one_is_refused(tiny_config_path, tmp_path, sweeps, message):
    with pytest.raises(ConfigError, match=message):
        _swept(tiny_config_path, [f"run.folder={tmp_path}/sweep"], sweeps)


@pytest.mark.parametrize("options", [("--dry-run",), ("--local",)])
def test_a_folder_of_another_run_is_refused_before_anything_is_submitted(tiny_config, tmp_path, slurm, options):
    open_run(load_config(tiny_config), 1, ["digest"], "default").close()
    code, output = finish(start("launch", tiny_config, "optim.lr=0.5", *options))
    assert code == 2
    assert "holds a run with another configuration:\n  optim.lr: 0.001 there, 0.5 now" in output
    assert not (tmp_path / "run" / "code").exists()


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
        assert [path.name for path in (folder / "evaluations").iterdir()] == ["step_00000004"]
    [code] = (tmp_path / "sweep" / "code").iterdir()
    assert (code / "scaleclip_kernels").is_dir()
    table = run("jobs", tmp_path / "sweep")
    assert table.count("finished") == 2
    assert not (tmp_path / "sweep" / "jobs").exists()
    assert "step 4  loss " in next((folder / "log").glob("*/0.log")).read_text()
    [(step, figures)] = evaluate_all(folder)  # reads what is there
    assert (step, bool(figures)) == (4, True)
    assert "step 4" in run("eval", folder, "--all")


@pytest.mark.slow
def test_a_job_here_that_fails_says_why(tiny_config_path, tmp_path):
    code, output = finish(
        start("launch", tiny_config_path, f"run.folder={tmp_path}/a", "--local", "data.sources.tiny.shards=/nowhere/*.tar")
    )
    assert code == 2
    assert "data.sources.tiny: no shards match '/nowhere/*.tar'" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_signal_for_the_command_is_one_for_its_job(tiny_config_path, tmp_path):
    folder = tmp_path / "run"
    process = start("launch", tiny_config_path, "--local", f"run.folder={folder}", "train.samples=8000")
    code, output = signal_when(process, lambda: rows(folder), signal.SIGINT)
    assert code == 130
    assert "stopped by SIGINT after step" in " ".join(output.split())
    assert json.loads((folder / "status.json").read_text())["state"] == "stopped"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Commands of SLURM that print `queue`, know two jobs that ended, refuse every new one, and note what was cancelled."""
    folder = tmp_path / "bin"
    folder.mkdir()
    queue, cancelled = tmp_path / "queue", tmp_path / "cancelled"
    queue.write_text("")
    for name, body in (
        ("squeue", f"cat {queue}"),
        ("sacct", "echo '8|CANCELLED by 0'; echo '9_0|FAILED'"),
        ("scancel", f"echo $* >> {cancelled}"),
        ("sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1"),
        ("srun", ""),
    ):
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return queue, cancelled


def row_of(name: str, table: str) -> list[str]:
    """Cells that are not empty."""
    cells = next(line for line in table.splitlines() if name in line).strip("│┃ ").split("│")
    return [cell.strip() for cell in cells if cell.strip()]


def begin(folder, monkeypatch, job="7"):
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("SLURM_JOB_ID", job)
    status = StatusFile(folder, world_size=4, steps=100, samples=800, most_idle=3)
    status.advance(40, 320, 20.0)
    return status


def shown(root, width=160) -> str:
    console = Console(width=width, record=True, file=sys.stderr)
    console.print(jobs_table(root, width))
    return console.export_text()


def launched(folder, job, kind="train", log="") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    note_launch(folder, Launch("now", job, kind, str(log)))


def test_runs_are_listed_with_what_slurm_says_of_them(tmp_path, monkeypatch, slurm):
    queue, _ = slurm
    begin(tmp_path / "runs" / "one", monkeypatch)
    launched(tmp_path / "runs" / "two", "9_0")
    queue.write_text("7 RUNNING None\n9_0 PENDING PartitionNodeLimit\n9_1 RUNNING None\n")
    text = shown(tmp_path / "runs")
    assert "40 / 100" in text
    assert "24 s" in text  # 480 pairs at 20 a second
    assert "not started, pending" in text
    assert "9_0 waits: PartitionNodeLimit" in text
    queue.write_text("7 PENDING Nodes required for job are DOWN\n")
    assert "running, pending" in shown(tmp_path / "runs")
    queue.write_text("")
    assert "not started, failed" in shown(tmp_path / "runs")
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 3600)
    assert "killed" in shown(tmp_path / "runs")


def test_the_job_that_is_shown_is_the_one_that_trains(tmp_path, monkeypatch, slurm):
    queue, _ = slurm
    folder = tmp_path / "runs" / "one"
    launched(folder, "9_0")
    launched(folder, "10", "evaluate")
    queue.write_text("9_0 RUNNING None\n10 PENDING Dependency\n")
    assert row_of("one", shown(tmp_path / "runs")) == ["one", "starting", "9_0"]
    with pytest.raises(Stopped), begin(folder, monkeypatch, "9_0").watch():
        raise Stopped(12, 40)
    assert row_of("one", shown(tmp_path / "runs"))[1:3] == ["starting", "9_0"]  # requeued, and runs already
    queue.write_text("")
    assert row_of("one", shown(tmp_path / "runs"))[1:3] == ["stopped", "9_0"]
    launched(folder, "8")  # which never trains
    assert row_of("one", shown(tmp_path / "runs"))[1:3] == ["stopped, cancelled", "8"]


def test_the_main_columns_are_readable_on_a_narrow_terminal(tmp_path, monkeypatch, slurm):
    queue, _ = slurm
    begin(tmp_path / "runs" / "optim.lr=1e-3-loss.kind=sigmoid", monkeypatch, "11260720_0")
    queue.write_text("11260720_0 PENDING Resources\n")
    text = shown(tmp_path / "runs", 80)
    for part in ("running, pending", "11260720_0", "40 / 100", "24 s"):
        assert part in text
    assert "device-hours" not in text


def test_a_folder_that_is_not_there_is_said(tmp_path):
    for look in (lambda: jobs_table(tmp_path / "rums", 80), lambda: next(log_lines(tmp_path / "rums", 0, 3, follow=True))):
        with pytest.raises(ConfigError, match=r"there is no folder .*/rums"):
            look()


def test_cancelling_ends_the_jobs_that_are_in_the_queue(tmp_path, monkeypatch, slurm):
    queue, cancelled = slurm
    folder = tmp_path / "runs" / "one"
    begin(folder, monkeypatch)
    with pytest.raises(ConfigError, match="has no job in SLURM's queue"):
        cancel_jobs(folder)
    queue.write_text("7 RUNNING None\n8 RUNNING None\n")
    assert cancel_jobs(folder) == ["7"]
    assert cancelled.read_text() == "7\n"


def test_cancelling_knows_every_job_that_ran_a_run_or_was_launched_for_it_and_all_runs_of_a_sweep(
    tiny_config_path, tmp_path, monkeypatch, slurm
):
    queue, cancelled = slurm
    for job in ("5", "6"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        open_run(load_config(tiny_config_path, [f"run.folder={tmp_path}/sweep/one"]), 1, ["digest"], "default").close()
    begin(tmp_path / "sweep" / "one", monkeypatch, "6")
    launched(tmp_path / "sweep" / "two", "7")
    queue.write_text("".join(f"{job} RUNNING None\n" for job in (4, 5, 6, 7)))
    assert cancel_jobs(tmp_path / "sweep") == ["5", "6", "7"]
    assert cancelled.read_text() == "5 6 7\n"


def test_a_refused_submission_leaves_nothing_and_is_said_once(tiny_config, tmp_path, slurm, capfd):
    folders = [tmp_path / "sweep" / name for name in ("a", "b")]
    configs = [load_config(tiny_config, [f"run.folder={folder}"]) for folder in folders]
    with pytest.raises(ConfigError, match="SLURM refuses the job: sbatch: error: invalid partition"):
        submit(configs, tmp_path / "sweep", load_cluster(None, {}), evaluate=True)
    assert not (tmp_path / "sweep").exists()
    assert "invalid partition" not in capfd.readouterr().err


def test_logs_follow_a_run_over_its_starts(tmp_path):
    with pytest.raises(ConfigError, match="has no log of rank 1"):
        next(log_lines(tmp_path, 1, 3, follow=False))
    first = tmp_path / "log" / "7" / "0.log"
    first.parent.mkdir(parents=True)
    first.write_text("a\nb\nc\n")
    assert list(log_lines(tmp_path, 0, 2, follow=False)) == ["b", "c"]
    lines = log_lines(tmp_path, 0, 1, follow=True)
    assert [next(lines), next(lines)] == [f"--- {first}", "c"]
    with first.open("a") as file:
        file.write("d\nhalf of a l")
    assert next(lines) == "d"
    second = tmp_path / "log" / "8" / "0.log"
    second.parent.mkdir()
    second.write_text("e\n")
    assert [next(lines), next(lines)] == [f"--- {second}", "e"]


def test_logs_are_of_the_job_until_it_trains(tmp_path, monkeypatch):
    folder, output = tmp_path / "run", tmp_path / "7_0_log.out"
    launched(folder, "7", log=output)
    lines = log_lines(folder, 0, 3, follow=True)
    assert next(lines) == f"--- waiting for a log of rank 0 in {folder}/log"
    output.write_text("check failed: no room (nodes: 2)\n")
    assert [next(lines), next(lines)] == [f"--- {output}", "check failed: no room (nodes: 2)"]
    assert list(log_lines(folder, 0, 3, follow=False)) == ["check failed: no room (nodes: 2)"]
    begin(folder, monkeypatch)
    first = folder / "log" / "7" / "0.log"
    first.parent.mkdir(parents=True)
    first.write_text("a\n")
    assert [next(lines), next(lines)] == [f"--- {first}", "a"]
    launched(folder, "8", log=tmp_path / "8_0_log.out")
    (tmp_path / "8_0_log.out").write_text("check failed: no data (nodes: 2)\n")
    os.utime(tmp_path / "8_0_log.out", (2e9, 2e9))
    assert list(log_lines(folder, 0, 1, follow=False)) == ["check failed: no data (nodes: 2)"]


def test_logs_of_a_sweep_name_its_runs(tmp_path):
    for name in ("a", "b"):
        launched(tmp_path / "sweep" / name, "7")
    with pytest.raises(ConfigError, match=r"sweep is no run, but has some below; name one of .*/sweep/a, .*/sweep/b"):
        next(log_lines(tmp_path / "sweep", 0, 3, follow=True))


def test_launches_of_another_version_are_left_out(tmp_path):
    (tmp_path / "launches.jsonl").write_text('{"job": "3"}\n{"jo\n')
    launched(tmp_path, "7")
    assert [launch.job for launch in read_launches(tmp_path)] == ["7"]
