"""Whole runs: killed, stopped, on several ranks, on bad data and full disks."""

import json
import os
import random
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from helpers import make_sample, write_tar
from rank_jobs import (
    train_and_stop,
    train_in_little_memory,
    train_in_the_memory_of,
    train_on_a_full_disk,
    train_run,
    train_with_a_failing_loss,
    train_with_a_hang,
    train_with_bad_steps,
)
from runs import exact, figures, finish, rows, run, signal_when, start, wait_until
from scaleclip.checkpoint.folders import newest, saved
from scaleclip.checkpoint.state import read_state
from scaleclip.local_ranks import run_ranks
from scaleclip.run_folder import read_config

SPLITS = "eval.splits=package:scaleclip/data/demo/eval/unseen_clipart.json"


@pytest.fixture(scope="session")
def undisturbed(tiny_config_path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    output = run("train", tiny_config_path, f"run.folder={folder}", SPLITS)
    assert "image -> text R@1" in output
    assert str(folder) in output
    return folder


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    assert exact(folder) == exact(undisturbed)
    assert figures(folder) == figures(undisturbed)


def test_a_run_learns_and_leaves_its_folder(undisturbed):
    losses = [row["loss"] for row in rows(undisturbed)]
    assert [row["step"] for row in rows(undisturbed)] == list(range(1, 13))
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.1
    assert [path.name for path in saved(undisturbed)] == ["step_00000008", "step_00000012"], "the newest two are kept"
    assert (undisturbed / "checkpoints" / "latest").read_text() == "step_00000012"
    assert read_config(undisturbed).run.folder == str(undisturbed)
    provenance = json.loads((undisturbed / "provenance.json").read_text())["starts"]
    assert provenance[0]["packages"]["torch"]
    assert (undisturbed / "curves.png").stat().st_size > 10_000
    assert list((undisturbed / "log").rglob("0.log"))


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
    assert code != 0
    run(*arguments, f"run.folder={tmp_path}/killed")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_without_a_whole_checkpoint_a_run_refuses_to_start_over(tiny_config_path, tmp_path):
    arguments = ("train", tiny_config_path, f"run.folder={tmp_path}")
    signal_when(start(*arguments), lambda: len(rows(tmp_path)) >= 5, signal.SIGKILL)
    for path in saved(tmp_path):
        (path / "state.json").unlink()
    code, output = finish(start(*arguments))
    assert code == 1
    assert "are damaged: delete them to start afresh" in output


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


@pytest.mark.parametrize("world_size", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_ranks_give_the_same_loss_curve(tiny_config_path, undisturbed, tmp_path, world_size):
    """8 pairs over 3 ranks leave an invalid slot on the last one."""
    run_ranks(train_run, world_size, tiny_config_path, [f"run.folder={tmp_path}", SPLITS])
    assert {row["world_size"] for row in rows(tmp_path)} == {world_size}
    assert_same_curve(tmp_path, undisturbed)


@pytest.mark.slow
def test_ranks_take_what_fits_the_one_with_the_least_memory(tiny_config_path, undisturbed, tmp_path):
    """A share of 4 pairs of which 3 would fit goes in two halves."""
    overrides = [f"run.folder={tmp_path}", SPLITS, "train.micro_batch=auto"]
    run_ranks(train_in_the_memory_of, 2, tiny_config_path, overrides, 3)
    assert {row["num_chunks"] for row in rows(tmp_path)} == {2}
    [log] = (tmp_path / "log").rglob("0.log")
    assert "train.micro_batch=auto is 2: a share of 4 in 2 chunk(s)" in " ".join(log.read_text().split())
    assert_same_curve(tmp_path, undisturbed)


@pytest.mark.slow
def test_stage_3_is_evaluated_on_the_way_and_traced(tiny_config_path, undisturbed, tmp_path):
    settings = (f"run.folder={tmp_path}", SPLITS, "train.zero_stage=3", "train.micro_batch=3", "eval.every_steps=5")
    run("train", tiny_config_path, *settings, "--ranks", "2", "--profile")
    assert_same_curve(tmp_path, undisturbed)
    evaluations = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in evaluations] == [5, 10, 12]
    assert [figure["value"] for figure in figures(tmp_path)["figures"]] == pytest.approx(
        [figure["value"] for figure in figures(undisturbed)["figures"]], abs=0.01
    )
    traces = list((tmp_path / "profile").iterdir())
    assert len(traces) == 2
    assert all(json.loads(trace.read_text())["traceEvents"] for trace in traces)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_compiled_towers_take_the_same_steps(tiny_config_path, undisturbed, tmp_path, stage):
    settings = (f"run.folder={tmp_path}", SPLITS, f"train.zero_stage={stage}", "train.compile=true", "train.micro_batch=4")
    run("train", tiny_config_path, *settings)
    assert_same_curve(tmp_path, undisturbed)


def test_two_views_of_a_mixture_train_and_their_mix_is_logged(tiny_config, shards, tmp_path):
    sources = (
        f"data.sources={{tiny: {{shards: '{shards}/*.tar', texts: {{caption: txt, name: json:captions.name}}, weight: 1}}, "
        f"other: {{shards: '{shards}/*.tar', texts: {{name: json:captions.name}}, weight: 3}}}}"
    )
    views = "data.views=[{texts: [caption, name]}, {texts: [name], max_tokens: 6}]"
    run("train", tiny_config, sources, views, "loss.duplicates=negative", "train.samples=32")
    for row in rows(tmp_path / "run"):
        mix = row["mix"]
        assert (mix["source/tiny"], mix["source/other"], mix["text/1/name"]) == (0.25, 0.75, 1.0)
        assert mix["text/0/name"] >= 0.75
        assert set(row["loader"]) >= {"read", "decode", "tokenize", "hand-over"}
        assert row["cache"] == {}
        assert row["lost_workers"] == 0


def assert_same_curve(folder: Path, undisturbed: Path) -> None:
    """Losses and gradient norms to float order."""
    for row, expected in zip(rows(folder), rows(undisturbed), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=2e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
        assert row["samples"] == expected["samples"]


@pytest.mark.parametrize(
    ("world_size", "stage"),
    [(1, 1), *(pytest.param(*layout, marks=pytest.mark.slow) for layout in ((1, 3), (3, 3), (4, 3), (3, 2), (2, 0)))],
)
def test_a_run_saved_by_two_ranks_under_stage_3_goes_on_in_another_layout(
    tiny_config_path, undisturbed, saved_by_two, tmp_path, world_size, stage
):
    shutil.copytree(saved_by_two, tmp_path, dirs_exist_ok=True)
    run_ranks(train_run, world_size, tiny_config_path, [f"run.folder={tmp_path}", SPLITS, f"train.zero_stage={stage}"])
    assert [row["world_size"] for row in rows(tmp_path)] == [2] * 4 + [world_size] * 8
    assert_same_curve(tmp_path, undisturbed)


def test_a_run_saved_under_stage_3_goes_on_bit_for_bit_in_the_same_layout(tiny_config_path, saved_by_two, tmp_path):
    overrides = [SPLITS, "train.zero_stage=3", "train.micro_batch=2"]
    shutil.copytree(saved_by_two, tmp_path / "halves")
    for name in ("halves", "whole"):
        run_ranks(train_run, 2, tiny_config_path, [f"run.folder={tmp_path / name}", *overrides])
    assert_same_run(tmp_path / "halves", tmp_path / "whole")


@pytest.fixture(scope="session")
def saved_by_two(tiny_config_path, tmp_path_factory) -> Path:
    """A run whose two ranks under stage 3, in two chunks each, were stopped after step 4."""
    folder = tmp_path_factory.mktemp("saved_by_two") / "run"
    run_ranks(train_and_stop, 2, tiny_config_path, [f"run.folder={folder}", "train.zero_stage=3", "train.micro_batch=2"], 4)
    assert [path.name for path in saved(folder)] == ["step_00000004"]
    return folder


@pytest.mark.slow
def test_two_ranks_by_the_command_stop_on_ctrl_c_and_go_on(tiny_config_path, tmp_path):
    arguments = ("train", tiny_config_path, f"run.folder={tmp_path}", SPLITS, "--ranks", "2")
    process = start(*arguments, process_group=0)
    code, output = signal_when(process, lambda: len(rows(tmp_path)) >= 3, signal.SIGINT)
    assert code != 0
    assert "which is saved" in output
    run(*arguments)
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 13))


