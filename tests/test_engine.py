"""DeepSpeed engines on gloo ranks: equal steps for every number of ranks and stage, the clamp, no host reads."""

import math

import pytest
import torch

from rank_jobs import agree, compare_bf16, count_host_reads, run_steps
from ranks import run_ranks
from scaleclip.config import OptimConfig, TrainConfig
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.optim import parameter_groups
from scaleclip.schedule import learning_rate


@pytest.fixture(scope="module")
def one_process(tiny_config_path):
    return run_ranks(run_steps, 1, tiny_config_path, ["train.zero_stage=0", "optim.clip_norm=0.5"], 4, 1e-3)[0]


@pytest.mark.parametrize(("world_size", "stage"), [(1, 1), (2, 0), (2, 1), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_ranks_and_stages_take_the_same_steps(tiny_config_path, one_process, world_size, stage):
    """Losses, gradient norms (clipped steps included) and parameters of four steps against one process at stage 0."""
    results = run_ranks(run_steps, world_size, tiny_config_path, [f"train.zero_stage={stage}", "optim.clip_norm=0.5"], 4, 1e-3)
    assert max(one_process["norms"]) > 0.5, "the clip is at work"
    for result in results:
        assert result["losses"] == pytest.approx(one_process["losses"], rel=2e-6)
        assert result["norms"] == pytest.approx(one_process["norms"], rel=2e-5)
        for name, expected in one_process["parameters"].items():
            # AdamW's first steps are lr * sign(gradient) where a gradient is nothing but rounding (key biases)
            if not name.endswith("k_proj.bias"):
                torch.testing.assert_close(
                    result["parameters"][name], expected, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
                )


@pytest.mark.parametrize(("stage", "world_size"), [(0, 1), (1, 2)])
def test_the_logit_scale_stays_clamped(tiny_config_path, stage, world_size):
    """The parameter and the fp32 master that the next step starts from, under a learning rate that throws them far."""
    overrides = [f"train.zero_stage={stage}", "model.init_logit_scale=5", "model.max_logit_scale=20", "optim.clip_norm=0"]
    for result in run_ranks(run_steps, world_size, tiny_config_path, overrides, 4, 5.0):
        assert result["master_log_scales"] == result["log_scales"]
        at_a_bound = [
            any(math.isclose(scale, bound, abs_tol=1e-6) for bound in (0, math.log(20))) for scale in result["log_scales"]
        ]
        assert all(at_a_bound), "a step of 5 ends on a bound"


@pytest.mark.parametrize("stage", [0, 1])
def test_a_step_reads_nothing_from_the_device(tiny_config_path, stage):
    assert run_ranks(count_host_reads, 1, tiny_config_path, [f"train.zero_stage={stage}"])[0] == {}


def test_autocast_keeps_the_logit_scale_and_is_no_less_exact_than_deepspeeds_bf16(tiny_config_path):
    result = run_ranks(compare_bf16, 1, tiny_config_path)[0]
    assert result["autocast_scale"] == pytest.approx(98.5, rel=1e-6)
    assert abs(result["bf16_scale"] - 98.5) > 0.3
    assert result["autocast_error"] < result["bf16_error"]


@pytest.mark.parametrize("stage", [0, 1])
def test_bf16_steps_are_bf16_and_follow_fp32(tiny_config_path, one_process, stage):
    """The engine's own autocast: losses near fp32's and not equal, the logit scale's master in fp32."""
    overrides = [f"train.zero_stage={stage}", "optim.clip_norm=0.5", "train.precision=bf16"]
    result = run_ranks(run_steps, 1, tiny_config_path, overrides, 4, 1e-3)[0]
    assert result["losses"] != one_process["losses"]
    assert result["losses"] == pytest.approx(one_process["losses"], rel=2e-2)
    assert {p.dtype for p in result["parameters"].values()} == {torch.float32}
    assert result["log_scales"] == pytest.approx(one_process["log_scales"], abs=1e-3)


def test_an_error_on_one_rank_is_an_error_on_all():
    assert run_ranks(agree, 2, 1) == ["RunError: rank 1 failed: ValueError: broken here", "ValueError: broken here"]
    assert run_ranks(agree, 2, None) == ["True [0, 1] 2"] * 2


def test_what_decays():
    from scaleclip.config_io import load_config

    model = DualEncoder(load_config("configs/demo.yaml", ["model=tiny"]).model)
    groups = {group["name"]: group for group in parameter_groups(model, 0.3)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = {name: {names[id(p)] for p in group["params"]} for name, group in groups.items()}
    assert set().union(*grouped.values()) == set(names.values())
    assert sum(map(len, grouped.values())) == len(names)
    assert grouped["logit_scale"] == {"logit_scale"}
    assert groups["decay"]["weight_decay"] == 0.3
    assert groups["no_decay"]["weight_decay"] == groups["logit_scale"]["weight_decay"] == 0
    assert all("bias" not in name and "norm" not in name for name in grouped["decay"])
    assert "image_projection.weight" in grouped["decay"]


def test_learning_rate_warms_up_and_follows_a_cosine():
    optim, train = OptimConfig(lr=2.0, final_lr=0.2, warmup_samples=40), TrainConfig(global_batch=10, samples=240)
    rates = [learning_rate(step, optim, train) for step in range(train.steps + 1)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[14] == pytest.approx(1.1)
    assert rates[24] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert TrainConfig(global_batch=10, samples=241).steps == 25
