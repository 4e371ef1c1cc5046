"""Whole runs: on several ranks, in other layouts, finished, refused."""

import json
import shutil
from pathlib import Path

import pytest

from rank_jobs import (
    train_and_stop,
    train_in_the_memory_of,
    train_run,
)
from runs import SPLITS, assert_same_curve, assert_same_run, figures, finish, rows, run, start
from scaleclip.checkpoint.folders import saved
from scaleclip.local_ranks import run_ranks
from scaleclip.run_folder import read_config


def test_a_run_learns_and_leaves_its_folder(undisturbed):
    losses = [row["loss"] for row in rows(undisturbed)]
    assert [row["step"] for row in rows(undisturbed)] == list(range(1, 13))
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.1
    assert [path.name for path in saved(undisturbed)] == ["step_00000008", "step_00000012"], "the newest two are kept"
    assert (undisturbed / "checkpoints" / "latest").read_text() == "step_00000012"
    assert read_config(undisturbed).run.folder == str(undisturbed)
    provenance = json.loads((undisturbed / "provenance.json").read_text())["starts"]
    assert provenance[0]["packages"]["torch"]
    assert list((undisturbed / "log").rglob("0.log"))


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


# the run that both go on from is then made once, and not in every process of pytest's
goes_on_from_two = pytest.mark.xdist_group("saved by two")


@goes_on_from_two
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


@pytest.mark.slow
@goes_on_from_two
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