def test_a_finished_run_is_left_alone(tiny_config_path, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in (undisturbed / "checkpoints").rglob("*")}
    assert len(before) > 5
    output = run("train", tiny_config_path, f"run.folder={undisturbed}", SPLITS)
    assert "is finished: nothing to do" in " ".join(output.split())
    assert "image -> text R@1" in output
    assert {path: path.stat().st_mtime_ns for path in (undisturbed / "checkpoints").rglob("*")} == before


def test_eval_gives_the_figures_of_the_runs_end(undisturbed):
    expected = figures(undisturbed)
    (undisturbed / "results.json").unlink()
    run("eval", undisturbed)
    assert figures(undisturbed) == expected


def test_another_configuration_is_refused_and_named(tiny_config_path, undisturbed):
    code, output = finish(
        start("train", tiny_config_path, f"run.folder={undisturbed}", SPLITS, "optim.lr=0.5", "data.workers=1")
    )
    assert code == 2
    assert "holds a run with another configuration" in output
    assert "optim.lr: 0.001 there, 0.5 now" in output
    assert "data.workers" not in output


def test_a_folder_that_cannot_be_written(tiny_config_path, tmp_path):
    (tmp_path / "file").write_text("")
    code, output = finish(start("train", tiny_config_path, f"run.folder={tmp_path}/file/run"))
    assert code == 2
    assert f"run.folder={tmp_path}/file/run: cannot be written: Not a directory" in output


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
    assert errors[1] == "MemoryError: no room for this block"
    for rank in (0, 2):
        first = "the first failure was on rank 1: MemoryError: no room for this block"
        assert errors[rank] == f"RankError: rank {rank} stops, {first}"


