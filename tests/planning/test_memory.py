import resource

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scaleclip.config_io import load_config
from scaleclip.deepspeed_config import deepspeed_config
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.planning import memory
from scaleclip.planning.counting import count_flops, count_memory, num_tokens
from scaleclip.planning.memory import largest_micro_batch, step_memory
from scaleclip_kernels import blocks, panels, triton_launch
from scaleclip_kernels import distributed as ring
from storage_tracker import StorageTracker

CONFIG = "configs/demo.yaml"
TINY = ["model=tiny", "train.global_batch=64", "data.canonical_streams=1", "train.samples=640"]
TOWERS = {
    "vit": ["model=tiny"],
    "convnext": ["model=ConvNeXt-demo"],
    "checkpointing": ["model=tiny", "model.activation_checkpointing=true"],
    "locked": ["model=tiny", "model.image.locked=true", "model.image.unlocked_groups=1"],
    "views": ["model=tiny", "data.views=[{texts: [caption]}, {texts: [keywords]}]"],
    "bert": [
        "model=tiny",
        "model.text={type: bert, pooling: mean, context_length: 32, config: {hidden_size: 64, num_hidden_layers: 2, "
        "num_attention_heads: 4, intermediate_size: 128, vocab_size: 4096, eos_token_id: 1}}",
    ],
    "patch dropout": ["model=tiny", "model.image.patch_dropout=0.5"],
}


def config_of(*overrides):
    return load_config(CONFIG, [*TINY, *overrides])


