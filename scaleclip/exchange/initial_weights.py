"""A dual encoder that takes its weights from an opened one: whole, or as the start of a training (`model.pretrained`)."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from scaleclip.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from scaleclip.errors import ConfigError
from scaleclip.exchange.rules import projecting
from scaleclip.exchange.source import Source, open_source
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.models.positions import is_fixed, resize_positions
from scaleclip.models.pretrained import TABLE_SIZES, differing_values, setting

# what only training needs: another model has none, and a run starts it afresh
_HEADS = ("projector.", "caption_decoder.")
_POSITIONS = "image.body.vision_model.embeddings.position_embedding.weight"


def start_from(model: DualEncoder, config: ModelConfig) -> None:
    """Give a dual encoder the weights of `model.pretrained`, in place: towers, projections, logit scale and bias.

    Tables of positions are resized. Where the other model has no projection of images, this one's starts as a matrix that
    changes nothing. The projector, the caption decoder and a bias that the other model lacks stay as they are.

    Args:
        model: built from `config`, with values.

    Raises:
        ConfigError: nothing is there, or it computes something else than `config` says; the message names what to set.
    """
    assert config.pretrained is not None
    source = open_source(config.pretrained, like=config)
    if settings := list(_differing(model, config, source)):
        raise ConfigError(f"model.pretrained={config.pretrained} belongs to other values: set {' '.join(settings)}")
    fill(model, source, config)


@torch.no_grad()
def fill(model: DualEncoder, source: Source, config: ModelConfig) -> None:
    """Copy a source's weights into a dual encoder, one by one.

    Raises:
        ConfigError: a weight is missing or has a shape that no resizing of positions explains.
    """
    weights = projecting(source.weights, source.config, source.model)
    for name, target in model.state_dict().items():
        if name not in weights.shapes:
            if name.startswith(_HEADS) or name == "logit_bias":
                continue
            raise ConfigError(f"{source.reference} has no {name}: it holds another architecture")
        value: Tensor | None = weights.read(name)
        assert value is not None
        if value.shape != target.shape and (value := resize_positions(name, value, target.shape)) is None:
            raise ConfigError(
                f"{source.reference} has {name} with shape {list(weights.shapes[name])}, this model with "
                f"{list(target.shape)}: it holds another architecture"
            )
        if name == _POSITIONS and config.image.positions == "sincos" and not is_fixed(value, target):
            raise ConfigError(f"{source.reference} has learned positions: set model.image.positions=learned")
        target.copy_(value)


def _differing(model: DualEncoder, ours: ModelConfig, source: Source) -> Iterator[str]:
    """Settings by which the run would compute what the source does."""
    theirs = source.config
    if ours.embed_dim != theirs.embed_dim:
        yield setting("model.embed_dim", theirs.embed_dim)
    if theirs.image.projection and not ours.image.projection:
        yield setting("model.image.projection", True)
    towers = (("image", ours.image, theirs.image, model.image), ("text", ours.text, theirs.text, model.text))
    for key, tower, other, built in towers:
        if tower.type != other.type:
            yield setting(f"model.{key}.type", other.type)
            continue
        if _pooling(tower) != _pooling(other):
            yield setting(f"model.{key}.pooling", other.pooling)
        values = getattr(source.model, key).body.config
        for name in differing_values(built.body.config, values):
            if name not in TABLE_SIZES:
                yield setting(f"model.{key}.config.{name}", getattr(values, name))
    for key in ("mean", "std"):
        pairs = zip(getattr(ours.image, key), getattr(theirs.image, key), strict=True)
        if not all(math.isclose(a, b, abs_tol=1e-3) for a, b in pairs):
            yield setting(f"model.image.{key}", getattr(theirs.image, key))


def _pooling(tower: ImageTowerConfig | TextTowerConfig) -> str:
    # the pooler of CLIP's text tower is the state of the end token
    return "eos" if (tower.type, tower.pooling) == ("clip_text_model", "pooler") else tower.pooling
