"""Rows, their truncation at a resume, pictures and tables."""

import json
import logging
from types import SimpleNamespace

import pytest

from scaleclip import metrics
from scaleclip.config import MetricsConfig
from scaleclip.evaluation.results import Figure, finished_step, read_results, write_results
from scaleclip.evaluation.saved import SavedFigures, evaluated_steps, evaluations
from scaleclip.metrics import EvaluationLog, Metrics, Row, read_rows
from scaleclip.report.console import results_table
from scaleclip.run_folder import PROGRESS, log_to


def make_row(step: int) -> Row:
    return Row(
        step=step, samples=step * 8, stage=0, epoch=step / 4, loss=5 / step, terms={"contrastive": 5 / step}, lr=1e-3,
        logit_scale=14.3, grad_norm=1.0, pairs_per_s=100.0,
        tflops=0.1, mfu=None, data_wait=0.01, loader={}, mix={}, cache={}, lost_workers=0, memory_gib=1.0,
        reduced_mib=1.0, gathered_mib=0.0, num_chunks=1, loss_scale=1.0, bad_steps=0, mirror_failures=0, invalid={},
        world_size=1, train_s=1.0,
    )  # fmt: skip


def open_metrics(folder, step=0) -> Metrics:
    return Metrics(folder, MetricsConfig(), {}, step, 10)


def test_rows_are_readable_while_they_are_written(tmp_path):
    metrics = open_metrics(tmp_path)
    for step in (1, 2):
        metrics.write(make_row(step))
        assert read_rows(tmp_path)[-1] == json.loads(json.dumps(make_row(step)._asdict()))
    metrics.close()


@pytest.fixture
def logs():
    """Logging as it was, after the test."""
    loggers = [logging.getLogger(name) for name in ("scaleclip", "scaleclip_kernels", PROGRESS)]
    before = [(each.handlers, each.level, each.propagate) for each in loggers]
    yield
    for each, (handlers, level, propagate) in zip(loggers, before, strict=True):
        each.handlers, each.propagate = handlers, propagate
        each.setLevel(level)


@pytest.mark.usefixtures("logs")
def test_progress_is_in_the_ranks_log(tmp_path):
    log_to(tmp_path, 0, "7")
    metrics = open_metrics(tmp_path)
    metrics.write(make_row(2)._replace(data_wait=0.2, loader={"read": 0.6, "decode": 0.4}))
    metrics.close()
    [line] = (tmp_path / "log" / "7" / "0.log").read_text().splitlines()
    assert line.endswith("INFO step 2  loss 2.500  100 pairs/s  scale 14.3  data wait 20% (read)")


def test_a_resume_drops_rows_of_lost_work_and_a_torn_line(tmp_path):
    metrics = open_metrics(tmp_path)
    for step in range(1, 6):
        metrics.write(make_row(step))
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3, 4, 5]
    metrics = open_metrics(tmp_path, step=3)
    metrics.write(make_row(4))
    metrics.close()
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3, 4]


def test_figures_of_checkpoints_are_sent_once(tmp_path, monkeypatch):
    """By a process that was killed after it had measured too."""
    logged = []
    monkeypatch.setattr(
        metrics, "_start_wandb", lambda *_: SimpleNamespace(define_metric=lambda *_, **__: None, log=logged.append)
    )
    first, second = ([Figure("held", "R@1", value, 0.1)] for value in (0.2, 0.3))
    EvaluationLog(tmp_path, MetricsConfig()).write(4, first)
    again = EvaluationLog(tmp_path, MetricsConfig())
    for step, figures in ((4, first), (8, first), (4, second), (4, second)):
        again.write(step, figures)
    sent = [(row["checkpoint_step"], row["eval/held R@1"]) for row in logged]
    assert sent == [(4, 0.2), (8, 0.2), (4, 0.3)]


def test_going_back_drops_rows_and_the_run_writes_on(tmp_path):
    metrics = open_metrics(tmp_path)
    for step in range(1, 6):
        metrics.write(make_row(step))
    for step in (2, 4):
        kept = SavedFigures(evaluations(tmp_path) / f"step_{step:08d}", "a", step)
        kept.save("food", "", [Figure("food", "x", 0.5, 0)])
    metrics.rewind(2)
    assert evaluated_steps(tmp_path) == [2]
    metrics.write(make_row(3)._replace(loss=None))
    metrics.close()
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path)] == [(1, 5.0), (2, 2.5), (3, None)]


def test_the_table_puts_chance_and_majority_beside_each_figure(tmp_path):
    figures = [
        Figure("s", "image -> text R@1", 0.123, 0.002, None, 0.1101, 0.1349),
        Figure("s", "zero-shot group", 0.5, 0.1, 0.25),
    ]
    write_results(tmp_path, 7, figures)
    assert finished_step(tmp_path) == 7
    columns = [list(column.cells) for column in results_table("run", read_results(tmp_path)).columns]
    assert columns == [
        ["s", "s"],
        ["image -> text R@1", "zero-shot group"],
        ["12.3%", "50.0%"],
        ["11.0 to 13.5", ""],
        ["0.2%", "10.0%"],
        ["", "25.0%"],
    ]
    without = results_table("run", [figure._replace(low=None, high=None) for figure in figures])
    assert [column.header for column in without.columns] == ["split", "figure", "measured", "chance", "majority class"]
