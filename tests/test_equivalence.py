"""A run takes the same steps however it is laid out: every layout against one process with the whole batch."""

import itertools

import pytest
import torch
import typer
from typer.testing import CliRunner

from equivalence_rank_jobs import exactly_accumulated, fail_on_rank_one, wait
from scaleclip.config import ImageTowerConfig, RunConfig
from scaleclip.config_io import load_config
from scaleclip.equivalence import verify
from scaleclip.equivalence.layouts import SCHEDULES, STAGES, Layout, grid, layout_steps, pairwise
from scaleclip.equivalence.record import Record, Traffic, differences, furthest
from scaleclip.equivalence.shrink import shrink
from scaleclip.equivalence.verify import Verdict, Verifier
from scaleclip.equivalence_cli import verify_equivalence
from scaleclip.errors import ConfigError, RunError
from scaleclip.local_ranks import run_ranks
from scaleclip.models.dual_encoder import DualEncoder

DROPOUT = ("model.image.config.attention_dropout=0.3", "model.text.config.attention_dropout=0.3")
PATCH_DROPOUT = ("model.image.patch_dropout=0.5",)
CHECKPOINTING = ("model.activation_checkpointing=true",)
TWO_VIEWS = ("data.views=[{}, {}]",)
SIGMOID = ("loss.kind=sigmoid", "model.init_logit_bias=-10", "loss.duplicates=positive")
RATES = ("optim.text.layer_decay=0.5", "optim.image.lr_scale=0.1", "optim.clip_norm=0.5")
LOCKED = ("model.image.locked=true", "model.image.unlocked_groups=1")
OFFLOAD = ("train.offload_optimizer=true",)
REDUCE_ONCE = ("train.reduce_gradients=step",)

SLIP = ("model.projector={}", "loss.simclr_weight=0.7")
CAPTIONS = ("model.caption_decoder={}", "data.caption={}")
TEACHER_FORCED = ("model.caption_decoder={teacher_forced: true}", "data.caption={}")
TEXT_PAIRS = ("data.text_pairs.sources.any.files=any.jsonl", "loss.weights=[1,1]")
TRIPLETS = (*TEXT_PAIRS, "data.text_pairs.num_negatives=3", "loss.text_weight=0.5")
MEAN_OVER_M = (*TWO_VIEWS, "loss.weights=[1,0.5]", "loss.duplicates=negative")
OBJECTIVES = {
    "slip": SLIP,
    "clips": (*CAPTIONS, *TWO_VIEWS),
    "clips, teacher forced": TEACHER_FORCED,
    "text pairs": TEXT_PAIRS,
    "triplets": TRIPLETS,
    "laclip-mt": MEAN_OVER_M,
    "all at once": (*SLIP, *TEACHER_FORCED, *TRIPLETS, *TWO_VIEWS),
}

RANKS, MICRO_BATCHES = (1, 2, 3, 4), (1, 2, 8)
# 23 pairs; every two of ranks, micro batch, stage and schedule meet
CASES = [
    (Layout(1, 1, 0, "ring"), ()),
    (Layout(1, 8, 0, "ring"), DROPOUT),
    (Layout(2, 1, 0, "ring"), (*DROPOUT, *CHECKPOINTING)),
    (Layout(3, 2, 0, "gather"), (*SIGMOID, *TWO_VIEWS)),
    (Layout(4, 2, 0, "ring"), LOCKED),
    (Layout(1, 2, 1, "ring"), PATCH_DROPOUT),
    (Layout(2, 1, 1, "gather"), RATES),
    (Layout(3, 8, 1, "ring"), ("model=ConvNeXt-demo",)),
    (Layout(4, 1, 1, "ring"), (*OFFLOAD, *SIGMOID)),
    (Layout(1, 1, 2, "ring"), SIGMOID),
    (Layout(2, 2, 2, "ring"), OFFLOAD),
    (Layout(3, 1, 2, "ring"), (*REDUCE_ONCE, *CHECKPOINTING)),
    (Layout(4, 8, 2, "gather"), (*PATCH_DROPOUT, "loss.duplicates=negative")),
    (Layout(1, 2, 3, "ring"), RATES),
    (Layout(2, 8, 3, "gather"), (*REDUCE_ONCE, *TWO_VIEWS)),
    (Layout(3, 1, 3, "ring"), (*OFFLOAD, "train.offload_parameters=true", *LOCKED)),
    (Layout(4, 1, 3, "ring"), (*DROPOUT, *CHECKPOINTING)),
]


