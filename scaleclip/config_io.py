"""Configurations from YAML files with an `extends:` parent, presets and dotted overrides, and back.

Precedence, lowest first: field defaults, the `extends:` chain, the file, dotted overrides from the command line.
A model preset (`model: ViT-B/32`) lies below every other value of the `model` section. A stage's sections lie above all of
these; an override reaches them by the stage's number (`stages.0.train.samples=1e6`).
"""

import difflib
import fnmatch
import importlib.resources
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from scaleclip.config import ModelConfig, RunConfig, Section, SourceConfig, StageConfig, TextSourceConfig, ViewConfig
from scaleclip.config_tree import deep_update, flatten, has, override, with_numbers
from scaleclip.errors import ConfigError

S = TypeVar("S", bound=Section)

# What may differ between the two halves of an interrupted run: none of these changes an update but for rounding.
# (dropout's numbers depend on train.micro_batch)
FREE_ON_RESUME = (
    "run.folder",
    # the manifest's fingerprint says whether these are the same shards in another place
    "data.sources.*.shards",
    "data.sources.*.manifest",
    "data.sources.*.sidecars",
    "data.text_pairs.sources.*.files",
    "data.cache",
    "data.workers",
    "data.prefetch_batches",
    "data.max_bad_fraction",
    # a checkpoint has these weights
    "model.pretrained",
    "model.*.pretrained",
    "loss.schedule",
    "loss.backend",
    "train.micro_batch",
    "train.zero_stage",
    "train.reduce_gradients",
    "train.offload_optimizer",
    "train.offload_parameters",
    "train.compile",
    "train.deterministic",
    "train.deepspeed",
    "checkpoint",
    "guard",
    "metrics",
    "eval",
)

# What a stage may set of the model: the checkpoint before it has the weights, and only positions are resized.
STAGE_MODEL_KEYS = (
    "image.size",
    "image.config.image_size",
    "image.patch_dropout",
    "image.locked",
    "image.unlocked_groups",
    "text.context_length",
    "text.config.max_position_embeddings",
    "text.locked",
    "text.unlocked_groups",
    "max_logit_scale",
    "init_logit_bias",
    "projector",
    "caption_decoder",
    "activation_checkpointing",
)
_QUICK_GELU = "-quickgelu"
# of `model`: what every configuration that was written out has, and no preset and no file by hand has all of
_RESOLVED = ("embed_dim", "image.type", "image.patch_dropout", "image.config", "text.type", "text.config", "init_logit_scale")
_STAGE_SECTIONS = tuple(name for name in StageConfig.model_fields if name in RunConfig.model_fields)
# of a stage: mappings in which null leaves an entry of the run's out
_NAMED_SOURCES = (("data", "sources"), ("data", "text_pairs", "sources"))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `path`, its parents and its preset, lay `overrides` ("optim.lr=1e-3") over them and check the result.

    Raises:
        ConfigError: an unknown key, a wrong type or value, a missing file or a circular `extends:`, or an override that every
            stage hides.
    """
    tree = _read_yaml(Path(path), ())
    tree.setdefault("stages", [])  # so that an override of one that is not there is told so
    parsed = [parse_override(text) for text in overrides]
    for key, value in parsed:
        # `model=NAME` is a preset's name
        is_preset = key == "model" and isinstance(value, str)
        override(tree, ["model", "preset"] if is_preset else key.split("."), value, key)
    _check_reaches_a_stage(tree, [key for key, _ in parsed])
    return parse_config(tree)


def parse_config(tree: Mapping[str, Any]) -> RunConfig:
    """A nested mapping as a checked configuration, its `model` laid over the preset that it names.

    What `to_yaml` wrote names a preset too, and stays as it is: a run goes on with its own values, whatever a preset has by
    then.

    Raises:
        ConfigError: an unknown preset, or a fault of any key; every one on a line of its own.
    """
    config = parse_section(RunConfig, _with_preset(tree))
    faults = []
    for number in range(len(config.stages)):
        try:
            stage_config(config, number)
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError("\n".join(faults))
    return config


def stage_config(config: RunConfig, number: int) -> RunConfig:
    """The run's configuration, itself without stages, with the sections of stage `number` laid over its own.

    Raises:
        ConfigError: the stage sets what is unknown, wrong, or decided by the weights that it goes on with; a fault a line, by
            keys as `stages.1.train.samples`.
    """
    prefix, stage = f"stages.{number}.", config.stages[number].model_dump(mode="json", include=set(_STAGE_SECTIONS))
    tree = config.model_dump(mode="json", exclude={"stages"})
    absent = [fault for path in _NAMED_SOURCES for fault in _drop_sources(tree, stage, path, prefix)]
    if absent:
        raise ConfigError("\n".join(absent))
    laid = parse_section(RunConfig, deep_update(tree, stage), prefix)
    fixed = [key for key in flatten(stage["model"]) if not _is_within(key, STAGE_MODEL_KEYS)]
    if fixed:
        raise ConfigError(
            "\n".join(
                f"{prefix}model.{key}: a stage goes on with the weights before it and cannot set this: set model.{key} for the "
                f"whole run; a stage's model keys: {', '.join(STAGE_MODEL_KEYS)}"
                for key in fixed
            )
        )
    return laid


def parse_section(section: type[S], tree: Mapping[str, Any], prefix: str = "") -> S:
    """A mapping as a checked `section`; raises ConfigError with every fault on a line of its own, `prefix` before its key."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        faults = error.errors()
        # a list whose entries are at fault also counts as too short
        faults = [each for each in faults if each["type"] != "too_short" or not _has_fault_inside(each, faults)]
        raise ConfigError("\n".join(_explain(fault, section, prefix) for fault in faults)) from None


