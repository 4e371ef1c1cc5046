"""Runs on bad data, full disks and full memory, with losses that are not finite and ranks that hang."""

import json
import resource
import signal
import time

import pytest

from helpers import make_sample, write_tar
from rank_jobs import (
    train_in_little_memory,
    train_on_a_full_disk,
    train_with_a_failing_loss,
    train_with_a_hang,
    train_with_bad_steps,
)
from runs import SPLITS, assert_same_run, finish, rows, run, signal_when, start
from scaleclip.checkpoint.folders import newest, saved
from scaleclip.checkpoint.state import read_state
from scaleclip.local_ranks import run_ranks


@pytest.mark.slow
def test_a_full_disk_during_a_save_loses_nothing(tiny_config_path, undisturbed, tmp_path):
    """Files may not grow beyond 300 kB: metrics can be written, checkpoints cannot."""
    arguments = ("train", tiny_config_path, f"run.folder={tmp_path}", SPLITS)
    signal_when(start(*arguments), lambda: bool(saved(tmp_path)), signal.SIGKILL)
    intact = newest(tmp_path)
    assert intact is not None

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))

    code, output = finish(start(*arguments, preexec_fn=limit))
    assert code == 1
    assert "free some disk and start again: the run goes on from step_00000004, which is whole" in output
    assert "Traceback" not in output
    assert newest(tmp_path) == intact
    run(*arguments)
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_loss_that_fails_on_one_rank_ends_all_with_its_message(tiny_config_path, tmp_path):
    errors = run_ranks(train_with_a_failing_loss, 3, tiny_config_path, [f"run.folder={tmp_path}"], 1, timeout_s=90)
    assert errors[1] == "ArithmeticError: this block does not add up"
    for rank in (0, 2):
        first = "the first failure was on rank 1: ArithmeticError: this block does not add up"
        assert errors[rank] == f"RankError: rank {rank} stops, {first}"