def words(part: object) -> str:
    return "-".join(map(str, part))


@pytest.fixture(scope="module")
def shrunk(tiny_config_path):
    """The tiny configuration with some settings, shrunk."""
    return lambda *overrides: shrink(load_config(tiny_config_path, ["train.global_batch=128", *overrides])).config


@pytest.mark.parametrize(("layout", "overrides"), CASES, ids=words)
def test_a_layout_takes_the_steps_of_one_process(shrunk, layout, overrides):
    config = shrunk(*overrides)
    (verdict,) = Verifier(config, 2)([layout])
    print(verdict)
    assert verdict.holds
    check_traffic(verdict, config)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(Layout(1, 5, 1, "ring"), marks=pytest.mark.slow), Layout(2, 12, 0, "gather"), Layout(4, 3, 3, "ring")],
    ids=words,
)
def test_all_terms_together_are_those_of_one_process(shrunk, layout):
    check_objective(shrunk(*OBJECTIVES["all at once"]), layout)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        Layout(1, 23, 0, "ring"),
        Layout(2, 12, 1, "ring"),
        Layout(2, 5, 2, "gather"),
        Layout(4, 6, 1, "ring"),
        Layout(4, 2, 3, "ring"),
    ],
    ids=words,
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_is_that_of_one_process(shrunk, objective, layout):
    check_objective(shrunk(*OBJECTIVES[objective]), layout)


def check_objective(config: RunConfig, layout: Layout) -> None:
    (verdict,) = Verifier(config, 2)([layout])
    print(verdict)
    assert verdict.holds


def check_traffic(verdict: Verdict, config: RunConfig) -> None:
    """A rank's bytes in a step: gradients once, or at stages 2 and 3 once a chunk; parameters as the stage shards them."""
    world_size, micro_batch, stage, _ = verdict.layout
    share = -(-config.train.global_batch // world_size)
    num_chunks = -(-share // micro_batch)
    repeats = num_chunks if stage >= 2 and config.train.reduce_gradients == "chunk" else 1
    # stage 3 fills up every parameter to a multiple of the ranks
    assert verdict.traffic.reduced_bytes == pytest.approx(repeats * verdict.gradient_bytes, rel=0.01)
    shards = verdict.traffic.gathered_bytes * world_size / verdict.gradient_bytes
    if stage == 0 or world_size == 1:
        assert shards == 0
    elif stage < 3:
        assert shards == pytest.approx(1, rel=0.01), "the updated shard, once"
    else:
        passes = 1 if num_chunks == 1 else 2
        assert passes * num_chunks <= shards, "every forward pass gathers"


def test_every_two_values_meet_in_a_case():
    everything = grid(RANKS, MICRO_BATCHES, STAGES, SCHEDULES)
    assert len(everything) == 4 * 3 * (1 + 3 * 2)
    meet, wanted = (
        {pair for layout in layouts for pair in itertools.combinations(enumerate(layout), 2)}
        for layouts in ([layout for layout, _ in CASES], everything)
    )
    assert meet == wanted
    assert len(pairwise(everything)) == len(CASES)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", STAGES)
def test_every_layout_takes_the_steps_of_one_process(shrunk, stage):
    config = shrunk()
    for verdict in Verifier(config, 3)(grid(RANKS, MICRO_BATCHES, [stage], SCHEDULES)):
        print(verdict)
        assert verdict.holds
        check_traffic(verdict, config)


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (2, 3))])
def test_bf16_gradients_of_64_chunks_are_added_up_in_fp32(shrunk, stage):
    """Against the same bf16 passes added up in fp64; adding up in bf16 would be off by several 1e-3."""
    small = shrunk()
    layout = Layout(2, 1, stage, "ring")
    train = small.train.model_copy(update={"global_batch": 128, "precision": "bf16"})
    config = layout.applied(small.model_copy(update={"train": train}))
    (truth,) = run_ranks(exactly_accumulated, 1, config, layout.world_size, layout.micro_batch)
    record = run_ranks(layout_steps, layout.world_size, config, 1)[0]
    largest = max(float(gradient.abs().max()) for gradient in truth.values())
    error = max(float((record.gradients[0][each] - truth[each]).abs().max()) for each in truth) / largest
    assert error <= 2e-6


