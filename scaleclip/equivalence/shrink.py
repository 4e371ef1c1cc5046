"""A run's configuration made so small that a step takes a moment, with everything kept that decides how it is computed."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from scaleclip.config import ImageTowerConfig, ProjectorConfig, RunConfig, TextTowerConfig
from scaleclip.config_io import differing_keys
from scaleclip.errors import ConfigError
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.models.towers import build_image_tower, build_text_tower

Tower = TypeVar("Tower", ImageTowerConfig, TextTowerConfig)

# the most of a value of a tower's transformers configuration, or of each entry of a list
_MOST = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 256,
    "hidden_sizes": 16, "depths": 1,
}  # fmt: skip
# of timm's transformers
_TIMM_SIZES = {"depth": 2, "embed_dim": 32, "num_heads": 2}
_TOKEN_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")
_MOST_HIDDEN, _MOST_QUERIES = 32, 8
_MOST_EMBED_DIM, _MOST_TOKENS, _MOST_UNLOCKED_GROUPS = 32, 12, 3
_MOST_PIXELS, _MOST_PATCH_PIXELS, _MOST_PATCHES = 64, 8, 4  # a side
_GLOBAL_BATCH = 23  # a prime: no number of ranks and no micro batch divides it
# elements; at DeepSpeed's own sizes all of a small model would lie in one bucket, and stage 3 would shard none of it
_DEEPSPEED_SIZES = {
    "reduce_bucket_size": 10_000, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 2_000,
    "stage3_max_live_parameters": 20_000, "stage3_max_reuse_distance": 5_000,
}  # fmt: skip


class Shrunk(NamedTuple):
    """A small configuration and what became of the whole one."""

    config: RunConfig
    changes: list[str]
    """`key: old -> new` of every value that differs."""


def shrink(config: RunConfig) -> Shrunk:
    """The small configuration, in fp32 and on a CPU.

    Kept: kinds of towers, pooling, dropout, patch dropout, locking, activation checkpointing, text views, loss, duplicates,
    optimizer, learning rates and ZeRO's settings but for the sizes of its buckets. A tower of a kind whose sizes are not
    known here stays as large as it is.

    Raises:
        ConfigError: a tower cannot be built as configured.
    """
    model, loss, train = config.model, config.loss, config.train
    fresh = model.without_pretrained()
    with torch.device("meta"):
        whole = DualEncoder(fresh)
        image = _smaller(fresh.image, whole.image.body.config, _shrink_image, build_image_tower)
        text = _smaller(fresh.text, whole.text.body.config, _shrink_text, build_text_tower)
        embed_dim = min(model.embed_dim, _MOST_EMBED_DIM)
        if not image.projection:
            embed_dim = build_image_tower(image, False).width
    projector, decoder = model.projector, model.caption_decoder
    heads = {
        "projector": projector
        and ProjectorConfig(hidden=min(projector.hidden, _MOST_HIDDEN), dim=min(projector.dim, _MOST_HIDDEN)),
        "caption_decoder": decoder and decoder.model_copy(update={"queries": min(decoder.queries, _MOST_QUERIES)}),
    }
    zero = dict(train.deepspeed.get("zero_optimization", {}))
    small = config.model_copy(
        update={
            "model": fresh.model_copy(update={"image": image, "text": text, "embed_dim": embed_dim} | heads),
            "loss": loss.model_copy(update={"compute_dtype": "fp32", "fp32_precision": "ieee", "backend": "panels"}),
            "train": train.model_copy(
                update={
                    "global_batch": min(train.global_batch, _GLOBAL_BATCH),
                    "precision": "fp32",
                    "compile": False,
                    "deepspeed": {**train.deepspeed, "zero_optimization": zero | _DEEPSPEED_SIZES},
                }
            ),
        }
    )
    defaults = {"model.image.config": whole.image.body.config, "model.text.config": whole.text.body.config}
    changes = []
    for key, old, new in differing_keys(config, small):
        section, _, name = key.rpartition(".")
        # what the file leaves out is the tower's own default
        before = getattr(defaults[section], name) if section in defaults and old is None else old
        if before != new:
            changes.append(f"{key}: {before} -> {new}")
    return Shrunk(small, changes)


def _smaller(
    tower: Tower, values: Any, shrink_tower: Callable[[Tower, Any], Tower], build: Callable[[Tower, bool], nn.Module]
) -> Tower:
    small = shrink_tower(tower, values)
    try:
        build(small, False)
    except ConfigError:
        # a kind of tower with rules of its own between its sizes
        return tower
    return small


def _shrink_image(tower: ImageTowerConfig, values: Any) -> ImageTowerConfig:
    sizes, pixels = _small_sizes(values), min(tower.size, _MOST_PIXELS)
    patch = getattr(values, "patch_size", None)
    if isinstance(patch, int) and "depths" not in sizes:
        sizes["patch_size"] = min(patch, _MOST_PATCH_PIXELS)
        pixels = min(tower.size // patch, _MOST_PATCHES) * sizes["patch_size"]
    if "image_size" in tower.config:
        sizes["image_size"] = pixels
    if tower.type == "timm_wrapper":
        sizes["model_args"] = {**(tower.config.get("model_args") or {}), **_TIMM_SIZES, "img_size": pixels}
    return tower.model_copy(update={"size": pixels} | _layers(tower, sizes))


def _shrink_text(tower: TextTowerConfig, values: Any) -> TextTowerConfig:
    sizes = _small_sizes(values)
    ids = {name: getattr(values, name) for name in _TOKEN_IDS}
    too_large = sorted({number for number in ids.values() if (number or 0) >= sizes["vocab_size"]})
    moved = {number: sizes["vocab_size"] - len(too_large) + place for place, number in enumerate(too_large)}
    sizes |= {name: moved.get(number, number) for name, number in ids.items()}
    return tower.model_copy(update={"context_length": min(tower.context_length, _MOST_TOKENS)} | _layers(tower, sizes))


def _layers(tower: Tower, sizes: Mapping[str, Any]) -> dict[str, Any]:
    unlocked_groups = min(tower.unlocked_groups, _MOST_UNLOCKED_GROUPS)
    return {"config": {**tower.config, **sizes}, "unlocked_groups": unlocked_groups}


def _small_sizes(values: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    for name, most in _MOST.items():
        value = getattr(values, name, None)
        if isinstance(value, int):
            sizes[name] = min(value, most)
        elif isinstance(value, list):
            sizes[name] = [min(each, most) for each in value]
    return sizes
