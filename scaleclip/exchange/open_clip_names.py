"""What the tensors of open_clip's models, and of OpenAI's, are called."""

from collections.abc import Collection, Iterator, Mapping

import torch

from scaleclip.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from scaleclip.exchange.rules import Rule, folded_head, layers, same, scalar, turned
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.models.timm_towers import TIMM

HF_TYPES = ("bert", "roberta", "xlm-roberta")
"""Text towers of transformers that open_clip knows and that are here."""


def name_rules(config: ModelConfig, model: DualEncoder, theirs: Collection[str] = ()) -> list[Rule]:
    """What the tensors of a dual encoder are called in open_clip.

    Args:
        config: the dual encoder's.
        model: built from it, with or without values.
        theirs: names in a checkpoint, which tell whether the text tower is a module of its own, and whether it projects with
            a bias; none: as `model_cfg` would have it.
    """
    prefix = text_prefix(theirs) if theirs else "text." * (config.text.type in HF_TYPES)
    rules = [scalar("logit_scale", "logit_scale")]
    if config.init_logit_bias is not None:
        rules.append(scalar("logit_bias", "logit_bias"))
    rules += _image_rules(config.image, model, theirs)
    return rules + list(_text_rules(config.text, model, prefix, theirs))


def constants(config: ModelConfig, model: DualEncoder, theirs: Collection[str]) -> dict[str, torch.Tensor]:
    """Parameters of a dual encoder that a checkpoint of open_clip does without: maps that change nothing."""
    found = {}
    if config.image.type == TIMM and config.image.projection and "visual.head.proj.weight" not in theirs:
        found["image_projection.weight"] = torch.eye(config.embed_dim, model.image.width)
    if config.text.type == "siglip_text_model" and f"{text_prefix(theirs)}text_projection.bias" not in theirs:
        found["text.body.text_model.head.weight"] = torch.eye(model.text.width)
        found["text.body.text_model.head.bias"] = torch.zeros(model.text.width)
    if config.text.type in HF_TYPES and config.text.pooling != "pooler":
        state = model.text.body.state_dict()
        pooler = {name: value.shape for name, value in state.items() if name.startswith("pooler.")}
        found |= {f"text.body.{name}": torch.zeros(shape) for name, shape in pooler.items()}
    return found


def text_prefix(names: Collection[str]) -> str:
    """What the names of the text tower begin with: it is a part of the whole, or a module of its own."""
    return "text." if any(name.startswith("text.") for name in names) else ""


def is_resnet(names: Collection[str]) -> bool:
    """Whether the image tower is CLIP's ResNet."""
    return "visual.layer1.0.conv1.weight" in names


def is_open_clip(names: Collection[str]) -> bool:
    """Whether these are the names of open_clip's, or OpenAI's, CLIP."""
    return any(name.startswith("visual.") for name in names) and "logit_scale" in names


def _image_rules(tower: ImageTowerConfig, model: DualEncoder, theirs: Collection[str]) -> Iterator[Rule]:
    if tower.type == TIMM:
        names = [name for name in model.state_dict() if name.startswith("image.body.timm_model.")]
        yield from (same(name, name.replace("image.body.timm_model.", "visual.trunk.")) for name in names)
        if tower.projection if not theirs else "visual.head.proj.weight" in theirs:
            yield same("image_projection.weight", "visual.head.proj.weight")
        return
    ours = "image.body.vision_model"
    yield same(f"{ours}.embeddings.class_embedding", "visual.class_embedding")
    yield same(f"{ours}.embeddings.patch_embedding.weight", "visual.conv1.weight")
    yield same(f"{ours}.embeddings.position_embedding.weight", "visual.positional_embedding")
    yield from _norm_rules({f"{ours}.pre_layrnorm": "visual.ln_pre", f"{ours}.post_layernorm": "visual.ln_post"})
    yield from layers(ours, "visual.", model.image.body.config.num_hidden_layers)
    yield turned("image_projection.weight", "visual.proj")


def _text_rules(tower: TextTowerConfig, model: DualEncoder, prefix: str, theirs: Collection[str]) -> Iterator[Rule]:
    if tower.type in HF_TYPES:
        names = [name for name in model.state_dict() if name.startswith("text.body.")]
        used = tower.pooling == "pooler"  # open_clip builds no pooler that it does not use
        names = [name for name in names if used or not name.startswith("text.body.pooler.")]
        yield from (same(name, name.replace("text.body.", "text.transformer.")) for name in names)
        yield same("text_projection.weight", "text.proj.weight")
        return
    ours = "text.body.text_model"
    yield same(f"{ours}.embeddings.token_embedding.weight", f"{prefix}token_embedding.weight")
    # all of open_clip's positions are used; a causal tower never sees ours beyond its texts
    yield Rule(
        (f"{ours}.embeddings.position_embedding.weight",),
        f"{prefix}positional_embedding",
        lambda table_TD: table_TD[: tower.context_length],
        lambda table_TD: (table_TD,),
    )
    yield from _norm_rules({f"{ours}.final_layer_norm": f"{prefix}ln_final"})
    yield from layers(ours, prefix, model.text.body.config.num_hidden_layers)
    if tower.type == "siglip_text_model" and (not theirs or f"{prefix}text_projection.bias" in theirs):
        width = model.text.width
        yield from folded_head("text_projection.weight", f"{ours}.head", f"{prefix}text_projection", width)
    else:
        yield turned("text_projection.weight", f"{prefix}text_projection")


def _norm_rules(names: Mapping[str, str]) -> Iterator[Rule]:
    for ours, theirs in names.items():
        yield from (same(f"{ours}.{end}", f"{theirs}.{end}") for end in ("weight", "bias"))
