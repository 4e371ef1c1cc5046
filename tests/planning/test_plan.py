import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from scaleclip.config_io import load_config
from scaleclip.errors import ConfigError, RunError
from scaleclip.plan_cli import plan as plan_command
from scaleclip.planning.devices import device_names, load_device
from scaleclip.planning.plan import (
    JPEG_BYTES_PER_PX,
    SAMPLES_PER_CPU_S,
    SAMPLES_WITH_VIEWS_PER_CPU_S,
    Assumptions,
    _loss_bytes,
    plan,
    sweep,
)
from scaleclip.planning.tables import data_advice, figures

ROOT = Path(__file__).parents[2]
CONFIG = "configs/demo.yaml"
TINY = ["model=tiny", "train.global_batch=4096", "data.canonical_streams=1", "train.samples=40960", "train.precision=bf16"]
TINY += ["data.workers=1000000"]  # so that cores decide


def config_of(*overrides):
    return load_config(CONFIG, [*TINY, *overrides])


def planned(num_ranks, *overrides, gpu="h100", **assumptions):
    return plan(config_of(*overrides), num_ranks, load_device(gpu), Assumptions(**assumptions))


def test_one_device_sends_nothing_and_computes_what_was_counted():
    alone = planned(1, "train.micro_batch=auto")
    assert alone.micro_batch == 4096
    assert alone.traffic == (0, 0, 0)
    towers = 4096 * (alone.flops.forward + alone.flops.backward)
    loss = 4 * 2 * 4096 * 4096 * 32
    assert alone.arithmetic.towers == towers
    assert alone.arithmetic.loss == loss
    assert alone.terms.compute == pytest.approx((towers / 989e12 + loss / 67e12) / 0.4)


def test_two_passes_encode_twice():
    one, two = planned(1, cpu_cores=1e6), planned(1, "train.micro_batch=64", cpu_cores=1e6)
    assert two.num_chunks == 64
    assert two.arithmetic.towers - one.arithmetic.towers == 4096 * one.flops.forward
    assert two.mfu < one.mfu


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_zero_sends(stage):
    """As scaleclip.traffic counted on two ranks: a rank's whole fp32 gradients are 4 P."""
    sent = planned(2, f"train.zero_stage={stage}", "train.micro_batch=512")
    whole = 4 * sent.num_learning
    gradients, parameters, _ = sent.traffic
    assert sent.num_chunks == 4
    # an all-reduce sends whole gradients over two ranks, a reduce-scatter or a gathering half of them
    assert gradients == {0: whole, 1: whole, 2: 4 * whole, 3: 4 * whole / 2}[stage]
    assert parameters == {0: 0, 1: whole / 2, 2: whole / 2, 3: 3 * 4 * whole / 2}[stage]
    if stage >= 2:
        once = planned(2, f"train.zero_stage={stage}", "train.micro_batch=512", "train.reduce_gradients=step")
        assert once.traffic.gradients == gradients / 4


@pytest.mark.parametrize("loss", [[], ["loss.kind=sigmoid", "model.init_logit_bias=-10"], ["loss.compute_dtype=bf16"]])
@pytest.mark.parametrize("duplicates", ["negative", "ignore", "positive"])
@pytest.mark.parametrize(("num_ranks", "schedule"), [(1, "ring"), (2, "ring"), (8, "gather"), (128, "auto")])
def test_the_loss_sends_what_the_kernels_formula_says(monkeypatch, loss, duplicates, num_ranks, schedule):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from loss_bench.formulas import sent_bytes

    config = config_of(*loss, f"loss.duplicates={duplicates}", f"loss.schedule={schedule}")
    expected = sent_bytes(
        config.loss.kind, "ring" if schedule == "ring" else "gather", num_ranks, 4096 // num_ranks, config.model.embed_dim,
        2 if config.loss.compute_dtype == "bf16" else 4, "full", has_ids=duplicates != "negative",
        positives=duplicates == "positive",
    )  # fmt: skip
    # but for the scalars
    assert _loss_bytes(config, num_ranks) == pytest.approx(expected, abs=64)


def test_more_devices_share_the_work():
    plans = sweep(config_of(), [1, 2, 4, 8192], load_device("h100"), Assumptions())
    assert [each.num_ranks for each in plans] == [1, 2, 4]
    assert plans[2].terms.compute == pytest.approx(plans[0].terms.compute / 4)
    assert plans[2].pairs_per_s > plans[0].pairs_per_s
    assert plans[2].gpu_hours >= plans[0].gpu_hours


def test_the_network_is_slower_than_the_node():
    inside, across = planned(16, node_size=16), planned(16, node_size=1)
    assert across.terms.gradients == pytest.approx(9 * inside.terms.gradients)
    assert across.busy_s > inside.busy_s


