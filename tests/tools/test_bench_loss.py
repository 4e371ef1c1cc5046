"""The loss profiler: what it refuses, what it counts, and what it makes of its measurements."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

import bench_loss
from bench_losses import ALLOCATED_MIB, BACKWARD_S, FORWARD_S, count_all
from loss_bench import correctness, estimate, fit, implementations, records, runner, summary
from loss_bench.correctness import Gradients, Step
from loss_bench.points import GEMM, Comparison, Errors, Job, Point, RankResult, Sample
from scaleclip.local_ranks import run_ranks

TESTS = Path(__file__).parents[1]
COMPARISON = Comparison(batch=1000, dim=100, dtype="fp32", scale=14.3, mode="full")
ERRORS = Errors(loss=1e-7, x=2e-7, y=3e-7, scale=1e-7)


def an_impl(name: str) -> str:
    return f"{name}=bench_losses:{name}"


@dataclass(frozen=True)
class Run:
    code: int
    table: str
    rows: dict[str, records.Row]
    csv: Path
    json: Path


# what several tests measure is measured once, and not in every process of pytest's
pytestmark = pytest.mark.xdist_group("bench loss")


@pytest.fixture(scope="module")
def tests_in_path() -> Iterator[None]:
    """The measuring processes can import bench_losses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS))
        yield


