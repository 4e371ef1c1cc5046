"""Runs that are killed, signalled or lose a process go on as if nothing had been."""

import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from runs import SPLITS, assert_same_curve, assert_same_run, finish, rows, run, signal_when, start, wait_until
from scaleclip.checkpoint.folders import newest, saved
from scaleclip.checkpoint.state import read_state

AFTER_STEP = {f"step {step}": (lambda folder, s=step: len(rows(folder)) >= s) for step in (1, 3, 5, 7, 9, 10, 11)}


IN_A_SAVE = {
    f"save {step}": (lambda folder, s=step: (folder / "checkpoints" / f".partial-step_{s:08d}").exists()) for step in (4, 8, 12)
}


@pytest.mark.slow
@pytest.mark.parametrize("seen", [pytest.param(seen, id=name) for name, seen in (AFTER_STEP | IN_A_SAVE).items()])
def test_a_killed_run_ends_like_an_undisturbed_one(tiny_config_path, undisturbed, tmp_path, seen):
    arguments = ("train", tiny_config_path, f"run.folder={tmp_path}", SPLITS)
    code, _ = signal_when(start(*arguments), lambda: seen(tmp_path), signal.SIGKILL)
    assert code == -signal.SIGKILL
    run(*arguments)
    assert_same_run(tmp_path, undisturbed)
    assert not list((tmp_path / "checkpoints").glob(".partial-*"))


@pytest.mark.slow
def test_a_run_with_loader_processes_and_a_damaged_checkpoint_goes_on_from_the_one_before(
    tiny_config_path, undisturbed, tmp_path
):
    arguments = ("train", tiny_config_path, f"run.folder={tmp_path}", SPLITS, "data.workers=2")
    signal_when(start(*arguments), lambda: len(rows(tmp_path)) >= 10, signal.SIGKILL)
    damaged = saved(tmp_path)[-1]
    weights = damaged / "rank_00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000] + b"\0" * 1000)
    output = run(*arguments)
    assert f"{damaged.name} is damaged (rank_00000.safetensors has changed)" in " ".join(output.split())
    assert_same_run(tmp_path, undisturbed)


def has_started_since(folder: Path, moment_s: float) -> bool:
    path = folder / "provenance.json"
    return path.exists() and path.stat().st_mtime > moment_s


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_killed_at_thirty_moments_in_changing_layouts_ends_like_a_whole_one(tiny_config_path, undisturbed, tmp_path):
    """Saves, mirrors and conversions included; no more is lost than the steps since the last save."""
    random_moment = random.Random(0)
    folder, kills = tmp_path / "run", 0
    while True:
        ranks, stage = random_moment.choice([(1, 0), (1, 1), (1, 3), (2, 1), (2, 2), (2, 3)])
        if kills % 5 == 4:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # it goes on from the mirror
        before = newest(folder)
        process = start(
            "train", tiny_config_path, f"run.folder={folder}", SPLITS, f"train.zero_stage={stage}", "--ranks", ranks,
            f"checkpoint.mirror={tmp_path}/mirror", "checkpoint.every_steps=1", process_group=0,
        )  # fmt: skip
        if kills == 30:
            code, output = finish(process)
            assert code == 0, output
            break
        # most of a start is imports: moments from there on
        wait_until(partial(has_started_since, folder, time.time()), process)
        time.sleep(random_moment.uniform(0, 3))
        os.killpg(process.pid, signal.SIGKILL)
        finish(process)
        kills += 1
        after = newest(folder)
        assert before is None or (after is not None and after.name >= before.name)
        if after is not None and read_state(after).step == 12:
            shutil.rmtree(folder)
            shutil.rmtree(tmp_path / "mirror", ignore_errors=True)
    assert_same_curve(folder, undisturbed)


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_run_whose_loader_process_is_killed_goes_on_by_itself(tiny_config_path, undisturbed, tmp_path):
    process = start("train", tiny_config_path, f"run.folder={tmp_path}", SPLITS, "data.workers=1", "data.prefetch_batches=1")
    workers: set[int] = set()
    for step in (2, 5, 8):
        wait_until(lambda step=step: len(rows(tmp_path)) >= step, process)
        for child in set(children(process.pid)) - workers:
            if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes():
                workers.add(child)
                os.kill(child, signal.SIGKILL)
    code, output = finish(process)
    assert code == 0, output
    assert_same_run(tmp_path, undisturbed)
    assert rows(tmp_path)[-1]["lost_workers"] >= 1


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_the_next_start_goes_on(tiny_config_path, tmp_path):
    arguments = ("train", tiny_config_path, "--ranks", "2", SPLITS)
    run(*arguments, f"run.folder={tmp_path}/whole")
    process = start(*arguments, f"run.folder={tmp_path}/killed")
    wait_until(lambda: len(rows(tmp_path / "killed")) >= 6, process)
    ranks = [child for child in children(process.pid) if b"scaleclip" in Path(f"/proc/{child}/cmdline").read_bytes()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    code, _ = finish(process)
    assert code == 128 + signal.SIGKILL
    run(*arguments, f"run.folder={tmp_path}/killed")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_without_a_whole_checkpoint_a_run_refuses_to_start_over(tiny_config_path, tmp_path):
    arguments = ("train", tiny_config_path, f"run.folder={tmp_path}")
    signal_when(start(*arguments), lambda: bool(saved(tmp_path)), signal.SIGKILL)
    for path in saved(tmp_path):
        (path / "state.json").unlink()
    code, output = finish(start(*arguments))
    assert code == 1
    assert "are damaged, or not every node sees them" in " ".join(output.split())


@pytest.mark.parametrize(
    "number",
    [signal.SIGUSR2, pytest.param(signal.SIGINT, marks=pytest.mark.slow), pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_a_signal_stops_at_a_step_boundary_and_loses_nothing(tiny_config_path, undisturbed, tmp_path, number):
    arguments = ("train", tiny_config_path, f"run.folder={tmp_path}", SPLITS)
    code, output = signal_when(start(*arguments), lambda: len(rows(tmp_path)) >= 2, number)
    assert code == 128 + number
    done = len(rows(tmp_path))
    assert f"stopped by {number.name} after step {done}, which is saved" in output
    assert read_state(saved(tmp_path)[-1]).step == done
    run(*arguments)
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
def test_two_ranks_by_the_command_stop_on_ctrl_c_and_go_on(tiny_config_path, tmp_path):
    arguments = ("train", tiny_config_path, f"run.folder={tmp_path}", SPLITS, "--ranks", "2")
    process = start(*arguments, process_group=0)
    code, output = signal_when(process, lambda: len(rows(tmp_path)) >= 3, signal.SIGINT)
    assert code == 128 + signal.SIGINT
    assert "which is saved" in output
    assert "Traceback" not in output
    run(*arguments)
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 13))


@pytest.mark.slow
def test_wandb_keeps_its_run_over_a_restart(tiny_config, tmp_path):
    arguments = ("train", tiny_config, "metrics.wandb=offline")
    signal_when(start(*arguments), lambda: len(rows(tmp_path / "run")) >= 5, signal.SIGKILL)
    run(*arguments)
    runs = sorted(path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert len({name.rsplit("-", 1)[1] for name in runs}) == 1
