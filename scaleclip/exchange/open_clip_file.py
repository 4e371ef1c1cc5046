"""open_clip_config.json as it lies beside weights: read, with the types that open_clip's own classes give its keys.

Read from open_clip_torch 3.3 (`CLIPVisionCfg`, `CLIPTextCfg`). A key that is null or not there has open_clip's own default, but
for the few that have none.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from scaleclip.errors import ConfigError

_WAY_OUT = "mend it, or take the file from where the weights come from"


class OpenClipFile(NamedTuple):
    """What a file says, without what is null."""

    model: Mapping[str, Any]
    """`model_cfg`, with `vision_cfg` and `text_cfg` in it."""
    preprocess: Mapping[str, Any]
    """`preprocess_cfg`; empty where the file has none."""


class _Kind(NamedTuple):
    name: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _are(holds: Callable[[Any], bool], length: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) == length and all(map(holds, value))


_COUNT = _Kind("a whole number from 1 on", _is_count)
_INDEX = _Kind("a whole number from 0 on", lambda value: _is_count(value) or (value == 0 and not isinstance(value, bool)))
_NUMBER = _Kind("a number", _is_number)
_RATIO = _Kind("a number above 0", lambda value: _is_number(value) and value > 0)
_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
_NAME = _Kind("a name", lambda value: isinstance(value, str))
_MAPPING = _Kind("a mapping", lambda value: isinstance(value, dict))
_NORM = _Kind(
    "a mapping, whose eps is a number above 0",
    lambda value: isinstance(value, dict) and _is_number(value.get("eps", 1)) and value.get("eps", 1) > 0,
)
_SIZE = _Kind("a number of pixels, or two", lambda value: _is_count(value) or _are(_is_count, 2)(value))
_LAYERS = _Kind("a whole number from 1 on, or four", lambda value: _is_count(value) or _are(_is_count, 4)(value))
_COLOURS = _Kind("three numbers", _are(_is_number, 3))
_SPREADS = _Kind("three numbers above 0", _are(_RATIO.holds, 3))

_LAYER = {"width": _COUNT, "mlp_ratio": _RATIO, "act_kwargs": _MAPPING, "norm_kwargs": _NORM}
_KINDS: dict[str, dict[str, _Kind]] = {
    "model_cfg": {
        "embed_dim": _COUNT, "vision_cfg": _MAPPING, "text_cfg": _MAPPING, "quick_gelu": _FLAG, "init_logit_bias": _NUMBER,
    },
    "model_cfg.vision_cfg": _LAYER | {
        "layers": _LAYERS, "head_width": _COUNT, "patch_size": _COUNT, "image_size": _SIZE, "pool_type": _NAME,
        "timm_model_name": _NAME, "timm_pool": _NAME, "timm_proj": _NAME,
    },
    "model_cfg.text_cfg": _LAYER | {
        "layers": _COUNT, "heads": _COUNT, "context_length": _COUNT, "vocab_size": _COUNT, "no_causal_mask": _FLAG,
        "pool_type": _NAME, "proj_bias": _FLAG, "eos_id": _INDEX, "pad_id": _INDEX, "hf_model_name": _NAME,
        "hf_tokenizer_name": _NAME, "hf_pooler_type": _NAME, "hf_proj_type": _NAME,
    },
    "preprocess_cfg": {"mean": _COLOURS, "std": _SPREADS},
}  # fmt: skip
# without a default in open_clip
_NEEDED = ("embed_dim", "vision_cfg", "text_cfg")


def read_open_clip_file(path: Path) -> OpenClipFile:
    """A checked open_clip_config.json.

    Raises:
        ConfigError: it is no JSON, lacks a key that has no default, or has a value of another type; the message names the file,
            the key and the value.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}; {_WAY_OUT}") from error
    content = _section(path, "", content)
    if "model_cfg" not in content:
        raise ConfigError(f"{path} has no model_cfg, which says what open_clip's model is; {_WAY_OUT}")
    model = _section(path, "model_cfg", content["model_cfg"])
    for key in _NEEDED:
        if key not in model:
            raise ConfigError(f"{path} has no model_cfg.{key}, which open_clip has no default for; {_WAY_OUT}")
    towers = {key: _section(path, f"model_cfg.{key}", model[key]) for key in ("vision_cfg", "text_cfg")}
    return OpenClipFile(model | towers, _section(path, "preprocess_cfg", content.get("preprocess_cfg") or {}))


def _section(path: Path, key: str, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {f'{key}={values!r}' if key else 'its content'} is no mapping; {_WAY_OUT}")
    found = {name: value for name, value in values.items() if value is not None}
    for name, kind in _KINDS.get(key, {}).items():
        if name in found and not kind.holds(found[name]):
            raise ConfigError(f"{path}: {key}.{name}={found[name]!r} is not {kind.name}; {_WAY_OUT}")
    return found
