"""Configurations from YAML files with an `extends:` parent, presets and dotted overrides, and back.

Precedence, lowest first: field defaults, the `extends:` chain, the file, dotted overrides from the command line.
A model preset (`model: ViT-B/32`) lies below every other value of the `model` section.
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

from scaleclip.config import RunConfig, Section, SourceConfig, ViewConfig
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
    "data.cache",
    "data.workers",
    "data.prefetch_batches",
    "data.max_bad_fraction",
    # a checkpoint has these weights
    "model.*.pretrained",
    "loss.schedule",
    "loss.backend",
    "train.micro_batch",
    "train.zero_stage",
    "train.reduce_gradients",
    "train.offload_optimizer",
    "train.offload_parameters",
    "train.compile",
    "train.deepspeed",
    "checkpoint",
    "guard",
    "metrics",
    "eval",
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `path`, its parents and its preset, lay `overrides` ("optim.lr=1e-3") over them and check the result.

    Raises:
        ConfigError: an unknown key, a wrong type or value, a missing file or a circular `extends:`.
    """
    tree = _read_yaml(Path(path), ())
    for text in overrides:
        key, value = parse_override(text)
        _deep_update(tree, _nest(key, value))
    model = tree.get("model")
    if isinstance(model, Mapping) and model.get("preset") is not None:
        tree["model"] = _deep_update(_preset(str(model["preset"])), model)
    return parse_config(tree)


def parse_config(tree: Mapping[str, Any]) -> RunConfig:
    """A nested mapping as a checked configuration; raises ConfigError with every fault on a line of its own."""
    return parse_section(RunConfig, tree)


def parse_section(section: type[S], tree: Mapping[str, Any]) -> S:
    """A mapping as a checked `section`; raises ConfigError with every fault on a line of its own."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        faults = error.errors()
        # a list whose entries are at fault also counts as too short
        faults = [each for each in faults if each["type"] != "too_short" or not _has_fault_inside(each, faults)]
        raise ConfigError("\n".join(_explain(fault, section) for fault in faults)) from None


def _has_fault_inside(fault: Any, faults: Sequence[Any]) -> bool:
    return any(other["loc"][: len(fault["loc"])] == fault["loc"] for other in faults if other is not fault)


def parse_override(text: str) -> tuple[str, Any]:
    """`"optim.lr=1e-3"` as `("optim.lr", 0.001)`; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r} is not of the form dotted.key=value, for example optim.lr=1e-3")
    try:
        return key, _number(yaml.safe_load(value))
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
    return json.dumps(schema, indent=2)


def known_keys() -> list[str]:
    """Every dotted key that a configuration may set."""
    return [key for key, _ in _fields(RunConfig, "")]


def origin(config: RunConfig, data_fingerprint: str) -> dict[str, Any]:
    """What decides a run's updates, by dotted key, with what its data is: a checkpoint of another origin is another run's."""
    flat = _flatten(config.model_dump(mode="json"))
    return {key: value for key, value in flat.items() if not _is_free(key)} | {"data": data_fingerprint}


def differing_keys(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) wherever two configurations differ in what decides the training itself."""
    left, right = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    keys = sorted(left.keys() | right.keys())
    return [(k, left.get(k), right.get(k)) for k in keys if left.get(k) != right.get(k) and not _is_free(k)]


def _presets() -> dict[str, dict[str, Any]]:
    text = importlib.resources.files("scaleclip").joinpath("models/presets.yaml").read_text()
    return typing.cast(dict[str, dict[str, Any]], yaml.safe_load(text))


def preset_names() -> list[str]:
    """Names that `model: NAME` takes."""
    return list(_presets())


def _preset(name: str) -> dict[str, Any]:
    presets = _presets()
    if name not in presets:
        raise ConfigError(f"model.preset={name!r} is unknown{_hint(name, presets)}; presets: {', '.join(presets)}")
    return dict(presets[name])


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
    tree = typing.cast(dict[str, Any], _number(tree or {}))
    _expand_preset_name(tree)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    return _deep_update(_read_yaml(path.parent / str(parent), (*children, path)), tree)


def _expand_preset_name(tree: dict[str, Any]) -> None:
    if isinstance(tree.get("model"), str):
        tree["model"] = {"preset": tree["model"]}


def _deep_update(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in top.items():
        below = base.get(key)
        base[key] = _deep_update(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return base


def _nest(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    _expand_preset_name(value)
    return typing.cast(dict[str, Any], value)


def _number(tree: Any) -> Any:
    """YAML 1.1 reads 1e-3, without a dot, as a string; people mean the number."""
    if isinstance(tree, dict):
        return {key: _number(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_number(value) for value in tree]
    if isinstance(tree, str) and tree[:1] in "+-.0123456789" and "e" in tree.lower():
        try:
            return float(tree)
        except ValueError:
            return tree
    return tree


def _is_free(key: str) -> bool:
    return any(fnmatch.fnmatchcase(key, free) or fnmatch.fnmatchcase(key, f"{free}.*") for free in FREE_ON_RESUME)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _fields(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        if isinstance(field.default, BaseModel):
            yield from _fields(type(field.default), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _explain(fault: Any, whole: type[Section]) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        section = key.rpartition(".")[0]
        # sources and views are called as the user likes
        named: dict[str, type[Section]] = {"data.sources": SourceConfig, "data.views": ViewConfig}
        inside = named.get(section.rpartition(".")[0])
        top = [*(name for name, _ in _fields(whole, "")), *whole.model_fields]
        keys = [f"{section}.{field}" for field in inside.model_fields] if inside else top
        every = "scaleclip config --schema lists every key" if whole is RunConfig else f"keys: {', '.join(whole.model_fields)}"
        hint = _hint(key, keys) or f"; {every}"
        return f"unknown key {key!r}{hint}"
    return f"{key}={fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _hint(name: str, names: Any) -> str:
    by_lower = {str(each).lower(): each for each in names}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""
