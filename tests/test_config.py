"""Configuration: precedence, errors that name the way out, and every file under configs/."""

import fnmatch
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from scaleclip.config import RunConfig, SourceConfig, TextSourceConfig
from scaleclip.config_io import (
    FREE_ON_RESUME,
    differing_keys,
    json_schema,
    known_keys,
    load_config,
    parse_config,
    preset_names,
    to_yaml,
)
from scaleclip.config_rules import validate
from scaleclip.errors import ConfigError

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.stem not in ("suites", "targets"))


@pytest.fixture
def write(tmp_path):
    def write_yaml(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write_yaml


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_under_configs_is_valid(path):
    validate(load_config(path), world_size=1)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid(write, name):
    assert load_config(write("a.yaml", f"model: {name}")).model.preset == name


def test_precedence(write):
    write("grandparent.yaml", "optim: {lr: 1.0, eps: 0.5, weight_decay: 3}\ndata: {sources: {a: {shards: a.tar}}}")
    write("parent.yaml", "extends: grandparent.yaml\noptim: {lr: 2.0, eps: 0.25}")
    child = write("child.yaml", "extends: parent.yaml\noptim: {lr: 3.0}")
    config = load_config(child, ["optim.lr=1e-3"])
    assert config.optim.lr == 1e-3
    assert config.optim.eps == 0.25
    assert config.optim.weight_decay == 3
    assert config.optim.betas == RunConfig().optim.betas
    assert config.data.sources["a"].shards == ("a.tar",)


def test_a_preset_lies_below_the_rest_of_its_section(write):
    path = write("a.yaml", "model: {preset: ViT-B/32, image: {size: 96}}")
    config = load_config(path, ["model.image.config.num_hidden_layers=3"])
    assert config.model.image.size == 96
    assert config.model.image.config["num_hidden_layers"] == 3
    assert config.model.image.config["patch_size"] == 32
    assert load_config(path, ["model=ViT-B/16"]).model.image.config["patch_size"] == 16


def test_a_preset_holds_wherever_a_configuration_is_parsed(write):
    config = parse_config({"model": {"preset": "ViT-B/32", "image": {"size": 96}}})
    assert config == load_config(write("a.yaml", "model: {preset: ViT-B/32, image: {size: 96}}"))
    assert config.model.image.config["patch_size"] == 32
    assert parse_config({"model": "ViT-B/16"}).model.image.config["patch_size"] == 16
    with pytest.raises(ConfigError, match=r"model\.preset='ViT-B/33' is unknown; did you mean"):
        parse_config({"model": {"preset": "ViT-B/33"}})


@pytest.mark.parametrize("name", preset_names())
def test_a_configuration_that_was_written_out_has_its_own_values(name):
    """Whatever becomes of the preset that it names."""
    tree = parse_config({"model": {"preset": name}}).model_dump(mode="json")
    tree["model"]["image"]["config"] = tree["model"]["text"]["config"] = {}
    assert parse_config(tree).model_dump(mode="json") == tree
    # of a run that was started before there was a choice
    del tree["model"]["image"]["projection"]
    assert parse_config(tree).model.image.projection
    tree["model"]["preset"] = "gone"
    assert parse_config(tree).model.embed_dim == tree["model"]["embed_dim"]


def test_numbers_without_a_dot_are_numbers(write):
    assert load_config(write("a.yaml", "optim: {lr: 5e-4, eps: 1E-8}")).optim.lr == 5e-4


def test_the_printed_configuration_reads_back_equal(write):
    config = load_config(ROOT / "configs" / "demo.yaml", ["optim.lr=1e-3"])
    assert load_config(write("b.yaml", to_yaml(config))) == config


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"optim": {"warmup_sample": 1}}, "unknown key 'optim.warmup_sample'; did you mean 'optim.warmup_samples'?"),
        ({"trian": {}}, "unknown key 'trian'; did you mean"),
        (
            {"data": {"sources": {"cc12m": {"manfest": "x"}}}},
            "unknown key 'data.sources.cc12m.manfest'; did you mean 'data.sources.cc12m.manifest'?",
        ),
        ({"data": {"views": [{"text": ["a"]}]}}, "unknown key 'data.views.0.text'; did you mean 'data.views.0.texts'?"),
        ({"optim": {"lr": "fast"}}, "optim.lr='fast': input should be a valid number"),
        ({"train": {"zero_stage": 7}}, "train.zero_stage=7: input should be 0, 1, 2 or 3"),
        ({"optim": {"lr": -1}}, "optim.lr=-1: input should be greater than 0"),
        ({"train": 3}, "train=3: input should be a valid dictionary"),
    ],
)
def test_faults_name_key_value_and_rule(tree, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    assert message in str(caught.value)


def test_a_list_with_a_fault_inside_is_not_also_too_short():
    with pytest.raises(ConfigError) as caught:
        parse_config({"data": {"views": [{"text": ["a"]}]}})
    assert len(str(caught.value).splitlines()) == 1


def test_a_preset_in_other_letters_is_suggested(write):
    with pytest.raises(ConfigError, match="did you mean 'ViT-B/32'"):
        load_config(write("a.yaml", "model: vit-b/32"))


def test_every_fault_has_its_line():
    with pytest.raises(ConfigError) as caught:
        parse_config({"optim": {"lr": "x"}, "train": {"global_batch": 0}, "nonsense": 1})
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.global_batch=100"], "train.global_batch=100 is not a multiple of data.canonical_streams=16"),
        (["data.sources.demo.shards=[]"], "data.sources.demo.shards is empty"),
        (["optim.final_lr=1.0"], "optim.final_lr=1.0 is above the peak"),
        (["train.samples=256", "optim.warmup_samples=512"], "optim.warmup_samples=512 is more than train.samples=256"),
        (["data.crop_scale=[0.9, 0.2]"], "data.crop_scale=[0.9, 0.2]"),
        (["data.crop_scale=[0.9, 1.2]"], "a crop cannot cover more than the image"),
        (["data.crop_ratio=[0, 1]"], "data.crop_ratio=[0.0, 1.0]"),
        (["data.sources.demo.concept=null"], "loss.duplicates=positive needs data.sources.NAME.concept"),
        (["loss.kind=sigmoid"], "loss.kind=sigmoid needs model.init_logit_bias"),
        (["model.init_logit_bias=-10"], "model.init_logit_bias is set, but a softmax loss"),
        (["model.init_logit_scale=200"], "model.init_logit_scale=200.0 is above model.max_logit_scale=100.0"),
    ],
)
def test_rules_between_fields(overrides, message):
    config = load_config(ROOT / "configs" / "demo.yaml", overrides)
    before = config.model_copy(deep=True)
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size=1)
    assert message in str(caught.value)
    assert config == before, "validate never edits"


