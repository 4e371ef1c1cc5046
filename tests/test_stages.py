"""Stages of a run: what each trains, where it begins, what it may set, and the commands that know of stages."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

from scaleclip import evaluate_run
from scaleclip.checkpoint.checkpointer import Checkpointer
from scaleclip.checkpoint.shard import Fragment, Shard
from scaleclip.checkpoint.state import TrainState
from scaleclip.cli import show_config
from scaleclip.config import RunConfig
from scaleclip.config_io import differing_keys, json_schema, load_config, origin, parse_config, to_yaml
from scaleclip.config_rules import validate
from scaleclip.data.cache import ShardCache
from scaleclip.distributed import World
from scaleclip.equivalence_cli import verify_equivalence
from scaleclip.errors import ConfigError, RunError
from scaleclip.evaluation.results import Figure
from scaleclip.evaluation.suite import OpenedSuite
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.node_check import check_node
from scaleclip.plan_cli import plan
from scaleclip.schedule import learning_rate
from scaleclip.stages import stage_at, stage_before, stages_of

# Recap-CLIP's two stages (arXiv:2406.08478) and a third with another mix, all of them 1,000 times shorter
RECAP = """
data:
  sources:
    web: {shards: web.tar, texts: {caption: txt, recap: "json:re_caption"}, weight: 3}
    art: {shards: art.tar, weight: 1}
  views: [{texts: {caption: 0.8, recap: 0.2}}]
  canonical_streams: 8
model: {preset: tiny, image: {size: 112}}
optim: {betas: [0.9, 0.95]}
stages:
  - train: {samples: 2_560_000, global_batch: 32_768}
    optim: {lr: 1.024e-3, warmup_samples: 51_200}
  - train: {samples: 128_000, global_batch: 16_384}
    optim: {lr: 2.56e-5, warmup_samples: 25_600}
    model: {image: {size: 224}}
    optimizer: reset
  - train: {samples: 1e4, global_batch: 1_024}
    data: {sources: {web: null, art: {weight: 2}, long: {shards: long.tar, weight: 5}}, views: [{}]}
    model: {text: {context_length: 64, locked: true}}