def _has_fault_inside(fault: Any, faults: Sequence[Any]) -> bool:
    return any(other["loc"][: len(fault["loc"])] == fault["loc"] for other in faults if other is not fault)


def parse_override(text: str) -> tuple[str, Any]:
    """`"optim.lr=1e-3"` as `("optim.lr", 0.001)`; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r} is not of the form dotted.key=value, for example optim.lr=1e-3")
    try:
        return key, with_numbers(yaml.safe_load(value))
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not YAML: {error}") from None


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def json_schema() -> str:
    """JSON schema of a configuration file, for editors."""
    schema = RunConfig.model_json_schema()
    schema["properties"]["extends"] = {"type": "string", "description": "Parent file, relative to this one."}
    # load_config also takes a preset's bare name
    name = {"type": "string", "enum": preset_names()}
    schema["properties"]["model"] = {"anyOf": [{"$ref": "#/$defs/ModelConfig"}, name]}
    for section in _STAGE_SECTIONS:
        whole = RunConfig.model_fields[section].annotation
        schema["$defs"]["StageConfig"]["properties"][section]["$ref"] = f"#/$defs/{typing.cast(type, whole).__name__}"
    for holder in ("DataConfig", "TextPairsConfig"):
        # a stage leaves a source out by null
        sources = schema["$defs"][holder]["properties"]["sources"]
        sources["additionalProperties"] = {"anyOf": [sources["additionalProperties"], {"type": "null"}]}
    return json.dumps(schema, indent=2)


def known_keys() -> list[str]:
    """Every dotted key that a configuration may set."""
    return [key for key, _ in _fields(RunConfig, "")]


def origin(config: RunConfig, data_fingerprints: Sequence[str]) -> dict[str, Any]:
    """What decides a run's updates, by dotted key, with what its data is: a checkpoint of another origin is another run's.

    The first stage's keys are those of a run without stages, which others may have been added to.
    """
    first, *later = _decisive(config)
    flat = {f"stages.{number}.{key}": value for number, stage in enumerate(later, 1) for key, value in stage.items()}
    data = {f"stages.{number}.data": fingerprint for number, fingerprint in enumerate(data_fingerprints)}
    return first | flat | {"data": data.pop("stages.0.data")} | data


def differing_keys(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) wherever two configurations differ in what decides the training itself.

    Stages are compared as they are trained, wherever a value was written. Further stages at the end of `new` are no difference:
    the updates before them stay the same; with fewer than in `old`, `stages` is (number there, number now).
    """
    lefts, rights = _decisive(old), _decisive(new)
    found: list[tuple[str, Any, Any]] = [("stages", len(lefts), len(rights))] if len(lefts) > len(rights) else []
    for number, (left, right) in enumerate(zip(lefts, rights, strict=False)):
        prefix = f"stages.{number}." if old.stages or new.stages else ""
        for key in sorted(left.keys() | right.keys()):
            if left.get(key) != right.get(key):
                found.append((key if key.startswith("run.") else prefix + key, left.get(key), right.get(key)))
    return found


def _decisive(config: RunConfig) -> list[dict[str, Any]]:
    """What decides the updates of each stage, by dotted key; a run without stages is one."""
    if not config.stages:
        return [_without_free(config.model_dump(mode="json", exclude={"stages"}))]
    found = []
    for number, stage in enumerate(config.stages):
        laid = stage_config(config, number).model_dump(mode="json", exclude={"stages"} | ({"run"} if number else set()))
        found.append(_without_free(laid | ({"optimizer": stage.optimizer} if number else {})))
    return found


def _without_free(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flatten(tree).items() if not _is_free(key)}


def _presets() -> dict[str, dict[str, Any]]:
    text = importlib.resources.files("scaleclip").joinpath("models/presets.yaml").read_text()
    return typing.cast(dict[str, dict[str, Any]], yaml.safe_load(text))


def preset_names() -> list[str]:
    """Names that `model: NAME` takes."""
    return list(_presets())