@pytest.fixture(scope="module")
def run(tests_in_path: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One small comparison in which much goes wrong."""
    folder = tmp_path_factory.mktemp("bench")
    names = ["right", "wrong", "hungry", "killed", "failing", "refusing"]
    arguments = ["--impl", ",".join(["panels", *map(an_impl, names)]), "--batch", "128", "--dim", "16"]
    arguments += ["--threads", "1", "--rounds", "1", "--repeats", "2"]
    arguments += ["--csv", str(folder / "run.csv"), "--json", str(folder / "run.json")]
    with pytest.MonkeyPatch.context() as patch:
        output = folder / "stdout"
        with output.open("w") as file:
            patch.setattr(sys, "stdout", file)
            code = bench_loss.main(arguments)
    rows = {row.impl: row for row in records.read(folder / "run.csv")}
    return Run(code, output.read_text(), rows, folder / "run.csv", folder / "run.json")


@pytest.mark.slow
def test_wrong_gradient_has_no_speed(run: Run) -> None:
    assert run.code == 1
    row = run.rows["wrong"]
    assert row.status == "wrong"
    assert "gradient of x" in row.note
    assert row.full_p50_ms is row.cpu_s is row.gemm_share is row.added_mib is None
    line = next(line for line in run.table.splitlines() if " wrong " in line)
    assert "WRONG" in line
    assert row.x_error > 1e-2
    assert row.y_error < 1e-6


@pytest.mark.slow
def test_right_losses_are_measured(run: Run) -> None:
    right, panels = run.rows["right"], run.rows["panels"]
    for row in (right, panels):
        assert row.status == "ok"
        assert 0 < row.full_p20_ms <= row.full_p50_ms <= row.full_p80_ms
        assert 0 < row.loss_error < 1e-6
        assert 0 < row.x_error < 1e-6
        assert 0 < row.plain_x_error < 1e-6
    assert right.loss == pytest.approx(panels.loss, rel=1e-5)
    # no processor works while it waits
    assert right.forward_p50_ms >= 1000 * FORWARD_S
    assert 1000 * BACKWARD_S <= right.backward_p50_ms < 1000 * FORWARD_S
    assert right.full_p50_ms == pytest.approx(right.forward_p50_ms + right.backward_p50_ms, rel=0.2)
    assert right.cpu_s < FORWARD_S
    flop = 4 * 2 * 128**2 * 16
    assert panels.gemm_share == pytest.approx(flop / (panels.full_p50_ms / 1e3) / (panels.gemm_gflop_per_s * 1e9), rel=1e-3)


@pytest.mark.slow
def test_memory_sees_what_is_allocated(run: Run) -> None:
    extra = run.rows["hungry"].added_mib - run.rows["right"].added_mib
    assert extra == pytest.approx(ALLOCATED_MIB, rel=0.1)
    assert run.rows["right"].added_mib < ALLOCATED_MIB / 10
    assert run.rows["right"].input_mib == 2 * 128 * 16 * 4 / 2**20


@pytest.mark.slow
def test_a_loss_that_cannot_be_measured_says_why(run: Run) -> None:
    reasons = {
        "killed": ("died", "SIGKILL"),
        "failing": ("died", "RuntimeError: the [first] line and the second"),
        "refusing": ("cannot run", "not on this machine"),
    }
    for name, (status, reason) in reasons.items():
        assert run.rows[name].status == status
        assert reason in run.rows[name].note
        assert run.rows[name].full_p50_ms is None
        assert f" {name} " in run.table


@pytest.mark.slow
def test_record_says_how_it_came_about(run: Run) -> None:
    row = run.rows["panels"]
    assert row.command.startswith("python tools/bench_loss.py --impl panels,")
    assert row.torch == torch.__version__.partition("+")[0] or row.torch == torch.__version__
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", row.date)
    assert (row.batch, row.dim, row.dtype, row.scale, row.mode, row.world, row.threads) == (128, 16, "fp32", 14.3, "full", 1, 1)
    assert records.read(run.json) == records.read(run.csv)
    assert {len(line) for line in csv.reader(run.csv.open(newline=""))} == {len(fields(records.Row))}
    assert len(json.loads(run.json.read_text())) == len(records.read(run.csv))


@pytest.mark.slow
def test_plot_is_drawn_from_the_record(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "loss.png"
    later = [replace(row, batch=2 * row.batch) for row in run.rows.values()]
    record = tmp_path / "two.csv"
    records.record(record, [*run.rows.values(), *later])
    assert bench_loss.main(["--from-csv", str(record), "--plot", str(path)]) == 0
    picture = matplotlib.image.imread(path)
    assert min(picture.shape[:2]) > 300
    assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 20


@pytest.mark.slow
def test_plot_of_nothing_is_an_error(run: Run, tmp_path: Path) -> None:
    from loss_bench import figure

    with pytest.raises(ValueError, match="nothing to draw"):
        figure.draw([run.rows["killed"]], tmp_path / "nothing.png")


def a_row(**changes: object) -> records.Row:
    outcome = an_outcome(an_impl("right"), "highest", 0.1)
    return replace(summary.rows([outcome], ABOUT)[0], **changes)


ABOUT = summary.About("2026-01-01", "abc", "command", "a processor", "2.14", 0.0, 1, 1)


def an_outcome(impl: str, precision: str, full_s: float, **result: object) -> summary.Outcome:
    sample = Sample(full_s / 4, full_s * 3 / 4, full_s, full_s)
    answer = RankResult("ok", errors=ERRORS, plain_errors=ERRORS, loss=1.0, added_bytes=1 << 20, samples=[sample])
    answer = replace(answer, **result)
    return summary.Outcome(Point(COMPARISON, impl, "", precision), [answer], [sample])


def test_measuring_again_replaces_the_row(tmp_path: Path) -> None:
    path = tmp_path / "record.csv"
    records.record(path, [a_row(loss=1.0), a_row(batch=2000, loss=2.0)])
    records.record(path, [a_row(loss=3.0, date="2026-02-02", commit="def", torch="2.15", note="new", repeats=9)])
    assert [(row.batch, row.loss) for row in records.read(path)] == [(1000, 3.0), (2000, 2.0)]


@pytest.mark.parametrize(
    "change",
    [
        {"impl": "other"},
        {"variant": "ring"},
        {"precision": "medium"},
        {"dim": 7},
        {"dtype": "bf16"},
        {"scale": 100.0},
        {"mode": "forward"},
        {"world": 2},
        {"threads": 3},
        {"machine": "another"},
        {"device": "cuda"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_point_keeps_the_row(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "record.json"
    records.record(path, [a_row()])
    records.record(path, [a_row(**change)])
    assert len(records.read(path)) == 2


def test_a_file_that_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other\.csv is not a record"):
        records.read(path)


# Correctness


def step_of(*gradients: torch.Tensor | None, loss: float = 1.0) -> Step:
    return Step(torch.tensor(loss, dtype=torch.float64), Gradients(*gradients))


def some_step() -> Step:
    torch.manual_seed(0)
    return step_of(
        torch.randn(8, 3).double(), torch.randn(8, 3).double(), torch.tensor(2.0).double(), torch.tensor(3.0).double()
    )


@pytest.mark.parametrize("name", ["x", "y", "scale", "bias", "loss"])
@pytest.mark.parametrize("factor", [1.0001, math.nan, 0.0, -1.0])
def test_every_fault_is_found(name: str, factor: float) -> None:
    truth = some_step()
    faulty = [g * factor if n == name else g for n, g in zip(("x", "y", "scale", "bias"), truth.gradients, strict=True)]
    step = Step(truth.loss * (factor if name == "loss" else 1), Gradients(*faulty))
    plain = Errors(1e-7, 1e-7, 1e-7, 1e-7, 1e-7)
    assert correctness.faults(correctness.errors(truth, truth), plain, "fp32") == []
    faults = correctness.faults(correctness.errors(step, truth), plain, "fp32")
    assert len(faults) == 1
    assert name in faults[0]


def test_a_missing_gradient_is_a_fault() -> None:
    truth = some_step()
    step = Step(truth.loss, truth.gradients._replace(y_ND=None))
    assert correctness.errors(step, truth).y == 1


def test_plain_torch_sets_the_measure() -> None:
    """Five times plain torch's error, and a few roundings."""
    plain = Errors(1e-3, 1e-3, 1e-3, 1e-3)
    assert correctness.faults(Errors(4.9e-3, 4.9e-3, 4.9e-3, 4.9e-3), plain, "fp32") == []
    assert len(correctness.faults(Errors(5.1e-3, 5.1e-3, 5.1e-3, 5.1e-3), plain, "fp32")) == 4


def test_ranks_make_one_step() -> None:
    """Features side by side without the W that the trainer's mean takes off; scalars as their mean."""
    truth = some_step()
    parts = [
        Step(truth.loss, Gradients(2 * truth.gradients.x_ND[s], 2 * truth.gradients.y_ND[s], 2 * scale, bias))
        for s, scale, bias in (
            (slice(0, 4), torch.tensor(0.5).double(), torch.tensor(1.0).double()),
            (slice(4, 8), torch.tensor(1.5).double(), torch.tensor(5.0).double()),
        )
    ]
    assert correctness.errors(correctness.over_ranks(parts, 2.0), truth) == Errors(0, 0, 0, 0, 0)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_plain_torch_is_near_the_truth(kind: str, dtype: str) -> None:
    comparison = replace(COMPARISON, dtype=dtype)
    inputs = correctness.make_inputs(comparison, kind, 50, seed=0, device=torch.device("cpu"))
    plain = correctness.run_step(correctness.plain_torch(kind, comparison), correctness.take(inputs))
    found = correctness.errors(plain, correctness.truth_of(kind, inputs))
    assert (found.bias is None) == (kind == "softmax")
    assert 0 < found.largest_gradient() < (1e-5 if dtype == "fp32" else 5e-2)
    assert (found.x > 1e-3) == (dtype == "bf16")


def test_checked_batch_has_panels_in_both_directions() -> None:
    from scaleclip_kernels.panels import PANEL_COLUMNS, PANEL_ROWS

    size = correctness.check_size(replace(COMPARISON, batch=8192))
    assert max(PANEL_ROWS, PANEL_COLUMNS) < size < 1100
    assert correctness.check_size(replace(COMPARISON, batch=8190, world=7)) % 7 == 0


# Traffic


@pytest.fixture(scope="module")
def traffic() -> tuple[list[dict], list[dict]]:
    """What every rank counted, of the losses and of single collectives."""
    results = run_ranks(count_all, 4)
    return [result[0] for result in results], [result[1] for result in results]


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_counted_bytes_are_the_formula(traffic: tuple[list[dict], list[dict]], num_ranks: int) -> None:
    for rank in traffic[0][-num_ranks:]:
        cases = {case: figures for (ranks, case), figures in rank.items() if ranks == num_ranks}
        assert len(cases) == 17
        for case, (counted, formula) in cases.items():
            assert counted == pytest.approx(formula, abs=1e-6), case
            assert counted > 0


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_how_collectives_are_counted(traffic: tuple[list[dict], list[dict]], num_ranks: int) -> None:
    part, others = 60 * 4, num_ranks - 1
    for rank in traffic[1][-num_ranks:]:
        is_root = rank[num_ranks].pop("is_root")
        assert rank[num_ranks] == pytest.approx(
            {
                "all_gather": others * part,
                "all_gather_into_tensor": others * part,
                "reduce_scatter_tensor": others * part,
                "all_to_all_single": others * part,
                "all_reduce": 2 * others / num_ranks * part,
                "scatter": others * part if is_root else 0,
                "ring": part,
            }
        )


# Order and summary


def test_inf_cl_says_that_it_needs_a_gpu() -> None:
    setup = implementations.Setup(COMPARISON, "", rank=0)
    with pytest.raises(implementations.CannotRun, match="need a CUDA device"):
        implementations.find("inf_cl").build(setup)


def test_a_loss_that_is_not_there_is_named() -> None:
    setup = implementations.Setup(COMPARISON, "", rank=0)
    with pytest.raises(implementations.CannotRun, match="bench_losses:absent cannot be imported"):
        implementations.find("mine=bench_losses:absent").build(setup)


def a_plan(**changes: object) -> runner.Plan:
    plan = runner.Plan([COMPARISON], ["panels", "open_clip", "inf_cl"], ["auto"], ["highest"], 3, 2, 60, "command")
    return replace(plan, **changes)


def test_implementations_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, str]] = []

    def fake(job: Job, timeout_s: float) -> summary.Outcome:
        order.append((job.point.name, job.point.precision))
        if job.point.name == "inf_cl":
            return summary.Outcome(job.point, [RankResult("cannot run", "no GPU")], [])
        seconds = {"highest": 0.4, "medium": 0.2}[job.point.precision] / (4 if job.point.name == "panels" else 1)
        # the rounds' order is not that of their times
        seconds *= (0.5, 2.0, 1.0)[order.count((job.point.name, job.point.precision)) % 3]
        made = an_outcome(job.point.impl, job.point.precision, seconds, flop=1e9 if job.point.impl == GEMM else None)
        return replace(made, point=job.point)

    monkeypatch.setattr(runner, "run_job", fake)
    with bench_loss.Progress(disable=True) as progress:
        (rows,) = runner.measure(a_plan(), ABOUT, progress)
    losses = [entry for entry in order if entry[0] != GEMM]
    one_round = [("panels", "highest"), ("open_clip", "highest"), ("open_clip", "medium")]
    assert losses == [one_round[0], one_round[1], ("inf_cl", "highest"), one_round[2], *one_round, *one_round]
    assert len(order) - len(losses) == 3 * 2
    assert order[0][0] == GEMM
    by_setting = {(row.impl, row.precision): row for row in rows if row.impl != GEMM}
    assert {key for key, row in by_setting.items() if row.is_best_setting} == {("open_clip", "medium")}
    panels = by_setting["panels", "highest"]
    assert (panels.full_p50_ms, panels.full_p80_ms) == pytest.approx((100, 160))
    assert by_setting["inf_cl", "highest"].status == "cannot run"
    table = "\n".join(summary._cells(by_setting["panels", "highest"], rows, over_ranks=False))
    assert "4.00" in table.splitlines()  # times the speed of open_clip at the same precision, not at its best