@pytest.mark.parametrize("full_rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_full_disk_on_one_rank_ends_all_with_its_message(tiny_config_path, tmp_path, full_rank):
    errors = run_ranks(train_on_a_full_disk, 2, tiny_config_path, [f"run.folder={tmp_path}"], full_rank, timeout_s=90)
    assert all(error.startswith("RunError: ") for error in errors)
    assert all("step_00000004" in error and "there is no earlier checkpoint" in error for error in errors)
    assert not list((tmp_path / "checkpoints").glob("*step_*"))


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


@pytest.mark.slow
def test_wandb_keeps_its_run_over_a_restart(tiny_config, tmp_path):
    arguments = ("train", tiny_config, "metrics.wandb=offline")
    signal_when(start(*arguments), lambda: len(rows(tmp_path / "run")) >= 5, signal.SIGKILL)
    run(*arguments)
    runs = sorted(path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert len({name.rsplit("-", 1)[1] for name in runs}) == 1


def test_no_shards_match(tiny_config):
    code, output = finish(start("train", tiny_config, "data.sources.tiny.shards=/nowhere/*.tar"))
    assert (code, output) == (
        2,
        "data.sources.tiny: no shards match '/nowhere/*.tar': check the path, and that this machine sees it\n",
    )


@pytest.mark.parametrize("setting", ["loss.backend=triton", "loss.fp32_precision=tf32x3"])
def test_a_loss_that_cannot_run_here_is_refused_before_the_folder_is_made(tiny_config, tmp_path, setting):
    code, output = finish(start("train", tiny_config, setting))
    assert code == 2
    assert setting in output
    assert "on cpu" in output
    assert output.count("\n") == 1
    assert not (tmp_path / "run").exists()
