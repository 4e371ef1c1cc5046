"""Engine on gloo ranks: the clamp, steps that are left out, half precision, no host reads. That layouts agree is
tests/test_equivalence.py's."""

import itertools
import math

import pytest
import torch

from rank_jobs import (
    agree,
    compare_bf16,
    count_host_reads,
    first_parameters_of_each,
    run_steps_of_each,
    what_outlives_engines,
)
from scaleclip.config_io import load_config
from scaleclip.deepspeed_config import deepspeed_config
from scaleclip.errors import ConfigError
from scaleclip.local_ranks import run_ranks
from scaleclip.models.dual_encoder import DualEncoder


def stages(*numbers: int) -> list[list[str]]:
    return [[f"train.zero_stage={number}"] for number in numbers]


def test_the_logit_scale_stays_clamped(tiny_config_path):
    """The parameter and the fp32 master that the next step starts from, under a learning rate that throws them far."""
    more = ["model.init_logit_scale=5", "model.max_logit_scale=20", "optim.clip_norm=0"]
    ranks = run_ranks(run_steps_of_each, 2, tiny_config_path, [[*stage, *more] for stage in stages(0, 1, 3)], 4, 5.0)
    for results in zip(*ranks, strict=True):
        masters = [result["master_log_scale"] for result in results if result["master_log_scale"] is not None]
        assert masters
        assert all(master.tolist() == [results[0]["log_scales"][-1]] for master in masters)
        for scale in results[0]["log_scales"]:
            assert any(math.isclose(scale, bound, abs_tol=1e-6) for bound in (0, math.log(20))), "a step of 5 ends on a bound"


def test_a_step_reads_nothing_from_the_device(tiny_config_path):
    ways = ([], ["train.micro_batch=3"], ["train.precision=fp16"])
    cases = [[*stage, *way] for stage, way in itertools.product(stages(0, 1, 2, 3), ways)]
    terms = [
        "model.projector={hidden: 16, dim: 8}", "model.caption_decoder={queries: 6, teacher_forced: true}", "data.caption={}",
        "data.text_pairs={num_negatives: 2, sources: {any: {files: any.jsonl}}}", "data.views=[{}, {}]",
    ]  # fmt: skip
    cases += [["train.zero_stage=1", *terms], ["train.zero_stage=3", "train.micro_batch=3", *terms]]
    [counts] = run_ranks(count_host_reads, 1, tiny_config_path, cases)
    assert counts == [{}] * len(cases)


def test_an_engine_leaves_nothing_behind(tiny_config_path):
    """A run of several stages makes one after the other."""
    cases = [*stages(0, 1, 2, 3), ["train.zero_stage=3", "train.offload_optimizer=true", "train.micro_batch=3"]]
    [found] = run_ranks(what_outlives_engines, 1, tiny_config_path, cases)
    assert found == [[]] * len(cases)


OFTEN = [*stages(0, 1), [*stages(2)[0], "train.micro_batch=2"], [*stages(3)[0], "train.micro_batch=2"]]
SELDOM = [
    ["train.zero_stage=1", "train.offload_optimizer=true", "train.micro_batch=2"],
    ["train.zero_stage=2", "train.reduce_gradients=step", "train.micro_batch=2"],
    ["train.zero_stage=2", "train.offload_optimizer=true"],
    ["train.zero_stage=3", "train.offload_optimizer=true", "train.offload_parameters=true", "train.micro_batch=2"],
]


