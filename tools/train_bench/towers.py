"""The towers that are measured, as scaleclip's model section and as open_clip's model configuration."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from scaleclip.config import ModelConfig
from scaleclip.config_io import load_config, parse_config, preset_names
from scaleclip.models.dual_encoder import DualEncoder

_CLIP_VOCABULARY = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 0, "hidden_act": "gelu"}


def _transformer(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "hidden_act": "gelu",
    }


OWN: Mapping[str, Any] = {
    # so fast that the data decides
    "small": {
        "embed_dim": 64,
        "image": {"size": 224, "config": {"patch_size": 32, **_transformer(64, 2, 1)}},
        "text": {"context_length": 16, "config": {**_CLIP_VOCABULARY, **_transformer(64, 1, 1)}},
    },
    # so fast that two cores take steps of 32,768 pairs; `pairs.py` makes what it learns
    "digits": {
        "embed_dim": 32,
        "image": {"size": 16, "config": {"patch_size": 8, **_transformer(64, 1, 1)}},
        "text": {
            "context_length": 8,
            "config": {"vocab_size": 64, "bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 0, **_transformer(64, 1, 1)},
        },
    },
}
NAMES = (*OWN, *preset_names())


def model_config(name: str) -> ModelConfig:
    """The towers of one of NAMES."""
    if name in OWN:
        return parse_config({"model": OWN[name]}).model
    return load_config(os.devnull, [f"model={name}"]).model


def open_clip_config(model: ModelConfig) -> dict[str, Any]:
    """The same towers for open_clip.

    Raises:
        ValueError: they are not CLIP's, so that open_clip has no such towers.
    """
    if (model.image.type, model.text.type) != ("clip_vision_model", "clip_text_model"):
        raise ValueError(f"open_clip has no towers like {model.image.type} with {model.text.type}: choose CLIP's")
    image, text = model.image.config, model.text.config
    return {
        "embed_dim": model.embed_dim,
        "quick_gelu": image["hidden_act"] == "quick_gelu",
        "vision_cfg": {
            "image_size": model.image.size,
            "patch_size": image["patch_size"],
            "width": image["hidden_size"],
            "layers": image["num_hidden_layers"],
            "head_width": image["hidden_size"] // image["num_attention_heads"],
            "mlp_ratio": image["intermediate_size"] / image["hidden_size"],
        },
        "text_cfg": {
            "context_length": model.text.context_length,
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "layers": text["num_hidden_layers"],
            "heads": text["num_attention_heads"],
            "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
        },
    }


def num_parameters(model: ModelConfig) -> int:
    """Of scaleclip's model, the logit scale included."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DualEncoder(model).parameters())