def test_summary_over_ranks() -> None:
    """The slowest rank's time, the largest memory and traffic, all ranks' products."""
    ranks = [Sample(1.0, 2.0, 3.0, 5.0), Sample(2.0, 0.5, 2.5, 7.0)]
    assert runner._slowest(ranks) == Sample(2.0, 2.0, 3.0, 12.0)
    comparison = replace(COMPARISON, world=2)
    answers = [
        RankResult(
            "ok", errors=ERRORS, plain_errors=ERRORS, loss=1.0, added_bytes=size << 20, sent_bytes=sent, formula_bytes=10.0
        )
        for size, sent in ((3, 10.0), (5, 20.0))
    ]
    loss = summary.Outcome(Point(comparison, "panels", "ring", "highest"), answers, [runner._slowest(ranks)])
    products = [RankResult("ok", flop=4e6), RankResult("ok", flop=4e6)]
    gemm = summary.Outcome(Point(comparison, GEMM, "default", "highest"), products, [Sample(0.5, 0, 0.5, 1)])
    row = summary.rows([gemm, loss], ABOUT)[1]
    assert (row.added_mib, row.sent_bytes, row.formula_bytes) == (5, 20, 10)
    assert row.gemm_gflop_per_s == pytest.approx(8e6 / 0.5 / 1e9)
    assert row.gemm_share == pytest.approx(4 * 2 * 1000**2 * 100 / 3.0 / (8e6 / 0.5))