@pytest.mark.parametrize("full_rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_full_disk_on_one_rank_ends_all_with_its_message(tiny_config_path, tmp_path, full_rank):
    errors = run_ranks(train_on_a_full_disk, 2, tiny_config_path, [f"run.folder={tmp_path}"], full_rank, timeout_s=90)
    assert all(error.startswith("RunError: ") for error in errors)
    assert all("step_00000004" in error and "there is no earlier checkpoint" in error for error in errors)
    assert not list((tmp_path / "checkpoints").glob("*step_*"))


@pytest.mark.slow
def test_bad_samples_are_counted_in_the_metrics_and_stop_the_run_beyond_the_limit(tiny_config, shards, tmp_path):
    write_tar(shards / "00001.tar", [make_sample(i, jpg=b"\xff\xd8\xffno") for i in range(9, 13)])
    folder = tmp_path / "run"
    run("train", tiny_config, "data.max_bad_fraction=1", "data.workers=1", "train.samples=32")
    assert rows(folder)[-1]["invalid"] == {"tiny/undecodable_image": 4}
    code, output = finish(start("train", tiny_config, f"run.folder={tmp_path}/other"))
    assert code == 1
    assert "samples could not be used (of all since the run's start: {'tiny/undecodable_image':" in output
    assert f"data.max_bad_fraction=0.1; the worst shards: {shards}/00001.tar (tiny): " in output
    listed = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(row["sample"] for row in listed) == [0, 1, 2, 3]
    assert {(row["source"], row["shard"], row["cause"]) for row in listed} == {
        ("tiny", f"{shards}/00001.tar", "undecodable_image")
    }


GUARDED = ["guard.max_bad_steps=3", "optim.clip_norm=0.5", "loss.duplicates=negative"]


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_bad_steps_in_a_row_send_the_run_back_and_their_batches_are_left_out(tiny_config, tmp_path, world_size):
    """Steps 6 to 8 fail: back to 4, on with batch 8 as step 5."""
    more = ["data.workers=1", "eval.every_steps=4", SPLITS, f"checkpoint.mirror={tmp_path}/mirror"]
    folders = run_ranks(train_with_bad_steps, world_size, str(tiny_config), [*GUARDED, *more], [6, 7, 8])
    assert folders == [str(tmp_path / "run")] * world_size
    evaluations = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in evaluations] == [4, 8, 12]
    folder = tmp_path / "run"
    assert [row["step"] for row in rows(folder)] == list(range(1, 13))
    assert [row["bad_steps"] for row in rows(folder)] == [0] * 4 + [3] * 8
    assert all(row["loss"] is not None for row in rows(folder))
    state = read_state(newest(folder))
    assert (state.step, state.batches_left_out, state.bad_steps, state.samples) == (12, 4, 3, 96)
    bad = [json.loads(line) for line in (folder / "bad_steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in bad] == [6, 7, 8]
    assert all(len(row["keys"]) == 8 for row in bad)
    # the fourth epoch of 32 samples begins with the batch that became step 9
    assert len({key for row in bad for key in row["keys"]}) == 24


@pytest.mark.slow
def test_what_one_stage_leaves_out_is_no_affair_of_the_next(tiny_config, tmp_path):
    """Steps 5 to 7 of the first stage fail, and 9 to 11, the first ones of the second, which goes back to the border."""
    stages = "stages=[{train: {samples: 64}}, {train: {samples: 32}}]"
    run_ranks(train_with_bad_steps, 1, str(tiny_config), [*GUARDED, stages], [5, 6, 7, 12, 13, 14])
    [log] = (tmp_path / "run" / "log").glob("*/0.log")
    assert log.read_text().count("leaving out the 3 batches since") == 2
    state = read_state(newest(tmp_path / "run"))
    assert (state.step, state.batches_left_out, state.bad_steps, state.samples) == (12, 3, 6, 96)


def test_a_bad_step_alone_is_left_out_and_recorded(tiny_config, tmp_path):
    folder = tmp_path / "run"
    assert run_ranks(train_with_bad_steps, 1, str(tiny_config), GUARDED, [2, 6, 7]) == [str(folder)]
    assert [row["step"] for row in rows(folder) if row["loss"] is None] == [2, 6, 7]
    assert [row["bad_steps"] for row in rows(folder)] == [0] + [1] * 4 + [2] + [3] * 6
    assert read_state(newest(folder)).batches_left_out == 0


def test_a_save_that_falls_on_a_bad_step_is_made_after_it(tiny_config, tmp_path):
    run_ranks(train_with_bad_steps, 1, str(tiny_config), [*GUARDED, "checkpoint.keep=9"], [4, 8, 9])
    assert [read_state(path).step for path in saved(tmp_path / "run")] == [5, 10, 12]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([6, 7, 8, 9, 10, 11], "again after going back and leaving them out"),
        ([1, 2, 3], "there is no checkpoint to go back to"),
    ],
)
def test_a_run_that_keeps_failing_ends_with_a_report(tiny_config, bad, message):
    [error] = run_ranks(train_with_bad_steps, 1, str(tiny_config), GUARDED, bad)
    assert error.startswith("RunError: the loss or its gradients were not finite in 3 steps in a row, up to step ")
    assert message in error
    assert "bad_steps.jsonl" in error


def test_a_hanging_rank_ends_all_within_the_time_out_with_their_stacks(tiny_config, tmp_path):
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"failed on ranks \[0, 1\]"):
        run_ranks(train_with_a_hang, 2, str(tiny_config), ["guard.hang_timeout_s=10"], 1, grace_s=8)
    stacks = {path.name: path.read_text() for path in (tmp_path / "run" / "log").rglob("*.stacks")}
    assert set(stacks) == {"0.stacks", "1.stacks"}
    assert "in hang_at_step_five" in stacks["1.stacks"]
    assert "step.py" in stacks["0.stacks"], "rank 0 waits for rank 1 in a collective of its step"
    assert time.monotonic() - begin < 90


def test_full_memory_is_said_with_settings_that_fit(tiny_config):
    overrides = ["train.global_batch=8192", "train.samples=16384", "train.micro_batch=8192", "optim.warmup_samples=0"]
    [error] = run_ranks(train_in_little_memory, 1, str(tiny_config), overrides)
    assert error.startswith("RunError: out of memory on rank 0 (cpu, ")
    assert "with 8,192 pairs at once, which take an estimated " in error
    assert "by estimate these fit: train.micro_batch=" in error