"""


@pytest.fixture
def recap(tmp_path):
    """Load it with overrides."""
    path = tmp_path / "recap.yaml"
    path.write_text(RECAP)
    return lambda *overrides: load_config(path, overrides)


def staged(*stages, **run):
    """A configuration with these stages."""
    data = {"sources": {"a": {"shards": "a.tar"}}, "canonical_streams": 8}
    return parse_config({"data": data, "train": {"samples": 64, "global_batch": 8}, "stages": list(stages)} | run)


def test_a_run_without_stages_is_one():
    config = parse_config({"train": {"samples": 100, "global_batch": 8}})
    [stage] = stages_of(config)
    assert stage.config is config
    assert (stage.number, stage.first_step, stage.last_step) == (0, 0, 13)
    stages = stages_of(config)
    assert (stages[-1].last_step, sum(stage.samples for stage in stages)) == (13, 104)


def test_stages_lie_one_after_the_other(recap):
    config = recap()
    validate(config, world_size=8)
    stages = stages_of(config)
    assert [stage.number for stage in stages] == [0, 1, 2]
    assert [(stage.first_step, stage.last_step) for stage in stages] == [(0, 79), (79, 87), (87, 97)]
    assert [stage.samples for stage in stages] == [79 * 32_768, 8 * 16_384, 10 * 1_024]
    assert stages[-1].last_step == 97
    assert [stage.keeps_optimizer for stage in stages] == [True, False, True]


def test_a_stage_is_an_ordinary_run(recap):
    first, second, third = (stage.config for stage in stages_of(recap()))
    for config in (first, second, third):
        assert config.stages == ()
        assert config.optim.betas == (0.9, 0.95)
        assert config.model.image.config["patch_size"] == 8
    assert [config.model.image.size for config in (first, second, third)] == [112, 224, 112]
    assert [config.model.text.context_length for config in (first, second, third)] == [32, 32, 64]
    assert [config.model.text.locked for config in (first, second, third)] == [False, False, True]
    assert [config.train.global_batch for config in (first, second, third)] == [32_768, 16_384, 1_024]
    # one that sets nothing of a section has the run's own
    assert third.optim.lr == RunConfig().optim.lr
    # each warms up and decays over its own samples
    assert learning_rate(1, first.optim, first.train) == first.optim.lr
    assert learning_rate(7, second.optim, second.train) < 1e-5 < learning_rate(1, second.optim, second.train)


def test_a_stage_has_a_mix_of_its_own(recap):
    first, _, third = (stage.config.data for stage in stages_of(recap()))
    assert {name: source.weight for name, source in first.sources.items()} == {"web": 3, "art": 1}
    assert {name: source.weight for name, source in third.sources.items()} == {"art": 2, "long": 5}
    assert third.sources["art"].shards == ("art.tar",)
    assert first.views[0].texts == {"caption": 0.8, "recap": 0.2}
    # a list takes the place of the run's, with defaults and not the run's values in its entries
    assert third.views[0].texts == {"caption": 1.0}


def test_sources_of_texts_can_be_left_out():
    pairs = {"sources": {"pairs": {"files": "p.jsonl"}, "all": {"files": "a.jsonl"}}}
    triplets = {"sources": {"pairs": None, "triplets": {"files": "t.jsonl", "negatives": "n"}}, "num_negatives": 7}
    data = {"sources": {"a": {"shards": "a.tar"}}, "text_pairs": pairs}
    first, second = (stage.config.data for stage in stages_of(staged({}, {"data": {"text_pairs": triplets}}, data=data)))
    assert list(first.text_pairs.sources) == ["pairs", "all"]
    assert list(second.text_pairs.sources) == ["all", "triplets"]
    assert second.text_pairs.num_negatives == 7


def test_parts_and_objectives_come_and_go():
    decoder = {"model": {"caption_decoder": {"queries": 16}}, "data": {"caption": {}}}
    sigmoid = {"model": {"init_logit_bias": -10, "caption_decoder": None}, "loss": {"kind": "sigmoid"}}
    stages = [stage.config for stage in stages_of(staged({}, decoder, sigmoid))]
    assert [stage.model.caption_decoder is not None for stage in stages] == [False, True, False]
    assert [stage.loss.kind for stage in stages] == ["softmax", "softmax", "sigmoid"]
    assert stages[2].model.init_logit_bias == -10


@pytest.mark.parametrize(("step", "taking", "saved_by"), [
    (0, 0, 0), (1, 0, 0), (78, 0, 0), (79, 1, 0), (80, 1, 1), (87, 2, 1), (96, 2, 2), (97, 2, 2),
])  # fmt: skip
def test_a_border_belongs_to_the_stage_that_it_begins(recap, step, taking, saved_by):
    stages = stages_of(recap())
    assert stage_at(stages, step).number == taking
    assert stage_before(stages, step).number == saved_by


def test_every_stage_has_a_seed_of_its_own(recap):
    """The values are those that runs have been trained with."""
    seeds = [stage.config.run.seed for stage in stages_of(recap("run.seed=3"))]
    assert seeds == [3, 4998334853939504375, 5274520352739906674]
    others = [stage.config.run.seed for stage in stages_of(recap("run.seed=4"))]
    assert not set(seeds) & set(others)
    assert all(0 <= seed < 2**63 for seed in seeds + others)


@pytest.mark.parametrize(("stage", "message"), [
    ({"train": {"globl_batch": 8}}, "unknown key 'stages.1.train.globl_batch'; did you mean 'stages.1.train.global_batch'?"),
    ({"train": {"every_steps": 8}}, "unknown key 'stages.1.train.every_steps'; did you mean 'stages.1.train."),
    ({"train": {"global_batch": 0}}, "stages.1.train.global_batch=0: input should be greater than or equal to 1"),
    ({"optim": {"lr": "fast"}}, "stages.1.optim.lr='fast': input should be a valid number"),
    ({"data": {"views": [{"text": ["a"]}]}}, "'stages.1.data.views.0.text'; did you mean 'stages.1.data.views.0.texts'?"),
    ({"data": {"sources": {"a": {"manfest": "x"}}}}, "'; did you mean 'stages.1.data.sources.a.manifest'?"),
    ({"data": {"sources": {"aa": None}}},
     "stages.1.data.sources.aa=None: the run has no such source to leave out; did you mean 'a'?"),
    ({"data": {"sources": None}}, "stages.1.data.sources=None: input should be a valid"),
    ({"data": None}, "stages.1.data=None: input should be a valid dictionary"),
    ({"train": 3}, "stages.1.train=3: input should be a valid dictionary"),
    ({"optimizer": "forget"}, "stages.1.optimizer='forget': input should be 'keep' or 'reset'"),
    ({"optimiser": "keep"}, "unknown key 'stages.1.optimiser'; did you mean 'stages.1.optimizer'?; a stage has optimizer,"),
    ({"guard": {}}, "'stages.1.guard'; guard is the whole run's; a stage has optimizer, data, model, loss, optim, train"),
    ({"run": {"seed": 1}}, "unknown key 'stages.1.run'; run is the whole run's"),
    ({"checkpoint": {}}, "unknown key 'stages.1.checkpoint'"),
    ({"metrics": {}}, "unknown key 'stages.1.metrics'"),
    ({"eval": {}}, "unknown key 'stages.1.eval'"),
    ({"model": {"embed_dim": 8}}, "stages.1.model.embed_dim: a stage goes on with the weights before it and cannot set this"),
    ({"model": {"preset": "tiny"}}, "stages.1.model.preset: a stage goes on"),
    ({"model": {"image": {"type": "convnext"}}}, "stages.1.model.image.type: a stage goes on"),
    ({"model": {"image": {"config": {"patch_size": 8}}}}, "stages.1.model.image.config.patch_size: a stage goes on"),
    ({"model": {"text": {"tokenizer": "demo"}}}, "stages.1.model.text.tokenizer: a stage goes on"),
    ({"model": {"text": {"pooling": "mean"}}}, "stages.1.model.text.pooling: a stage goes on"),
    ({"model": {"image": {"pretrained": "x"}}}, "stages.1.model.image.pretrained: a stage goes on"),
    ({"model": {"init_logit_scale": 2}}, "stages.1.model.init_logit_scale: a stage goes on"),
    ({"model": {"image": {"siez": 8}}}, "unknown key 'stages.1.model.image.siez'; did you mean 'stages.1.model.image.size'?"),
    ({"model": "tiny"}, "stages.1.model='tiny': input should be a valid dictionary"),
])  # fmt: skip
def test_faults_name_stage_key_value_and_rule(stage, message):
    with pytest.raises(ConfigError) as caught:
        staged({}, stage)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_every_fault_of_every_stage_has_its_line():
    with pytest.raises(ConfigError) as caught:
        staged({"optim": {"lr": 0, "eps": 0}}, {}, {"train": {"samples": -1}})
    assert [line.partition("=")[0] for line in str(caught.value).splitlines()] == [
        "stages.0.optim.lr", "stages.0.optim.eps", "stages.2.train.samples"
    ]  # fmt: skip


@pytest.mark.parametrize("model", [
    {"image": {"size": 64, "config": {"image_size": 64}, "patch_dropout": 0.5, "locked": True, "unlocked_groups": 1}},
    {"text": {"context_length": 99, "config": {"max_position_embeddings": 99}, "locked": True, "unlocked_groups": 1}},
    {"max_logit_scale": 50, "activation_checkpointing": True, "projector": {"dim": 8}, "caption_decoder": {}},
])  # fmt: skip
def test_what_a_stage_may_set_of_the_model(model):
    [_, stage] = stages_of(staged({}, {"model": model}))
    found = stage.config.model.model_dump()

    def is_in(wanted, value):
        return value == wanted if not isinstance(wanted, dict) else all(is_in(wanted[key], value[key]) for key in wanted)

    assert is_in(model, found)


@pytest.mark.parametrize(("overrides", "message"), [
    (["stages.3.train.samples=5"], "override stages.3.train.samples: stages is a list, and '3' is none of its numbers: its "
     "entries are 0 to 2"),
    (["stages.-1.train.samples=5"], "'-1' is none of its numbers"),
    (["stages.train.samples=5"], "stages is a list, and 'train' is none of its numbers"),
    (["stages=[]", "stages.0.train.samples=5"], "it has no entries"),
    (["stages.0.data.views=[{}, {}]", "stages.0.data.views.2.min_words=2"], "stages.0.data.views is a list, and '2' is none"),
    (["data.views.1.min_words=2"], "data.views is a list, and '1' is none of its numbers: its entries are 0 to 0"),
    (["optim.weight_decay=0", "train.global_batch=64"], "override train.global_batch: every stage sets it, so that this would "
     "change nothing: name a stage, as in stages.0.train.global_batch"),
])  # fmt: skip
def test_overrides_that_reach_nothing_are_refused(recap, overrides, message):
    with pytest.raises(ConfigError) as caught:
        recap(*overrides)
    assert message in str(caught.value)


def test_overrides_reach_stages(recap):
    changes = [
        "stages.1.train.samples=32768", "stages.1.optimizer=keep", "stages.0.loss.kind=sigmoid", "stages.2.data.sources.web={}",
        "stages.2.data.views.0.min_words=2", "optim.lr=1.0", "data.views.0.texts={recap: 0.9}",
    ]  # fmt: skip
    stages = stages_of(recap(*changes))
    assert stages[1].config.train.steps == 2
    assert stages[1].keeps_optimizer
    assert [stage.config.loss.kind for stage in stages] == ["sigmoid", "softmax", "softmax"]
    assert list(stages[2].config.data.sources) == ["web", "art", "long"]
    assert stages[2].config.data.views[0].min_words == 2
    # two of three have one of their own
    assert [stage.config.optim.lr for stage in stages] == [1.024e-3, 2.56e-5, 1.0]
    assert stages[0].config.data.views[0].texts == {"caption": 0.8, "recap": 0.9}


def test_a_list_of_stages_takes_the_place_of_the_parents(tmp_path, recap):
    recap()
    (tmp_path / "child.yaml").write_text("extends: recap.yaml\nstages: [{train: {samples: 8, global_batch: 8}}]")
    config = load_config(tmp_path / "child.yaml")
    assert stages_of(config)[-1].last_step == 1
    assert not load_config(tmp_path / "child.yaml", ["stages=[]"]).stages


@pytest.mark.parametrize(("stages", "message"), [
    ([{}, {"train": {"global_batch": 100}}], "stages.1: train.global_batch=100 is not a multiple of data.canonical_streams=8"),
    ([{"train": {"samples": 0}}, {}], "stages.0: train.samples is not set"),
    ([{}, {"optim": {"warmup_samples": 65}}], "stages.1: optim.warmup_samples=65 is more than train.samples=64"),
    ([{}, {"data": {"sources": {"a": None}}}], "stages.1: data.sources is empty"),
    ([{}, {"loss": {"kind": "sigmoid"}}], "stages.1: loss.kind=sigmoid needs model.init_logit_bias"),
    ([{}, {"model": {"projector": {"dim": 8}}}, {"model": {"projector": {"dim": 16}}}],
     "stages.2.model.projector.dim=16: the stage before trains it with 8, and its weights go on as they are: give both the "
     "same, or set model.projector=null in one of them"),
    ([{"model": {"projector": {"hidden": 8}}}, {"model": {"projector": {}}}], "stages.1.model.projector.hidden=4096"),
    ([{"model": {"caption_decoder": {"queries": 8}}, "data": {"caption": {}}},
      {"model": {"caption_decoder": {}}, "data": {"caption": {}}}],
     "stages.1.model.caption_decoder.queries=128"),
    ([{"model": {"init_logit_bias": -10}, "loss": {"kind": "sigmoid"}},
      {"model": {"init_logit_bias": -5}, "loss": {"kind": "sigmoid"}}], "stages.1.model.init_logit_bias=-5.0"),
])  # fmt: skip
def test_rules_hold_in_every_stage_and_between_them(stages, message):
    config = staged(*stages)
    before = config.model_copy(deep=True)
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size=1)
    assert str(caught.value).startswith(message)
    assert config == before


def test_rules_that_stages_keep():
    train = {"samples": 64, "global_batch": 8}
    validate(staged({"train": train}, {"train": train}, train={}), 1)
    with pytest.raises(ConfigError, match=r"stages\.0: train\.global_batch=8 gives 9 ranks"):
        validate(staged({}), world_size=9)
    with pytest.raises(ConfigError, match=r"^train\.global_batch=8 gives 9 ranks"):
        validate(staged(), world_size=9)
    decoders = [
        {"model": {"caption_decoder": decoder}, "data": {"caption": None if decoder is None else {}}}
        for decoder in ({}, {"teacher_forced": True}, None, {"queries": 3})
    ]
    validate(staged(*decoders, data={"sources": {"a": {"shards": "a.tar"}}, "canonical_streams": 8}), 1)


def test_the_printed_configuration_reads_back_equal(tmp_path, recap):
    (tmp_path / "printed.yaml").write_text(to_yaml(recap()))
    assert load_config(tmp_path / "printed.yaml") == recap()
    assert parse_config(yaml.safe_load(to_yaml(recap()))) == recap()
    assert yaml.safe_load(to_yaml(recap()))["stages"][2]["data"]["sources"]["web"] is None


def test_the_schema_knows_a_stages_keys():
    schema = json.loads(json_schema())
    stage = schema["$defs"]["StageConfig"]["properties"]
    assert stage["train"]["$ref"] == "#/$defs/TrainConfig"
    assert stage["optimizer"]["enum"] == ["keep", "reset"]
    assert {"type": "null"} in schema["$defs"]["DataConfig"]["properties"]["sources"]["additionalProperties"]["anyOf"]


def test_differing_keys_are_those_that_decide_the_training(recap):
    free = [
        "stages.0.train.zero_stage=3", "stages.1.train.micro_batch=8", "stages.2.data.sources.long.shards=other.tar",
        "stages.1.data.workers=7", "train.offload_optimizer=true", "stages.0.optimizer=reset",
    ]  # fmt: skip
    assert differing_keys(recap(), recap(*free)) == []
    changes = ["stages.1.optim.lr=0.5", "stages.2.data.sources.long.weight=6", "stages.1.optimizer=keep", "run.seed=1"]
    assert differing_keys(recap(), recap(*changes)) == [
        ("run.seed", 0, 1),
        ("stages.1.optim.lr", 2.56e-5, 0.5),
        ("stages.1.optimizer", "reset", "keep"),
        ("stages.2.data.sources.long.weight", 5.0, 6.0),
    ]
    # of the run's own values those that reach a stage
    found = differing_keys(recap(), recap("optim.lr=0.5", "optim.eps=1.0"))
    assert [key for key, _, _ in found] == [
        "stages.0.optim.eps", "stages.1.optim.eps", "stages.2.optim.eps", "stages.2.optim.lr"
    ]  # fmt: skip


def test_where_a_value_is_written_makes_no_difference():
    high = {"optim": {"lr": 0.5}}
    assert differing_keys(staged({}, {}, **high), staged(high, high)) == []


def test_stages_may_be_added_at_the_end():
    plain, first, both = staged(), staged({}), staged({}, {"optim": {"lr": 0.5}})
    for old, new in ((plain, first), (plain, both), (first, both)):
        assert differing_keys(old, new) == []
    assert differing_keys(both, first) == [("stages", 2, 1)]
    assert differing_keys(both, plain) == [("stages", 2, 1)]
    assert differing_keys(plain, staged({"optim": {"lr": 0.5}}, {})) == [("stages.0.optim.lr", RunConfig().optim.lr, 0.5)]
    # but not in front of others
    assert [key for key, _, _ in differing_keys(both, staged({}, {}, {"optim": {"lr": 0.5}}))] == ["stages.1.optim.lr"]


def test_an_origin_is_that_of_each_stage():
    plain, both = staged(), staged({}, {"optim": {"lr": 0.5}, "optimizer": "reset"})
    old, new = origin(plain, ["x"]), origin(both, ["x", "y"])
    assert "stages" not in old
    assert old["data"] == "x"
    assert old["run.seed"] == 0
    assert {key: value for key, value in new.items() if key in old} == old
    assert new["stages.1.optim.lr"] == 0.5
    assert new["stages.1.optimizer"] == "reset"
    assert not any("run" in key or "micro_batch" in key for key in new.keys() - old.keys())


def invoke(command, *arguments):
    """Its output; errors are raised."""
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False).output


@pytest.fixture
def two_stages(tiny_config):
    """The tiny configuration with a stage of 64 pixels after its own."""
    tree = yaml.safe_load(Path(tiny_config).read_text())
    second = {"model": {"image": {"size": 64}}, "train": {"samples": 32, "global_batch": 16}, "data": {"canonical_streams": 4}}
    path = Path(tiny_config).with_name("stages.yaml")
    path.write_text(yaml.safe_dump(tree | {"stages": [{}, second]}))
    return path


def test_a_plan_is_one_of_each_stage(two_stages, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    output = invoke(plan, two_stages, "--gpus", 2, "--picture", tmp_path / "plan.png")
    assert (
        output.index("stage 0, from step 0")
        < output.index("stage 1, from step 12")
        < output.index("2 stages: 14 steps, 128 pairs")
    )
    assert output.count("Step and run") == 2
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["plan-0.png", "plan-1.png"]
    tree = json.loads(invoke(plan, two_stages, "--gpus", 2, "--json"))
    assert (tree["steps"], tree["samples"]) == (14, 128)
    towers = [next(each["value"] for each in stage["figures"] if each["name"] == "towers") for stage in tree["stages"]]
    assert towers[1] > 4 * towers[0]
    hours = [next(each["value"] for each in stage["figures"] if each["name"] == "devices") for stage in tree["stages"]]
    assert tree["device_hours"] == pytest.approx(sum(hours))
    assert tree["days"] == pytest.approx(sum(hours) / 24 / 2)
    with pytest.raises(RunError, match="in stage 1, h100 does not hold a micro batch under ZeRO-1"):
        invoke(plan, two_stages, "--gpus", 1, "stages.1.train={micro_batch: 1048576, global_batch: 1048576, samples: 1048576}")
    with pytest.raises(ConfigError, match=r"stages\.0: train\.global_batch=8 gives 9 ranks"):
        invoke(plan, two_stages, "--gpus", 9)


def test_equivalence_is_checked_of_a_stage(two_stages, monkeypatch):
    seen = []

    class Verifier:
        def __init__(self, config, steps):
            seen.append(config)

        def __call__(self, layouts):
            return ()

    monkeypatch.setattr("scaleclip.equivalence.verify.Verifier", Verifier)
    invoke(verify_equivalence, two_stages)
    invoke(verify_equivalence, two_stages, "--run-stage", 1)
    assert [(config.train.global_batch, config.train.samples) for config in seen] == [(8, 96), (16, 32)]
    with pytest.raises(ConfigError, match="--run-stage=2: the run's stages are 0 to 1"):
        invoke(verify_equivalence, two_stages, "--run-stage", 2)


def test_deepspeeds_configuration_is_one_of_each_stage(two_stages):
    first, second = json.loads(invoke(show_config, two_stages, "--deepspeed"))
    assert first["train_micro_batch_size_per_gpu"] == 8
    assert second["train_micro_batch_size_per_gpu"] == 16
    single = json.loads(invoke(show_config, two_stages, "stages=[]", "--deepspeed"))
    assert single["train_micro_batch_size_per_gpu"] == 8
    with pytest.raises(ConfigError, match=r"train\.deepspeed\.optimizer='x' is decided by optim"):
        invoke(show_config, two_stages, "stages.1.train.deepspeed={optimizer: x}")


def test_every_stages_data_and_the_largest_checkpoint_are_checked(two_stages, shards, monkeypatch):
    added = "stages.1.data.sources.more.shards"
    assert list(check_node(load_config(two_stages), 2, 2, 60.0)) == []
    (shards / "bad_stats.json").write_text('{"successes": 4}')
    (shards / "bad.tar").write_bytes(b"no tar")
    [fault] = check_node(load_config(two_stages, [f"{added}={shards}/bad.tar"]), 2, 2, 60.0)
    assert fault.message.startswith("data.sources.more: ")
    monkeypatch.setattr(
        "scaleclip.node_check.count_memory", lambda model, *_: SimpleNamespace(learning=[model.image.size * 2**30], frozen=[0])
    )
    for own, second in ((32, 64), (64, 32)):
        config = load_config(two_stages, [f"model.image.size={own}", f"stages.1.model.image.size={second}"])
        # weights and two moments of fp32 for each of 64 Gi parameters
        assert "(768.0 GiB at" in list(check_node(config, 2, 2, 60.0))[-1].message


@pytest.mark.parametrize(("step", "size"), [(4, 32), (12, 32), (13, 64), (14, 64)])
def test_a_checkpoint_is_evaluated_as_the_stage_that_saved_it(two_stages, monkeypatch, step, size):
    config = load_config(two_stages)
    folder = Path(config.run.folder)
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    model = DualEncoder(config.model.model_copy(update={"image": config.model.image.model_copy(update={"size": size})}))
    fragments = [
        Fragment(name, tuple(weight.shape), 0, {"weight": weight.detach().flatten()}, replicated=True)
        for name, weight in model.named_parameters()
    ]
    monkeypatch.setattr("scaleclip.checkpoint.checkpointer.gather_objects", lambda found: [found])
    monkeypatch.setattr("scaleclip.checkpoint.checkpointer.any_rank", bool)
    world = World(0, 1, 0, torch.device("cpu"))
    checkpointer = Checkpointer(folder, world, config.checkpoint, {}).attach(lambda: Shard(fragments, {}))
    checkpointer.save(TrainState(step=step))
    checkpointer.finish()
    figures = lambda encoder, _: [Figure("", "", encoder.size, 0.0)]  # noqa: E731
    measured = SimpleNamespace(name="size", num_items=1, place="", definition="", run=figures)
    monkeypatch.setattr(evaluate_run, "open_evaluations", lambda *_, **__: OpenedSuite([measured], [], []))
    session = evaluate_run.Session(config.eval, ShardCache(config.data.cache))
    evaluated = session.evaluate(evaluate_run.subject_of(str(folder)))
    assert (evaluated.subject.step, [figure.value for figure in evaluated.figures]) == (step, [size])
