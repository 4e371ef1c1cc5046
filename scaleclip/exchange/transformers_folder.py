"""Folders of transformers: a CLIPModel, SiglipModel or VisionTextDualEncoderModel, or two towers and their projections.

What a class cannot compute decides which fits:
CLIPModel has CLIP's towers. SiglipModel projects texts, by SigLIP's own head, and not images. VisionTextDualEncoderModel
projects the pooler's output of both towers, and feeds text towers like BERT only. Two towers hold everything. A class that
projects images is given a matrix that changes nothing for a model that does not.
"""

import functools
import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import (
    AutoConfig,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPProcessor,
    PretrainedConfig,
    SiglipConfig,
    SiglipImageProcessor,
    VisionTextDualEncoderConfig,
)

from scaleclip.config import ImageTowerConfig, ModelConfig
from scaleclip.data.tokenizer import fast_tokenizer
from scaleclip.errors import ConfigError
from scaleclip.exchange import resizing
from scaleclip.exchange.open_clip_config import checked_model, tower_values
from scaleclip.exchange.rules import Rule, folded_head, prefixed, projecting, same, scalar, to_theirs
from scaleclip.exchange.weights import Weights
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.models.timm_towers import TIMM

Kind = Literal["CLIPModel", "SiglipModel", "VisionTextDualEncoderModel", "two towers"]
WEIGHTS = "model.safetensors"
PROJECTION = "projection.safetensors"
PROCESSOR = "preprocessor_config.json"
IMAGE, TEXT = "image", "text"
_INDEX = f"{WEIGHTS}.index.json"
_SIGLIP = ("siglip_vision_model", "siglip_text_model")
_BICUBIC = 3  # PIL's number
# transformers then pools at the largest id, as OpenAI's configuration had it
_LEGACY_END_ID = 2

log = logging.getLogger("scaleclip")


class Folder(NamedTuple):
    """What a folder of transformers is written from."""

    kind: Kind
    configs: Mapping[str, PretrainedConfig]
    """By folder in it; "" is itself."""
    files: Mapping[str, Weights]
    """By path in it."""


def fitting_kind(config: ModelConfig, model: DualEncoder) -> Kind:
    """The first of the classes, as this file's head lists them, that computes what a dual encoder does.

    Args:
        config: the dual encoder's.
        model: built from it, with or without values.
    """
    image, text, values = config.image, config.text, model.text.body.config
    pools_the_end = text.pooling in ("pooler", "eos") and values.eos_token_id != _LEGACY_END_ID
    is_clip_text = text.type == "clip_text_model" and pools_the_end
    if image.type == "clip_vision_model" and is_clip_text:
        return "CLIPModel"
    is_siglip = (image.type, text.type, image.pooling, text.pooling) == (*_SIGLIP, "pooler", "pooler")
    if is_siglip and not image.projection:
        return "SiglipModel"
    takes_types = "token_type_ids" in inspect.signature(model.text.body.forward).parameters  # as BERT does; they are handed on
    has_width = getattr(model.image.body.config, "hidden_size", None) == model.image.width
    if image.pooling == "pooler" and image.type != TIMM and has_width and text.pooling == "pooler" and takes_types:
        return "VisionTextDualEncoderModel"
    return "two towers"