@pytest.mark.parametrize("cases", [pytest.param(OFTEN, id="stages"), pytest.param(SELDOM, id="more", marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_on_one_rank_is_left_out_by_all(tiny_config_path, cases):
    """Parameters stay, AdamW does not count it, and the next step is one."""
    cases = [[*case, "optim.clip_norm=0.5"] for case in cases]
    for results in zip(*run_ranks(run_steps_of_each, 2, tiny_config_path, cases, 3, 1e-3, 1), strict=True):
        for result in results:
            assert result["bad"] == [False, True, False]
            assert result["steps_of_adam"] == [1, 1, 2]
            assert math.isnan(result["losses"][1])
            assert math.isfinite(result["losses"][2])
            assert result["losses"][2] == results[0]["losses"][2]
            assert result["log_scales"][0] == result["log_scales"][1] != result["log_scales"][2]
            assert all(torch.isfinite(parameter).all() for parameter in result["parameters"].values())


def test_fp16_finds_a_loss_scale_that_fits(tiny_config_path):
    """Overflows lower the scale and are no bad steps."""
    more = ["train.precision=fp16", "optim.clip_norm=0.5", "model.init_logit_scale=100"]
    [results] = run_ranks(run_steps_of_each, 1, tiny_config_path, [[*stage, *more] for stage in stages(0, 3)], 8, 1e-3)
    for result in results:
        assert result["bad"] == [False] * 8
        scales = [2.0**16, *result["loss_scales"]]
        overflows = [after == before / 2 for before, after in itertools.pairwise(scales)]
        assert 0 < sum(overflows) < 8
        assert result["steps_of_adam"][-1] == 8 - sum(overflows)
        assert [not math.isfinite(norm) for norm in result["norms"]] == overflows


def test_an_fp16_loss_that_is_no_number_leaves_the_loss_scale_alone(tiny_config_path):
    [[result]] = run_ranks(run_steps_of_each, 1, tiny_config_path, [["train.precision=fp16"]], 3, 1e-3, 1)
    assert result["bad"] == [False, True, False]
    assert result["loss_scales"][1] == result["loss_scales"][0]


def test_bf16_steps_are_bf16_and_follow_fp32(tiny_config_path):
    """The engine's own autocast: losses near fp32's and not equal, the logit scale's master in fp32."""
    more = ["optim.clip_norm=0.5", "train.precision=bf16"]
    cases = [["train.zero_stage=0", "optim.clip_norm=0.5"], *([*stage, *more] for stage in stages(0, 1, 3))]
    [(truth, *results)] = run_ranks(run_steps_of_each, 1, tiny_config_path, cases, 4, 1e-3)
    for result in results:
        assert result["losses"] != truth["losses"]
        assert result["losses"] == pytest.approx(truth["losses"], rel=2e-2)
        assert {p.dtype for p in result["parameters"].values()} == {torch.float32}
        assert result["log_scales"] == pytest.approx(truth["log_scales"], abs=1e-3)


def test_autocast_keeps_the_logit_scale_and_is_no_less_exact_than_deepspeeds_bf16(tiny_config_path):
    result = run_ranks(compare_bf16, 1, tiny_config_path)[0]
    assert result["autocast_scale"] == pytest.approx(98.5, rel=1e-6)
    assert abs(result["bf16_scale"] - 98.5) > 0.3
    assert result["autocast_error"] < result["bf16_error"]


def test_every_stage_starts_with_the_same_weights_from_folders_too(tiny_config_path, tmp_path):
    """Under stage 3 rank 0 alone makes the towers, and hands them out."""
    torch.manual_seed(5)
    trained = DualEncoder(load_config(tiny_config_path, []).model)
    for name in ("image", "text"):
        getattr(trained, name).body.save_pretrained(tmp_path / name)
    folders = [f"model.{name}.pretrained={tmp_path / name}" for name in ("image", "text")]
    cases = [["train.zero_stage=0"], ["train.zero_stage=3"], ["train.zero_stage=1", *folders], ["train.zero_stage=3", *folders]]
    for fresh, fresh_3, started, started_3 in run_ranks(first_parameters_of_each, 2, tiny_config_path, cases):
        for name, expected in trained.named_parameters():
            assert torch.equal(fresh[name], fresh_3[name])
            assert torch.equal(started[name], started_3[name])
            if ".body." in name:
                assert torch.equal(started[name], expected)
        assert any(not torch.equal(fresh[name], started[name]) for name in fresh)


def test_an_error_on_one_rank_is_an_error_on_all():
    assert run_ranks(agree, 2, 1) == ["RunError: rank 1 failed: ValueError: broken here", "ValueError: broken here"]
    assert run_ranks(agree, 2, None) == ["True [0, 1] 2"] * 2


def test_deepspeeds_settings_can_be_set_but_for_what_other_keys_decide(tiny_config_path):
    settings = (
        "train.deepspeed={zero_optimization: {overlap_comm: true, stage3_prefetch_bucket_size: 7}, wall_clock_breakdown: true}"
    )
    found = deepspeed_config(load_config(tiny_config_path, [settings]), 2)
    assert found["zero_optimization"]["overlap_comm"] is True
    assert found["zero_optimization"]["stage"] == 1
    assert found["zero_optimization"]["stage3_prefetch_bucket_size"] == 7
    assert found["wall_clock_breakdown"] is True
    for setting, key in (
        ("{gradient_clipping: 1.0}", "train.deepspeed.gradient_clipping=1.0 is decided by optim.clip_norm: set that"),
        (
            "{zero_optimization: {stage: 3}}",
            "train.deepspeed.zero_optimization.stage=3 is decided by train.zero_stage: set that",
        ),
    ):
        with pytest.raises(ConfigError, match=key):
            deepspeed_config(load_config(tiny_config_path, [f"train.deepspeed={setting}"]), 2)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("{nonsense: 2, wall_clock_breakdown: true}", r"train.deepspeed has what DeepSpeed \S+ does not know: nonsense$"),
        ("{zero_optimization: {nonsense: 2}}", r"train.deepspeed: DeepSpeedZeroConfig of DeepSpeed \S+: nonsense=2: extra"),
    ],
)
def test_a_setting_that_deepspeed_does_not_know_is_refused(tiny_config_path, setting, message):
    with pytest.raises(ConfigError, match=message):
        run_ranks(first_parameters_of_each, 1, tiny_config_path, [[f"train.deepspeed={setting}"]])