def a_record(**changes: object) -> Record:
    gradients = {"large": torch.tensor([2.0, 1e-6]), "rounding": torch.tensor([2e-9])}
    parameters = {"large": torch.tensor([1.0, 1.0]), "rounding": torch.tensor([0.0])}
    return Record([3.0, 2.0], [gradients, gradients], parameters, [])._replace(**changes)


def test_differences_weigh_a_parameter_by_its_gradient():
    moved = {"large": torch.tensor([1.0, 1.0]), "rounding": torch.tensor([2e-3])}
    found = differences(a_record(parameters=moved), a_record(), lr=1e-3)
    assert found.parameters == pytest.approx(2 * 1e-9)
    moved = {"large": torch.tensor([1.0 + 2e-7, 1.0]), "rounding": torch.tensor([0.0])}
    assert differences(a_record(parameters=moved), a_record(), lr=1e-3).parameters == 0, "two steps' rounding"
    moved = {"large": torch.tensor([1.0 + 1e-3, 1.0]), "rounding": torch.tensor([0.0])}
    assert differences(a_record(parameters=moved), a_record(), lr=1e-3).parameters == pytest.approx(1, rel=1e-3)


def test_differences_of_gradients_are_relative_to_the_largest():
    off = {"large": torch.tensor([2.0, 1e-6]), "rounding": torch.tensor([0.02])}
    found = differences(a_record(gradients=[a_record().gradients[0], off]), a_record(), lr=1e-3)
    assert found.gradients == pytest.approx([0, 0.01])
    assert found.worst_parameter == "rounding"
    assert found.loss == found.parameters == 0


def test_nan_is_a_difference():
    broken = {"large": torch.tensor([2.0, torch.nan]), "rounding": torch.tensor([2e-9])}
    bad = differences(a_record(gradients=[broken, broken], losses=[3.0, torch.nan]), a_record(), lr=1e-3)
    good = differences(a_record(), a_record(), lr=1e-3)
    for each in (bad, furthest([good, bad]), furthest([bad, good])):
        assert each.worst_parameter == "large"
        assert not Verdict(Layout(1, 1, 0, "ring"), each, Traffic(0, 0), 0, 0.0).holds
    assert Verdict(Layout(1, 1, 0, "ring"), good, Traffic(0, 0), 0, 0.0).holds


def test_shrinking_keeps_what_decides_how_a_step_is_computed(tiny_config_path):
    overrides = ["model=ViT-L/14", "model.image.type=siglip_vision_model", "model.image.pooling=mean", "train.zero_stage=3",
                 "model.image.config.attention_dropout=0.1", "model.text.locked=true", "model.text.unlocked_groups=9",
                 "train.precision=bf16", "loss.duplicates=positive", *PATCH_DROPOUT, *TWO_VIEWS]  # fmt: skip
    whole = load_config(tiny_config_path, overrides)
    small, changes = shrink(whole)
    assert small.model.image.type == "siglip_vision_model"
    assert (small.model.image.pooling, small.model.image.patch_dropout) == ("mean", 0.5)
    assert small.model.image.config["attention_dropout"] == 0.1
    assert small.model.text.locked
    assert small.model.text.unlocked_groups < small.model.text.config["num_hidden_layers"] + 2
    assert (small.loss.duplicates, small.train.precision, len(small.data.views)) == ("positive", "fp32", 2)
    assert small.optim == whole.optim
    assert small.model.text.config["eos_token_id"] != small.model.text.config["bos_token_id"]
    assert small.model.text.config["eos_token_id"] < small.model.text.config["vocab_size"]
    assert "model.image.config.hidden_size: 1024 -> 32" in changes
    assert "train.precision: bf16 -> fp32" in changes


@pytest.mark.parametrize("name", ["SigLIP-B/16", "SigLIP-SO400M/14"])
def test_shrinking_keeps_a_tower_without_a_projection(tiny_config_path, name):
    small = shrink(load_config(tiny_config_path, [f"model={name}", "model.text.context_length=16"])).config.model
    assert (small.image.projection, small.embed_dim, small.image.config["hidden_size"]) == (False, 32, 32)
    assert DualEncoder(small).image.width == 32