def as_folder(config: ModelConfig, model: DualEncoder, ours: Weights) -> Folder:
    """A dual encoder, whose weights are `ours`, as the folder that fits it; see `fitting_kind` for the others."""
    kind = fitting_kind(config, model)
    towers = {IMAGE: model.image.body, TEXT: model.text.body}
    for body in towers.values():
        body.config.architectures = [type(body).__name__]
        body.config.dtype = torch.float32
    if kind == "two towers":
        rules = {f"{name}/{WEIGHTS}": prefixed(list(model.state_dict()), {f"{name}.body.": ""}) for name in towers}
        names = [name for name in model.state_dict() if ".body." not in name]
        rules[PROJECTION] = [same(name, name) for name in names]
        files = {file: to_theirs(each, ours) for file, each in rules.items()}
        return Folder(kind, {name: body.config for name, body in towers.items()}, files)
    ours = projecting(ours, config, model)
    whole = _whole_config(kind, config, model)
    whole.architectures, whole.dtype = [kind], torch.float32
    if config.init_logit_bias is not None and kind != "SiglipModel":
        whole.logit_bias = ours.read("logit_bias").item()  # for people: the class has no place for it
    if kind == "SiglipModel" and config.init_logit_bias is None:
        ours = ours.with_constants({"logit_bias": torch.zeros(1)})
    return Folder(kind, {"": whole}, {WEIGHTS: to_theirs(class_rules(kind, config, model), ours)})


def class_rules(kind: Kind, config: ModelConfig, model: DualEncoder) -> list[Rule]:
    """What a dual encoder's tensors are called in one of the classes."""
    names = list(model.state_dict())
    parts = ("vision_model.", "text_model.") if kind == "VisionTextDualEncoderModel" else ("", "")
    rules = prefixed(names, {"image.body.": parts[0], "text.body.": parts[1]})
    if kind == "SiglipModel":
        head = "text_model.head"
        rules = [rule for rule in rules if not rule.theirs.startswith(f"{head}.")]
        rules += folded_head("text_projection.weight", f"text.body.{head}", head, model.text.width)
        return [*rules, same("logit_scale", "logit_scale"), same("logit_bias", "logit_bias")]
    rules += [
        same("image_projection.weight", "visual_projection.weight"),
        same("text_projection.weight", "text_projection.weight"),
    ]
    return [*rules, scalar("logit_scale", "logit_scale")]


def write_processor(folder: Path, config: ModelConfig) -> None:
    """Write what prepares images and texts as this project does, for AutoProcessor and AutoTokenizer."""
    size, image = config.image.size, config.image
    processor = CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        resample=_BICUBIC,
        image_mean=list(image.mean),
        image_std=list(image.std),
    )
    tokenizer = fast_tokenizer(config.text.tokenizer, config.text.context_length)
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)


def class_config(folder: Path, reference: str, like: ImageTowerConfig | None = None) -> tuple[Kind, ModelConfig]:
    """The class of a folder, and the dual encoder that computes the same.

    Args:
        folder: of transformers.
        reference: names it in messages.
        like: has the mean and standard deviation of pixels where the folder does not say them, which a warning tells; None:
            those that transformers takes for the class.

    Raises:
        ConfigError: the folder holds another kind of model, or does not say the size of its images.
    """
    try:
        whole = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{reference} holds no model of transformers: {error}") from error
    kinds: dict[str, Kind] = {"clip": "CLIPModel", "siglip": "SiglipModel"}
    kinds["vision-text-dual-encoder"] = "VisionTextDualEncoderModel"
    if whole.model_type not in kinds:
        raise ConfigError(
            f"{reference} holds a {whole.model_type} of transformers: a dual encoder is a CLIPModel, a SiglipModel or a "
            f"VisionTextDualEncoderModel"
        )
    kind, vision, text = kinds[whole.model_type], whole.vision_config, whole.text_config
    image_values, text_values = tower_values(vision), tower_values(text)
    length = getattr(text, "max_position_embeddings", None)
    if length is None:
        raise ConfigError(f"{reference} has a text tower without a table of positions, {text.model_type}: none here is that")
    if vision.model_type == "clip_vision_model" and kind != "VisionTextDualEncoderModel":
        if text_values.get("eos_token_id") == _LEGACY_END_ID:
            text_values |= {"eos_token_id": text.vocab_size - 1, "bos_token_id": text.vocab_size - 2}
    elif text.model_type in ("roberta", "xlm-roberta", "camembert"):
        length -= text.pad_token_id + 1  # positions start behind the padding's
    embed_dim = text_values.pop("projection_size", text.hidden_size) if kind == "SiglipModel" else whole.projection_dim
    saved = _json(folder / "tokenizer_config.json").get("model_max_length", length)
    processor = _json(folder / PROCESSOR)
    resizing.warn_of_transformers(processor, f"{reference}'s {PROCESSOR}")
    image = {"type": vision.model_type, "size": _image_size(vision, processor, reference), "config": image_values}
    image["projection"] = kind != "SiglipModel"
    image |= _normalisation(kind, processor, reference, like)
    # OpenAI's vocabulary needs no file
    own = (folder / "tokenizer.json").is_file() or text.vocab_size != 49408
    tree = {
        "embed_dim": embed_dim,
        "image": image,
        "text": {
            "type": text.model_type,
            "context_length": min(length, saved),
            "pooling": "eos" if text.model_type == "clip_text_model" else "pooler",
            "tokenizer": str(folder) if own else "clip",
            "config": text_values,
        },
        "init_logit_bias": 0.0 if kind == "SiglipModel" else None,
    }
    return kind, checked_model(tree, reference)