def real_peak_bytes(config, size):
    """Of a forward and backward pass on real tensors whose gradients are dropped as soon as they are complete."""
    model = DualEncoder(config.model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    pixels = torch.zeros(size, 3, config.model.image.size, config.model.image.size, dtype=torch.uint8)
    tokens = (torch.ones(size, num_tokens(config.model, config.data), dtype=torch.int64),) * len(config.data.views)
    with StorageTracker() as tracker:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
            features = model(pixels, tokens, torch.arange(size))
        outputs = [features.image_BE, *features.texts_BE, features.logit_scale]
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    return tracker.peak_bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("towers", TOWERS)
def test_what_is_counted_on_fake_tensors_is_what_real_ones_take(towers, precision):
    config = config_of(*TOWERS[towers], f"train.precision={precision}")
    timeline = count_memory(config.model, config.data, precision).timeline
    counted = int((timeline.fixed_bytes + 7 * timeline.pair_bytes).max())
    assert counted == pytest.approx(real_peak_bytes(config, 7), rel=0.01)


def test_counting_takes_no_memory_of_the_models_size():
    config = config_of("model=ViT-B/32")
    count_memory(config.model, config.data, "fp32")  # libraries
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    config = config_of("model=ViT-B/16")
    counts = count_memory(config.model, config.data, "fp32")
    parameter_bytes = 4 * sum(counts.learning)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before < parameter_bytes / 10


@pytest.mark.parametrize("towers", ["vit", "convnext", "views"])
def test_flops_are_those_of_a_real_pass_and_backward_takes_twice_as_many(towers):
    config = config_of(*TOWERS[towers])
    flops = count_flops(config.model, config.data)
    pixels = torch.zeros(1, 3, config.model.image.size, config.model.image.size, dtype=torch.uint8)
    tokens = (torch.zeros(1, num_tokens(config.model, config.data), dtype=torch.int64),) * len(config.data.views)
    model = DualEncoder(config.model)
    # the counter does not know the CPU's fused attention; the plain one is made of matrix products
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(pixels, tokens, torch.zeros(1, dtype=torch.int64))
    assert flops.forward == counter.get_total_flops()
    # but for the gradients of the pixels, which nobody wants
    assert 1.8 * flops.forward < flops.backward < 2 * flops.forward


def test_locked_towers_go_back_for_less_and_checkpointing_for_more():
    plain, locked, again = (
        count_flops(config.model, config.data) for config in (config_of(*TOWERS[t]) for t in ("vit", "locked", "checkpointing"))
    )
    assert locked.forward == plain.forward == again.forward
    assert locked.backward < 0.8 * plain.backward
    assert again.backward > plain.backward + 0.5 * plain.forward


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_shards_the_optimizer_and_stage_3_the_parameters(stage):
    config = config_of(f"train.zero_stage={stage}", "train.global_batch=4096")
    alone, four = (step_memory(config, ranks, 512, "cpu") for ranks in (1, 4))
    assert four.optimizer == pytest.approx(alone.optimizer / 4, rel=1e-3)
    assert four.masters == pytest.approx(alone.masters / 4, rel=1e-3)
    if stage < 3:
        assert four.parameters == alone.parameters
    else:
        # a shard, what is gathered, and the messages that it comes in
        assert 1.24 * alone.parameters < four.parameters < 3.5 * alone.parameters


def test_two_passes_hold_a_micro_batch_and_the_shares_features():
    config = config_of("train.zero_stage=0", "train.global_batch=4096")
    small, large = (step_memory(config, 1, size, "cpu") for size in (256, 512))
    assert small.moment == large.moment == "towers"
    assert large.activations == pytest.approx(2 * small.activations, rel=0.05)
    assert small.features == large.features == 2 * 4096 * 2 * config.model.embed_dim * 4
    whole = step_memory(config, 1, 4096, "cpu")
    assert whole.features == 0
    assert whole.activations == pytest.approx(8 * large.activations, rel=0.05)


def test_gradients_of_several_chunks_are_whole_unless_every_chunk_reduces():
    def gradients(*overrides):
        # enough pairs at once for the towers' moment to be the peak
        return step_memory(config_of("train.global_batch=4096", *overrides), 4, 512, "cpu").gradients

    whole = gradients("train.zero_stage=0")
    assert whole == step_memory(config_of("train.zero_stage=0"), 4, 4).parameters
    assert whole == gradients("train.zero_stage=1") == gradients("train.zero_stage=2", "train.reduce_gradients=step")
    assert gradients("train.zero_stage=2") < whole
    assert gradients("train.zero_stage=3") == -(-whole // 4)


def test_gradients_on_the_border_of_two_shards_are_kept_whole():
    # shards of 6 elements, [0, 6) and [6, 12): the second parameter lies in both
    assert memory._own_gradients_bytes([4, 5, 3], 2) == 4 * 9
    assert memory._own_gradients_bytes([6, 6], 2) == 4 * 6
    assert memory._own_gradients_bytes([4, 5, 3], 1) == 4 * 12
    assert memory._own_gradients_bytes([99, 2], 64) == 4 * 101


def test_offloading_moves_bytes_to_the_host():
    plain = step_memory(config_of("train.zero_stage=3"), 2, 4)
    moved = step_memory(config_of("train.zero_stage=3", "train.offload_optimizer=true", "train.offload_parameters=true"), 2, 4)
    assert moved.optimizer == 0
    assert moved.host > plain.optimizer
    assert moved.total < plain.total
    # where the device is the host, nothing is saved
    both = [
        step_memory(config_of("train.zero_stage=1", f"train.offload_optimizer={flag}"), 2, 4, "cpu")
        for flag in ("true", "false")
    ]
    assert both[0].total >= both[1].total
    assert both[0].host == 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_the_largest_micro_batch_fits_and_one_more_pair_does_not(stage, num_ranks):
    config = config_of(f"train.zero_stage={stage}", "train.global_batch=4096")
    budget = step_memory(config, num_ranks, 100).total
    largest = largest_micro_batch(config, num_ranks, budget)
    assert step_memory(config, num_ranks, largest).total <= budget < step_memory(config, num_ranks, largest + 1).total
    assert largest >= 100
    assert largest_micro_batch(config, num_ranks, 2**60) == -(-4096 // num_ranks)
    assert largest_micro_batch(config, num_ranks, 1000) == 0


def test_what_the_kernels_and_deepspeed_hold_is_what_they_say():
    assert ring.MAX_RING_RANKS == memory.MAX_RING_RANKS
    assert ring.GATHERED_BYTES == memory._GATHERED_BYTES
    assert triton_launch.PARTIAL_BYTES + triton_launch.GRADIENT_BYTES == memory._TRITON_BYTES
    assert 2 * 4 * panels.PANEL_ROWS * panels.PANEL_COLUMNS == memory._PANELS_BYTES
    assert blocks.ELEMENTS_AT_A_TIME["other"] == memory._ROWS_ELEMENTS
    for stage in (1, 2, 3):
        settings = deepspeed_config(config_of(f"train.zero_stage={stage}"), 2)["zero_optimization"]
        assert not settings.get("overlap_comm", False) or stage == 3


def test_panels_are_counted_once_whatever_terms_there_are(monkeypatch):
    """SLIP has three contrastive terms, whose panels follow one another."""
    config = load_config("configs/slip.yaml")
    before = step_memory(config, 8, 512)
    monkeypatch.setattr(memory, "_TRITON_BYTES", memory._TRITON_BYTES + (1 << 30))
    after = step_memory(config, 8, 512)
    assert before.moment == after.moment == "loss"
    assert after.loss - before.loss == 1 << 30


def test_panels_on_a_gpu_copy_rows_of_features(monkeypatch):
    for name in ("_TRITON_BYTES", "_PANELS_BYTES"):
        monkeypatch.setattr(memory, name, 1 << 30)  # so that the loss takes most
    panels, triton = (
        step_memory(load_config("configs/slip.yaml", [f"loss.backend={name}"]), 8, 512) for name in ("panels", "triton")
    )
    assert panels.moment == triton.moment == "loss"
    assert panels.loss - triton.loss == 2 * 4 * 512 * 512