def test_towers_of_other_kinds(shrunk):
    """BERT drops out of its own accord; Swin has sizes that are not known here and stays as it is."""
    config = shrunk("model.text.type=bert", "model.text.pooling=mean")
    swin = {"embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2], "patch_size": 4, "window_size": 2}
    image = ImageTowerConfig(type="swin", size=16, config=swin)
    small, changes = shrink(config.model_copy(update={"model": config.model.model_copy(update={"image": image})}))
    assert (small.model.image, changes) == (image, [])
    (verdict,) = Verifier(small, 1)([Layout(2, 8, 2, "ring")])
    assert verdict.holds


LOCKED_RESNET = ImageTowerConfig(
    type="resnet",
    size=32,
    locked=True,
    config={"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(2, 5, 3, "ring"), Layout(2, 5, 1, "ring")], ids=words)
@pytest.mark.parametrize("model", ["Recap-B/16", "Jina-B/16", "batch norm"])
def test_towers_of_the_papers(tiny_config_path, model, layout):
    """Fixed tables, timm's buffers and the statistics of a locked tower are the same on all ranks."""
    # AdamW's first step turns the rounding of the smallest gradients into whole steps: short ones, of EVA's small weights
    config = load_config(tiny_config_path, [f"model={'tiny' if model == 'batch norm' else model}", "optim.lr=1e-4"])
    if model == "batch norm":
        config = config.model_copy(update={"model": config.model.model_copy(update={"image": LOCKED_RESNET})})
    small = shrink(config).config
    (verdict,) = Verifier(small, 2)([layout])
    print(verdict)
    assert verdict.holds


def test_timms_transformers_are_shrunk_too(tiny_config_path):
    small, changes = shrink(load_config(tiny_config_path, ["model=Jina-B/16", "model.image.config.model_args.init_values=0.1"]))
    assert small.model.image.config["model_args"] == {
        "depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 64, "init_values": 0.1,
    }  # fmt: skip
    assert "model.image.size: 224 -> 64" in changes


@pytest.fixture
def command(tiny_config_path):
    """Run the command on the tiny configuration."""
    app = typer.Typer()
    app.command()(verify_equivalence)
    return lambda *arguments: CliRunner().invoke(app, [tiny_config_path, *arguments])


def test_the_command_prints_a_row_a_layout(command):
    result = command("--ranks", "1,2", "--micro-batches", "8", "--stages", "0", "--schedules", "gather", "--steps", "1")
    assert result.exit_code == 0, result.output
    assert "gather" in result.output


def test_the_command_fails_beyond_the_limit_and_names_the_parameter(command, monkeypatch):
    monkeypatch.setattr(verify, "LIMIT", 0.0)
    result = command("--ranks", "1", "--micro-batches", "1", "--stages", "0", "--steps", "1")
    assert isinstance(result.exception, RunError)
    assert "1 of 1 layouts differ" in str(result.exception)
    assert ".weight (1)" in str(result.exception)


@pytest.mark.parametrize(("option", "value", "way_out"), [
    ("--ranks", "1,two", "numbers above 0"),
    ("--ranks", "2,9", "has 8 pairs"),
    ("--micro-batches", "0", "numbers above 0"),
    ("--stages", "1,4", "choose among 0, 1, 2, 3"),
    ("--schedules", "star", "choose among ring, gather"),
])  # fmt: skip
def test_a_wrong_option_says_what_is_right(command, option, value, way_out):
    result = command(option, value)
    assert isinstance(result.exception, ConfigError)
    assert value in str(result.exception)
    assert way_out in str(result.exception)


def test_a_configuration_error_of_a_rank_reaches_the_user(shrunk):
    with pytest.raises(ConfigError, match=r"optim\.clip_norm"):
        next(Verifier(shrunk("train.deepspeed.gradient_clipping=1"), 1)([Layout(2, 8, 1, "ring")]))


def test_a_rank_that_fails_is_named():
    with pytest.raises(RunError, match=r"failed on ranks \[.*1.*\] of 2"):
        run_ranks(fail_on_rank_one, 2)


def test_ranks_that_hang_end():
    with pytest.raises(RunError, match="took more than 1 s"):
        run_ranks(wait, 2, timeout_s=1)