def class_constants(kind: Kind, config: ModelConfig, folder: Path) -> dict[str, torch.Tensor]:
    """Parameters of a dual encoder that a class does without."""
    if kind != "SiglipModel" and config.init_logit_bias is not None:
        return {"logit_bias": torch.tensor([_json(folder / "config.json")["logit_bias"]])}
    return {}


def weight_files(folder: Path, reference: str) -> Sequence[Path]:
    """The safetensors of a folder.

    Raises:
        ConfigError: there are none.
    """
    if (folder / _INDEX).is_file():
        return [folder / name for name in sorted(set(_json(folder / _INDEX)["weight_map"].values()))]
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(
            f"{reference} has no {WEIGHTS}: save it by save_pretrained of a transformers that is not older than 4.35"
        )
    return [folder / WEIGHTS]


def _image_size(vision: PretrainedConfig, processor: Mapping[str, Any], reference: str) -> int:
    """Height and width of the input: of the tower's configuration or, where it has none, what the processor cuts out."""
    crop = processor.get("crop_size") or processor.get("size")
    size = getattr(vision, "image_size", None) or crop
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or [size.get("height"), size.get("width")]
    if isinstance(size, list | tuple):
        size = size[0] if len(set(size)) == 1 else None
    if not isinstance(size, int):
        raise ConfigError(
            f"{reference} does not say the size of its images, which are square here: neither vision_config.image_size of its "
            f"config.json nor crop_size or size of its {PROCESSOR}: put there what the model was saved with"
        )
    return size


def _normalisation(
    kind: Kind, processor: Mapping[str, Any], reference: str, like: ImageTowerConfig | None
) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation, by their names in `model.image`."""
    if processor.get("do_normalize") is False:
        return {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    usual = SiglipImageProcessor() if kind == "SiglipModel" else CLIPImageProcessor()
    taken = (like.mean, like.std) if like else (tuple(usual.image_mean), tuple(usual.image_std))
    found = {}
    for key, other in zip(("mean", "std"), taken, strict=True):
        if f"image_{key}" not in processor:
            found[key] = other
            _warn_once(
                f"{reference} has no image_{key} in a {PROCESSOR}: taken as {list(other)}, "
                + (f"which is model.image.{key}" if like else f"which is {type(usual).__name__}'s; put the file there")
            )
        else:
            found[key] = processor[f"image_{key}"]
    return found


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def _whole_config(kind: Kind, config: ModelConfig, model: DualEncoder) -> PretrainedConfig:
    vision, text = model.image.body.config, model.text.body.config
    if kind == "SiglipModel":
        text.projection_size = config.embed_dim
        return SiglipConfig(vision_config=vision.to_dict(), text_config=text.to_dict())
    if kind == "CLIPModel":
        vision.projection_dim = text.projection_dim = config.embed_dim
        return CLIPConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=config.embed_dim)
    return VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=config.embed_dim)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no mapping: save it again, or take it from where the weights come from")
    return content