def test_a_rank_that_failed_speaks_for_all() -> None:
    answers = [RankResult("ok"), RankResult("cannot run", "why")]
    assert summary.Outcome(Point(COMPARISON, "panels", "", "highest"), answers, []).first.note == "why"


def test_open_clip_runs_at_both_of_its_settings_over_ranks() -> None:
    points = a_plan(impls=["open_clip", "panels"], schedules=["ring", "gather"]).points(replace(COMPARISON, world=4))
    assert [(p.name, p.variant) for p in points if p.precision == "highest"] == [
        ("open_clip", "default"),
        ("open_clip", implementations.LOCAL),
        ("panels", "ring"),
        ("panels", "gather"),
    ]
    assert {p.name for p in points if p.precision == "medium"} == {"open_clip"}


# The command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--impl", "panel"], "'panel' is not one of panels, "),
        (["--impl", "mine=module"], "must be name=module:function"),
        (["--impl", "panels=a:b"], "name of its own"),
        (["--impl", "a=m:f,a=m:g"], "a is the name of two losses"),
        (["--batch", "8192,12x"], "argument --batch: '12x' is not a whole number above 0"),
        (["--batch", "0"], "argument --batch: '0'"),
        (["--batch", "10", "--world", "4"], "10 pairs cannot be split evenly over --world 4"),
        (["--dtype", "fp64"], "'fp64' is not one of fp32, bf16, fp16"),
        (["--scale", "-1"], "argument --scale: '-1' is not a finite number above 0"),
        (["--mode", "backward"], "'backward' is not one of forward, full"),
        (["--matmul-precision", "low"], "'low' is not one of highest, high, medium"),
        (["--schedule", "ring"], "give --world 2 or more"),
        (["--world", "2", "--schedule", "tree"], "'tree' is not one of auto, ring, gather"),
        (["--csv", "loss.txt"], "a path that ends in .csv"),
        (["--from-csv", "loss.csv"], "give --plot PATH"),
        (["--from-csv", "nowhere.csv", "--plot", "a.png"], "nowhere.csv does not exist"),
        (["--fit", "80"], "'80' is not a size such as 80GiB"),
        (["--fit", "80GiB", "--batch", "1024,2048"], "needs three batch sizes"),
        (["--fit", "80GiB", "--estimate", "h100"], "not allowed with argument"),
        (["--estimate", "v100"], "invalid choice: 'v100'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench_loss.main(arguments)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("text", ["80GiB", "80 GiB", "81920MiB"])
def test_sizes(text: str) -> None:
    assert bench_loss._memory(text) == 80 << 30


# Fit


def test_fit_recovers_each_term() -> None:
    batches = [2048, 4096, 8192]
    quadratic = [(50 << 20) + 300 * n + 12 * n**2 for n in batches]
    model = fit.fit_memory(batches, quadratic, input_bytes_per_pair=4096)
    assert (model.constant, model.linear, model.quadratic) == pytest.approx((50 << 20, 300 + 4096, 12), rel=1e-6)


@pytest.mark.parametrize("noise", [(0, 0, 0), (2, -1, 1), (-1, 1, 2)])
def test_fit_does_not_bend_with_the_noise(noise: tuple[int, ...]) -> None:
    """A square of a few MiB at 8192 would be terabytes at ten million."""
    batches = [2048, 4096, 8192]
    linear = [(20 << 20) + 8192 * n + (mib << 20) for n, mib in zip(batches, noise, strict=True)]
    model = fit.fit_memory(batches, linear, input_bytes_per_pair=4096)
    assert model.quadratic == 0
    assert model.linear == pytest.approx(8192 + 4096, rel=0.1)


def test_fit_has_no_negative_term() -> None:
    model = fit.fit_memory([1000, 2000, 4000], [100 << 20, 90 << 20, 1000 << 20], input_bytes_per_pair=0)
    assert min(model.constant, model.linear, model.quadratic) >= 0


@pytest.mark.parametrize(
    "model", [fit.MemoryModel(1e6, 4096, 12), fit.MemoryModel(5e8, 12_288, 0), fit.MemoryModel(0, 1, 100)], ids=str
)
def test_the_largest_batch_grows_with_the_budget(model: fit.MemoryModel) -> None:
    budgets = [2.0**power for power in range(20, 40)]
    largest = [fit.largest_batch(model, budget, step=1024) for budget in budgets]
    assert largest == sorted(largest)
    assert largest[-1] > largest[0]
    for budget, batch in zip(budgets, largest, strict=True):
        assert batch % 1024 == 0
        assert batch == 0 or model.bytes_at(batch) <= budget
        assert model.bytes_at(batch + 1024) > budget


def test_fit_of_memory_that_does_not_grow_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not grow"):
        fit.largest_batch(fit.MemoryModel(1e6, 0, 0), 1e9, 1024)


# Estimate


@pytest.mark.parametrize("layout", estimate.LAYOUTS, ids=str)
def test_estimate_adds_up(layout: tuple[int, str]) -> None:
    parts = estimate.terms(estimate.CHIPS["h100"], 32_768, 512, *layout)
    assert all(term.seconds > 0 and term.resource and term.formula for term in parts)
    busy = estimate.by_resource(parts)
    assert sum(busy.values()) == pytest.approx(sum(term.seconds for term in parts))
    matmuls = sum(term.seconds for term in parts if term.resource == "tensor cores")
    assert matmuls == pytest.approx(4 * 2 * 32_768**2 * 512 / layout[0] / (0.8 * 989e12))
    assert ("link" in busy) == (layout[0] > 1)


def test_estimated_panels_are_the_kernels() -> None:
    from scaleclip_kernels import triton_launch

    assert estimate.PANEL_ROWS == triton_launch.GRADIENT_ROWS
    assert estimate.PANEL_COLUMNS == triton_launch.GRADIENT_BYTES // (triton_launch.GRADIENT_ROWS * estimate.FEATURE_BYTES)


@pytest.mark.parametrize("chip", estimate.CHIPS)
def test_printed_terms_sum_to_the_printed_total(chip: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_loss.main(["--estimate", chip, "--batch", "32768"]) == 0
    output = capsys.readouterr().out
    assert "not measured" in output.splitlines()[0]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    for column in range(4, 4 + len(estimate.LAYOUTS)):
        terms = [float(row[column]) for row in rows if row[0] in ("forward", "backward") and row[column]]
        total = next(float(row[column]) for row in rows if row[1] == "nothing overlapped")
        least = next(float(row[column]) for row in rows if row[1] == "all overlapped")
        assert len(terms) == (10 if column == 4 else 14)
        assert sum(terms) == pytest.approx(total, rel=0.01)
        assert 0 < least <= total


# Whole runs that take longer


@pytest.mark.slow
def test_over_ranks(tmp_path: Path) -> None:
    record = tmp_path / "ranks.csv"
    arguments = ["--impl", "panels,panels_siglip,open_clip,open_clip_siglip,reference", "--world", "2", "--threads", "1"]
    arguments += ["--schedule", "ring,gather", "--batch", "64", "--dim", "16", "--rounds", "1", "--repeats", "1"]
    assert bench_loss.main([*arguments, "--csv", str(record)]) == 0
    rows = {(row.impl, row.variant): row for row in records.read(record) if row.precision == "highest"}
    for name in ("panels", "panels_siglip"):
        for schedule in ("ring", "gather"):
            row = rows[name, schedule]
            assert row.status == "ok"
            assert row.sent_bytes == row.formula_bytes > 0
            assert row.x_error < 1e-6
    assert rows["open_clip", "default"].note.startswith("its mean over ranks is 1/W")
    # two gathered modalities, there and (as all parts but its own are scattered) back
    assert rows["open_clip", implementations.LOCAL].sent_bytes == 4 * 32 * 16 * 4
    assert all(rows["open_clip_siglip", variant].status == "ok" for variant in ("bidir", "gather"))
    assert "cannot run over 2 ranks" in rows["reference", "auto"].note


@pytest.mark.slow
def test_fit_from_measurements(tests_in_path: None, capsys: pytest.CaptureFixture[str]) -> None:
    impls = f"panels,{an_impl('wrong')}"
    arguments = ["--impl", impls, "--batch", "2048,4096,6144", "--dim", "64", "--threads", "1", "--fit", "1GiB"]
    assert bench_loss.main(arguments) == 1
    output = capsys.readouterr().out
    assert re.search(r"wrong .*gradient of x", output)  # its place in the table, and why the exit code is 1
    found = re.search(r"│ panels .* ([\d,]+) \+ ([\d,.]+) N \+ 0 N\^2 +│ +([\d,]+) │$", output, re.MULTILINE)
    assert found is not None, output
    constant, linear, batch = (float(number.replace(",", "")) for number in found.groups())
    assert batch % 1024 == 0
    # the printed slope is rounded to a tenth of a byte
    assert constant + (linear - 0.05) * batch <= 1 << 30 < constant + (linear + 0.05) * (batch + 1024)


@pytest.mark.slow
def test_profile_writes_a_trace(tmp_path: Path) -> None:
    arguments = ["--impl", "panels", "--batch", "64", "--dim", "16", "--threads", "1", "--profile", str(tmp_path / "traces")]
    assert bench_loss.main(arguments) == 0
    (path,) = (tmp_path / "traces").iterdir()
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert "aten::addmm_" in names
    assert "_SoftmaxBackward" in names


def _heed_interrupts() -> None:
    """A shell's background jobs, these tests among them, ignore interrupts, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)], ids=str)
def test_a_signal_ends_the_measuring_processes(
    tests_in_path: None, number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BENCH_LOSSES_FOLDER", str(tmp_path))
    command = [sys.executable, "tools/bench_loss.py", "--impl", an_impl("endless"), "--batch", "64", "--dim", "16"]
    process = subprocess.Popen([*command, "--world", "2", "--threads", "1"], cwd=TESTS.parent, preexec_fn=_heed_interrupts)
    try:
        deadline = time.monotonic() + 120
        while len(children := [int(path.name) for path in tmp_path.iterdir()]) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(timeout=20) == code
        for child in children:
            with pytest.raises(ProcessLookupError):
                os.kill(child, 0)
    finally:
        process.kill()
