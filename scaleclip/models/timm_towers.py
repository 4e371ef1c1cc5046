"""Image towers of timm, such as EVA02 (arXiv:2303.11331), behind transformers' `timm_wrapper`."""

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from scaleclip.errors import ConfigError

TIMM = "timm_wrapper"


def timm_values(key: str, values: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The values of a tower's configuration with the input's size among `model_args`, where the architecture has a fixed one.

    Args:
        key: the tower's section, `model.image`.
        values: its `config`.
        size: height and width of the input in pixels.

    Raises:
        ConfigError: an architecture that timm does not have, or arguments by which nothing is pooled.
    """
    import timm  # takes a second, and other towers need none of it

    architecture, arguments = values.get("architecture"), values.get("model_args") or {}
    if fault := unknown_architecture(architecture):
        raise ConfigError(f"{key}.config.architecture={fault}")
    if not isinstance(arguments, Mapping):
        raise ConfigError(f"{key}.config.model_args={arguments!r} is no mapping: give arguments by name, {{depth: 6}}")
    pooled = values.get("do_pooling", True) and arguments.get("global_pool") != "" and not arguments.get("features_only")
    if not pooled:
        raise ConfigError(
            f"{key}.config leaves the tower's states as they are: unset do_pooling and model_args.features_only, and set "
            f"model_args.global_pool to what timm should do (token, avg, map)"
        )
    if timm.get_pretrained_cfg(architecture).fixed_input_size:
        arguments = {"img_size": size, **arguments}
    return {**values, "model_args": dict(arguments)}


def unknown_architecture(name: Any) -> str | None:
    """What is wrong with the name of an architecture, which the message begins with; None where timm has it."""
    import timm

    # timm would fetch what starts with hf-hub:
    if isinstance(name, str) and timm.is_model(name):
        return None
    close = difflib.get_close_matches(str(name), timm.list_models(), n=1)
    hint = f"did you mean {close[0]!r}?" if close else "for example eva02_base_patch16_clip_224"
    return f"{name!r} is none of timm's: {hint}"


def initialise_timm_tower(body: PreTrainedModel) -> None:
    """Draw a TimmWrapperModel's weights anew, in place, as timm does: the wrapper draws every matrix from one distribution."""
    import timm

    values = body.config
    body.timm_model = timm.create_model(values.architecture, pretrained=False, num_classes=0, **values.model_args)


def default_size(architecture: str) -> int:
    """Height and width of the input that timm builds an architecture for, in pixels."""
    import timm

    return int(timm.get_pretrained_cfg(architecture).input_size[-1])


def default_pool(architecture: str) -> str | None:
    """How timm pools an architecture where it is told nothing (token, avg, map); None where that is not known."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(architecture, num_classes=0)
    pool = getattr(model, "global_pool", None) or getattr(getattr(model, "head", None), "global_pool", None)
    return pool if isinstance(pool, str) else getattr(pool, "pool_type", None)
