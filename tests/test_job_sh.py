"""slurm/job.sh against commands of SLURM's that note how they are called. tests/slurm has it on a cluster."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

JOB_SH = Path(__file__).parents[1] / "slurm" / "job.sh"
Run = Callable[..., tuple[int, str, list[str]]]
NO_RANK = ["echo 'srun: error: Unable to allocate resources' >&2"]
FAILED_FIRST = [
    "echo 'srun: error: n1: task 2: Exited with exit code 1' >&2",
    "echo 'srun: error: n2: tasks 0-1,3: Killed' >&2",
]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a line after sourcing job.sh; exit code, output, and what scontrol was asked for."""
    tools, calls = tmp_path / "bin", tmp_path / "calls"
    tools.mkdir()
    calls.write_text("")

    def start(line: str, state: str = "RUNNING", srun: str = "", code: int = 0, **environment: str):
        (tmp_path / "srun.txt").write_text(srun)
        show = "case $1 in show) echo '   ReqNodeList=(null) ExcNodeList=n9';; esac"
        for name, body in (
            ("scontrol", f'echo "$*" >> {calls}; {show}'),
            ("squeue", f"echo {state}"),
            ("srun", f"cat {tmp_path}/srun.txt; exit {code}"),
        ):
            (tools / name).write_text(f"#!/bin/bash\n{body}\n")
            (tools / name).chmod(0o755)
        env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SCALECLIP"))}
        env |= {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"} | environment
        script = f"set -euo pipefail; python=python; source {JOB_SH}; {line}"
        done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()

    return start


@pytest.mark.parametrize(
    ("said", "status", "code"),
    [
        (NO_RANK, 2, 2),
        ([], 0, 0),
        (FAILED_FIRST, 137, 1),
        (["echo 'srun: error: n1: tasks 0-3: Exited with exit code 2' >&2"], 2, 2),
    ],
)
def test_the_first_rank_to_end_decides(run: Run, said: list[str], status: int, code: int) -> None:
    found, output, calls = run("; ".join(["note_ends", *said, f"end_job {status}"]))
    assert (found, calls) == (code, [])
    assert output.splitlines() == [line.split("'")[1] for line in said]


def test_a_rank_that_was_killed_first_starts_the_job_again(run: Run) -> None:
    assert run("; ".join(["note_ends", *reversed(FAILED_FIRST), "end_job 137"]))[2] == ["requeue 7"]


@pytest.mark.parametrize("status", [140, 75, 70, 134, 135, 137, 139])
def test_what_may_pass_puts_the_job_back_into_the_queue(run: Run, status: int) -> None:
    code, _, calls = run(f"end_job {status}")
    assert code == 1
    assert calls == ["requeue 7"]


@pytest.mark.parametrize("status", [0, 1, 2, 130])
def test_what_would_come_again_ends_the_job(run: Run, status: int) -> None:
    assert run(f"end_job {status}") == (status, "", [])


@pytest.mark.parametrize(("state", "calls"), [("RUNNING", ["requeue 7"]), ("CANCELLED", []), ("PENDING", [])])
def test_ranks_that_were_terminated_start_again_unless_slurm_ended_the_job(run: Run, state: str, calls: list[str]) -> None:
    assert run("end_job 143", state=state)[2] == calls


def test_of_an_array_one_member_starts_again(run: Run) -> None:
    assert run("end_job 140", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3")[2] == ["requeue 7_3"]


def test_nodes_in_order_let_the_job_go_on(run: Run) -> None:
    assert run("check_nodes config.yaml; echo on") == (0, "on\n", [])


def test_what_all_nodes_say_ends_the_job_with_one_line(run: Run) -> None:
    said = "check failed on n1: no room\ncheck failed on n2: no room\n"
    assert run("check_nodes config.yaml", srun=said, code=2) == (2, "check failed: no room (nodes: 2)\n", [])


@pytest.mark.parametrize("said", ["bad node n2: GPU 0 is broken\n", "check failed on n2: /data is not there\n"])
def test_a_node_that_others_do_better_than_is_left_out(run: Run, said: str) -> None:
    code, output, calls = run("check_nodes config.yaml", srun=said, code=3)
    assert code == 1
    assert "starting again without n2" in output
    assert calls == ["requeue 7", "show job 7", "update JobId=7 ExcNodeList=n2,n9"]


def test_the_only_node_is_left_out_if_it_is_at_fault_and_not_a_setting(run: Run) -> None:
    one = {"SLURM_JOB_NUM_NODES": "1"}
    assert run("check_nodes c", srun="bad node n1: broken\n", code=3, **one)[2][-1] == "update JobId=7 ExcNodeList=n1,n9"
    assert run("check_nodes c", srun="check failed on n1: no data\n", code=2, **one)[0] == 2


def test_nodes_that_fail_again_and_again_end_the_job(run: Run) -> None:
    code, output, calls = run("check_nodes c", srun="bad node n2: broken\n", code=3, SLURM_RESTART_COUNT="10")
    assert (code, calls) == (2, [])
    assert "again and again" in output


def test_a_script_of_the_users_is_sourced_and_options_of_srun_are_passed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "activate").write_text("echo activated; export FROM_SCRIPT=1")
    (tmp_path / "srun.txt").write_text("")
    settings = {"SCALECLIP_ACTIVATE": str(tmp_path / "activate"), "SCALECLIP_PYTHON": "python", "SCALECLIP_CHECK": "0"}
    line = f'home={tmp_path}; srun() {{ echo $FROM_SCRIPT "$@"; }}; run_job c.yaml optim.lr=1'
    code, output, _ = run(line, SCALECLIP_SRUN="--mpi=none --label", **settings)
    assert code == 0
    options = "--kill-on-bad-exit=1 --mpi=none --label python -m scaleclip train c.yaml optim.lr=1"
    assert output.splitlines() == ["activated", f"1 {options}"]


def test_nodes_are_checked_before_training_alone(run: Run, tmp_path: Path) -> None:
    unchecked = ("run_command eval runs/a --follow", "run_command captions rewrite m")
    for command, checked in (("run_job c.yaml", True), *((command, False) for command in unchecked)):
        line = f'home={tmp_path}; check_nodes() {{ echo "checked $*"; }}; srun() {{ echo "$@"; }}; {command}'
        code, output, _ = run(line, SCALECLIP_PYTHON="python")
        assert code == 0
        assert ("checked" in output) == checked
        assert f"-m scaleclip {'train c.yaml' if checked else command.removeprefix('run_command ')}" in output


def test_an_evaluation_that_slurm_stops_starts_again(run: Run, tmp_path: Path) -> None:
    line = f"home={tmp_path}; run_command eval runs/a --follow"
    assert run(line, code=2, SCALECLIP_PYTHON="python")[::2] == (2, [])
    assert run(line, code=140, SCALECLIP_PYTHON="python")[2] == ["requeue 7"]


def test_an_evaluation_that_fails_again_and_again_ends(run: Run, tmp_path: Path) -> None:
    line = f"home={tmp_path}; run_command eval runs/a --follow"
    assert run(line, code=70, SCALECLIP_PYTHON="python", SLURM_RESTART_COUNT="2")[2] == ["requeue 7"]
    code, output, calls = run(line, code=70, SCALECLIP_PYTHON="python", SLURM_RESTART_COUNT="3")
    assert (code, calls) == (2, ["requeue 7"]), "that of before"
    assert "eval fails again and again" in output


def test_a_check_that_is_preempted_starts_again(run: Run) -> None:
    assert run("check_nodes c", code=140)[2] == ["requeue 7"]


@pytest.mark.parametrize("array", [{}, {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}])
def test_captions_find_the_repository_also_as_a_task_of_an_array(run: Run, tmp_path: Path, array: dict[str, str]) -> None:
    spooled, job = tmp_path / "slurm_script", "7_3" if array else "7"
    spooled.write_text((JOB_SH.parent / "captions.sh").read_text())
    show = f"scontrol() {{ [ $3 = {job} ] && echo '   Command={JOB_SH.parent}/captions.sh rewrite m'; }}"
    line = f'{show}; srun() {{ echo "$@"; }}; export -f scontrol srun; bash {spooled} rewrite m'
    code, output, _ = run(line, SCALECLIP_PYTHON="python", **array)
    assert (code, output) == (0, "--kill-on-bad-exit=1 python -m scaleclip captions rewrite m\n")