def named_architecture(name: str) -> ModelConfig:
    """The model of a preset (`ViT-B/32`, or as open_clip writes it, `ViT-B-32`); with `-quickgelu` behind it, OpenAI's GELU.

    Raises:
        ConfigError: there is no such preset.
    """
    plain = name.removesuffix(_QUICK_GELU)
    by_name = {preset.replace("/", "-"): preset for preset in preset_names()}
    try:
        tree = _preset(by_name.get(plain, plain))
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.preset=", "--architecture=", 1)) from None
    if plain != name:
        act = {"config": {"hidden_act": "quick_gelu"}}
        tree = deep_update(tree, {"image": act, "text": act})
    return parse_section(ModelConfig, tree)


def _preset(name: str) -> dict[str, Any]:
    presets = _presets()
    if name not in presets:
        raise ConfigError(f"model.preset={name!r} is unknown{_hint(name, presets)}; presets: {', '.join(presets)}")
    return dict(presets[name])


def _with_preset(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    model = tree.get("model")
    model = {"preset": model} if isinstance(model, str) else model
    if not isinstance(model, Mapping) or model.get("preset") is None or all(has(model, key.split(".")) for key in _RESOLVED):
        return tree
    return {**tree, "model": deep_update(_preset(str(model["preset"])), model)}


def _read_yaml(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in children:
        raise ConfigError("extends: goes in a circle: " + " -> ".join(map(str, (*children, path))))
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree or {}, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}, not a mapping of sections")
    tree = typing.cast(dict[str, Any], with_numbers(tree or {}))
    _expand_preset_name(tree)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    return deep_update(_read_yaml(path.parent / str(parent), (*children, path)), tree)


def _expand_preset_name(tree: dict[str, Any]) -> None:
    if isinstance(tree.get("model"), str):
        tree["model"] = {"preset": tree["model"]}


def _check_reaches_a_stage(tree: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Raise ConfigError for an override that changes nothing, since every stage sets that key itself."""
    stages = tree["stages"]
    for key in keys:
        if isinstance(stages, list) and stages and all(has(stage, key.split(".")) for stage in stages):
            raise ConfigError(
                f"override {key}: every stage sets it, so that this would change nothing: name a stage, as in stages.0.{key}"
            )


def _drop_sources(tree: dict[str, Any], stage: dict[str, Any], path: Sequence[str], prefix: str) -> list[str]:
    """Take the sources at `path` that are null in `stage` out of both trees; a fault for each that the run does not have."""
    for name in path:
        tree, stage = tree[name], stage.get(name, {})
        if not isinstance(stage, dict):
            return []  # parsing says so
    faults = []
    for name in [name for name, source in stage.items() if source is None]:
        del stage[name]
        if tree.pop(name, None) is None:
            key = f"{prefix}{'.'.join(path)}.{name}"
            faults.append(f"{key}=None: the run has no such source to leave out{_hint(name, tree)}")
    return faults


def _is_free(key: str) -> bool:
    return _is_within(key, FREE_ON_RESUME)


def _is_within(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, each) or fnmatch.fnmatchcase(key, f"{each}.*") for each in patterns)


def _fields(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        if isinstance(field.default, BaseModel):
            yield from _fields(type(field.default), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _explain(fault: Any, whole: type[Section], prefix: str) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        section, _, name = key.rpartition(".")
        # sources and views are called as the user likes
        named: dict[str, type[Section]] = {"data.sources": SourceConfig, "data.views": ViewConfig, "stages": StageConfig}
        named["data.text_pairs.sources"] = TextSourceConfig
        inside = named.get(section.rpartition(".")[0])
        if inside is StageConfig:
            hint = _hint(name, StageConfig.model_fields, f"{section}.")
            whole_run = f"; {name} is the whole run's" if name in RunConfig.model_fields else ""
            return f"unknown key {key!r}{whole_run or hint}; a stage has {_names(StageConfig)}"
        top = [*(name for name, _ in _fields(whole, "")), *whole.model_fields]
        keys = [f"{section}.{field}" for field in inside.model_fields] if inside else top
        if prefix and whole is RunConfig:
            keys = [each for each in keys if each.partition(".")[0] in _STAGE_SECTIONS]
        every = "scaleclip config --schema lists every key" if whole is RunConfig else f"keys: {_names(whole)}"
        hint = _hint(key, keys, prefix) or f"; {every}"
        return f"unknown key {prefix + key!r}{hint}"
    return f"{prefix}{key}={fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _names(section: type[Section]) -> str:
    return ", ".join(section.model_fields)


def _hint(name: str, names: Any, prefix: str = "") -> str:
    by_lower = {str(each).lower(): each for each in names}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1)
    return f"; did you mean {prefix + str(by_lower[close[0]])!r}?" if close else ""