def test_data_limits_where_cores_are_few():
    few, many = planned(8, cpu_cores=0.5), planned(8, cpu_cores=1000.0)
    assert few.limit == "data"
    assert few.step_s == few.terms.data > many.step_s
    enough = planned(8, cpu_cores=many.cpu_cores_needed)
    assert enough.terms.data == pytest.approx(many.busy_s)


@pytest.mark.parametrize(
    ("workers", "cores", "advice"),
    [
        (0, 14, "Steps wait for data: set data.workers=12 instead of 1"),
        (8, 14, "Steps wait for data: set data.workers=12 instead of 8"),
        (12, 14, None),
        (12, 4.5, "Steps wait for data: 11.2 cores a device are needed, there are 4.5: set data.workers=4 and store smaller"),
    ],
)
def test_data_limits_where_loaders_are_few(workers, cores, advice):
    config = load_config(ROOT / "configs/laion400m.yaml", [f"data.workers={workers}"])
    found = plan(config, 64, load_device("h100"), Assumptions(cpu_cores=cores))
    assert (data_advice(found) or "").startswith(advice or "")
    assert (data_advice(found) is None) == (advice is None)
    assert (found.limit == "data") == (advice is not None)
    assert found.terms.data == pytest.approx(512 / 673 / min(max(workers, 1), cores))


@pytest.mark.parametrize(("task", "rates"), [("whole", SAMPLES_PER_CPU_S), ("views", SAMPLES_WITH_VIEWS_PER_CPU_S)])
def test_rates_of_data_are_those_of_the_record(task, rates):
    with (ROOT / "tools/results/data_cpu.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == task and row["pipeline"] == "scaleclip"]
    alone = {int(row["size"]): row for row in rows if row["format"] == "tar" and row["workers"] == "0"}
    assert {size: round(1e6 / float(row["cpu_us_p50"])) for size, row in alone.items()} == rates
    assert {size: float(row["bytes_per_pixel"]) for size, row in alone.items()} == JPEG_BYTES_PER_PX


def test_views_of_simclr_take_the_loaders_longer():
    simclr = plan(load_config(ROOT / "configs/slip.yaml"), 64, load_device("h100"), Assumptions())
    cores = min(simclr.num_loaders, simclr.cpu_cores)
    assert simclr.terms.data == pytest.approx(simclr.share / (cores * 110))
    assert simclr.cpu_cores_needed == pytest.approx(simclr.share / simclr.busy_s / 110)


def test_devices_have_sources_and_a_misspelt_one_a_hint():
    for name in device_names():
        device = load_device(name)
        assert device.source
        assert device.bf16_tflops > device.fp32_tflops
    with pytest.raises(ConfigError, match="did you mean 'h100'"):
        load_device("h10")


@pytest.mark.parametrize("gpu", ["h100", "cpu"])
def test_every_figure_says_where_it_comes_from(gpu):
    found = figures(planned(2, gpu=gpu))
    assert {figure.basis for figure in found} >= {"counted", "assumed", "measured", "estimated"}
    assert all(figure.basis for figure in found)
    assert ("data sheet" in {figure.basis for figure in found}) == (gpu == "h100")


def test_what_does_not_fit_is_said():
    config = config_of("train.zero_stage=0", "train.micro_batch=4096")
    none = plan(config, 1, load_device("h100")._replace(memory_gib=0.6), Assumptions())
    assert none.micro_batch == 0
    assert none.stages[0].largest_micro_batch > 0


app = typer.Typer()
app.command()(plan_command)


def invoke(*arguments):
    return CliRunner().invoke(app, [CONFIG, *TINY, *arguments], catch_exceptions=False)


def test_the_command_prints_tables(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    output = invoke("--gpus", "64", "--gpu", "a100-80").output
    for words in ("ZeRO-3", "largest micro batch", "data sheet", "assumed", "measured", "64 x a100-80", "NVIDIA A100"):
        assert words in output


def test_the_command_prints_json_and_draws(tmp_path):
    picture = tmp_path / "plan.png"
    tree = json.loads(invoke("--gpus", "8", "--json", "--picture", str(picture)).output)
    assert tree["devices"] == 8
    assert [each["stage"] for each in tree["memory_bytes"]] == [0, 1, 2, 3]
    assert tree["limit"] in {"compute", "gradients", "parameters", "loss", "data"}
    assert picture.stat().st_size > 10_000


def test_the_command_refuses_what_cannot_run():
    with pytest.raises(ConfigError, match="--image-px=300"):
        invoke("--image-px", "300")
    with pytest.raises(RunError, match="does not hold a micro batch"):
        invoke("train.micro_batch=1048576", "train.global_batch=1048576", "--gpus", "1")
    with pytest.raises(ConfigError, match="8192 ranks"):
        invoke("--gpus", "8192")


def test_a_plan_needs_neither_deepspeed_nor_matplotlib():
    program = (
        "import sys; from scaleclip import plan_cli; from scaleclip.planning import plan, tables; "
        "print([name for name in ('deepspeed', 'matplotlib', 'scaleclip.engine') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