def test_a_reference_loss_on_several_ranks_is_refused():
    with pytest.raises(ConfigError, match=r"loss\.backend=reference .* cannot run on 2 ranks"):
        validate(load_config(ROOT / "configs" / "demo.yaml", ["loss.backend=reference"]), world_size=2)


def test_more_ranks_than_pairs_are_refused():
    with pytest.raises(ConfigError, match=r"train\.global_batch=128 gives 257 ranks"):
        validate(load_config(ROOT / "configs" / "demo.yaml"), world_size=257)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", "not of the form"),
        ("=3", "not of the form"),
        ("a.b=[1", "not YAML"),
        ("model=ViT-B/31", "did you mean 'ViT-B/32'"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(ROOT / "configs" / "demo.yaml", [override])
    assert message in str(caught.value)


def test_bad_files(write, tmp_path):
    for path, message in (
        (tmp_path / "none.yaml", "cannot read the configuration"),
        (write("a.yaml", "optim: [1"), "is not YAML"),
        (write("b.yaml", "- 1"), "not a mapping of sections"),
        (write("c.yaml", "extends: c.yaml"), "goes in a circle"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(path)


def test_configurations_are_frozen():
    with pytest.raises(Exception, match="frozen"):
        RunConfig().optim.lr = 1.0


def test_differing_keys_are_those_that_decide_the_training():
    old = load_config(ROOT / "configs" / "demo.yaml")
    changes = ["optim.lr=0.5", "data.workers=7", "metrics.wandb=offline", "run.folder=x"]
    new = load_config(ROOT / "configs" / "demo.yaml", changes)
    assert differing_keys(old, new) == [("optim.lr", old.optim.lr, 0.5)]
    known = [*known_keys(), *(f"data.sources.*.{field}" for field in SourceConfig.model_fields)]
    known += [f"data.text_pairs.sources.*.{field}" for field in TextSourceConfig.model_fields]
    assert all(
        any(fnmatch.fnmatchcase(key, free) or key == free or key.startswith(f"{free}.") for key in known)
        for free in FREE_ON_RESUME
    )


def test_a_tower_that_reads_its_last_token_wants_its_whole_context():
    text = {"type": "siglip_text_model", "context_length": 64}
    data = {"sources": {"a": {"shards": "x.tar"}}, "views": [{"max_tokens": 32}, {"max_tokens": 16}]}
    config = parse_config({"data": data, "model": {"text": text}, "train": {"samples": 100_000}})
    with pytest.raises(ConfigError, match=r"max_tokens=32 is below model\.text\.context_length=64.*set .*context_length=32"):
        validate(config, world_size=1)


def test_a_source_may_move_but_not_change_its_part_of_a_batch():
    old = load_config(ROOT / "configs" / "demo.yaml")
    moved = ["data.sources.demo.shards=s3://b/*.tar", "data.sources.demo.manifest=m", "data.cache.limit_gib=1"]
    assert differing_keys(old, load_config(ROOT / "configs" / "demo.yaml", moved)) == []
    heavier = load_config(ROOT / "configs" / "demo.yaml", ["data.sources.demo.weight=2"])
    assert [key for key, _, _ in differing_keys(old, heavier)] == ["data.sources.demo.weight"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "data.sources is empty"),
        ({"sources": {"a b": {"shards": "x.tar"}}}, "data.sources: 'a b' is no name"),
        (
            {"sources": {"a": {"shards": "x.tar", "weight": 1}, "b": {"shards": "y.tar"}}},
            "data.sources.a.weight is set and data.sources.b.weight is not",
        ),
        (
            {"sources": {"a": {"shards": "x.tar"}}, "views": [{"texts": ["recap"]}]},
            "data.views[0] draws from the text 'recap', which no source has",
        ),
        (
            {"sources": {"a": {"shards": "x.tar"}}, "views": [{"fallback": "recap"}]},
            "data.views[0] draws from the text 'recap', which no source has",
        ),
        (
            {"sources": {"a": {"shards": "x.tar"}}, "views": [{"texts": {"caption": 0}}]},
            "at least one weight must be above 0",
        ),
        (
            {"sources": {"a": {"shards": "x.tar"}}, "views": [{"texts": []}]},
            "at least one weight must be above 0",
        ),
        (
            {"sources": {"a": {"shards": "x.tar"}}, "views": [{"max_tokens": 99}]},
            "data.views[0].max_tokens=99 is above model.text.context_length=77",
        ),
    ],
)
def test_rules_of_sources_and_views(data, message):
    """Of a configuration that is right otherwise."""
    config = parse_config({"data": data, "train": {"samples": 100_000}})
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size=1)
    assert message in str(caught.value)


def test_every_field_says_what_it_is():
    undocumented = [
        f"{name}.{field}"
        for name, definition in json.loads(json_schema())["$defs"].items()
        for field, schema in definition["properties"].items()
        if "description" not in schema
    ]
    assert not undocumented


def test_the_command_prints_a_configuration_and_a_schema(tmp_path):
    def scaleclip(*arguments):
        command = [sys.executable, "-m", "scaleclip", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    shown = scaleclip("config", str(ROOT / "configs" / "demo.yaml"), "optim.lr=0.25")
    assert yaml.safe_load(shown.stdout)["optim"]["lr"] == 0.25
    assert json.loads(scaleclip("config", "--schema").stdout)["properties"]["optim"]
    wrong = scaleclip("config", str(ROOT / "configs" / "demo.yaml"), "optim.lrr=0.25")
    assert wrong.returncode == 2
    assert wrong.stderr == "unknown key 'optim.lrr'; did you mean 'optim.lr'?\n"
