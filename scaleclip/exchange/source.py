"""From what a user names to a dual encoder's configuration and its weights, which are read one by one.

A run's folder (its newest whole checkpoint), a checkpoint's folder (RUN/checkpoints/step_X), a folder of transformers
(CLIPModel, SiglipModel, VisionTextDualEncoderModel, or what `scaleclip export` wrote), a folder of open_clip
(open_clip_config.json beside weights), or a file of open_clip's or OpenAI's weights.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError

from scaleclip.checkpoint.folders import damage, newest_whole
from scaleclip.checkpoint.state import STATE, TrainState, read_state
from scaleclip.config import ModelConfig, RunConfig
from scaleclip.data.tokenizer import SHIPPED, TOKENIZER_FILES
from scaleclip.errors import ConfigError
from scaleclip.exchange import open_clip_config, open_clip_names, resizing
from scaleclip.exchange.open_clip_file import read_open_clip_file
from scaleclip.exchange.rules import named, to_ours
from scaleclip.exchange.transformers_folder import (
    IMAGE,
    PROCESSOR,
    PROJECTION,
    TEXT,
    class_config,
    class_constants,
    class_rules,
    weight_files,
)
from scaleclip.exchange.weights import Weights, in_checkpoint, in_safetensors
from scaleclip.exchange.weights_file import WeightsFile, read_weights_file
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.run_folder import read_config
from scaleclip.stages import stage_before, stages_of

EXPORT = "scaleclip.json"
"""In a folder that `scaleclip export` wrote: what it is of."""
# what a file of weights is read with, as patterns
_BESIDE_WEIGHTS = (EXPORT, open_clip_config.CONFIG, "config.json", PROCESSOR, *TOKENIZER_FILES)
# only training needs them
_NO_HEADS = {"projector": None, "caption_decoder": None}

log = logging.getLogger("scaleclip")


class Checkpoint(NamedTuple):
    """Where weights of this project's come from."""

    run: Path
    path: Path
    config: RunConfig
    """Of the stage that saved it."""
    state: TrainState


class Source(NamedTuple):
    """An opened dual encoder."""

    reference: str
    """As the user named it."""
    config: ModelConfig
    """Without what only training needs."""
    model: DualEncoder
    """Its shapes, on the meta device."""
    weights: Weights
    """By the names of `model`'s state dict."""
    checkpoint: Checkpoint | None = None
    """None for another project's."""


def open_source(reference: str, like: ModelConfig | None = None) -> Source:
    """Open what `reference` names.

    Args:
        reference: a path; see this file's head.
        like: what the model is, where a file of weights does not say it, as OpenAI's do, and how pixels are normalised, where
            a folder of transformers does not. None: by its shapes, with 64 channels a head and exact GELU.

    Raises:
        ConfigError: nothing is there, or another architecture; the message names what it is.
    """
    path = Path(reference).expanduser()
    if path.is_file():
        return _open_file(reference, path, like)
    if (path / "config.yaml").is_file():
        return _open_checkpoint(reference, path, newest_whole(path))
    if (path / STATE).is_file():
        if fault := damage(path):
            raise ConfigError(f"{reference} is damaged: {fault}")
        return _open_checkpoint(reference, path.absolute().parent.parent, path)
    if (path / open_clip_config.CONFIG).is_file():
        weights = [path / name for name in (open_clip_config.WEIGHTS, "open_clip_pytorch_model.bin") if (path / name).is_file()]
        if not weights:
            raise ConfigError(f"{reference} has {open_clip_config.CONFIG}, and no {open_clip_config.WEIGHTS} beside it")
        return _open_file(reference, weights[0], None)
    if (path / "config.json").is_file() or (path / EXPORT).is_file():
        return _open_transformers(reference, path, like)
    raise ConfigError(
        f"{reference} is no run's folder, no checkpoint, no folder of transformers or open_clip and no file of weights; models "
        f"are not fetched by name: download one first, for example with `hf download NAME --local-dir FOLDER`"
    )


def files_of(reference: str) -> list[Path]:
    """The files that decide what a model from elsewhere computes, in a fixed order: where none changed, no feature did.

    Of a folder they are all in it. Of a file of weights they are itself and what is read beside it: what describes the
    architecture, and the tokenizer. With either go the folders that an open_clip_config.json names.

    Args:
        reference: a folder or a file; a run's checkpoints have checksums for this.

    Raises:
        ConfigError: nothing is there, or an open_clip_config.json that cannot be read.
    """
    path = Path(reference).expanduser()
    if path.is_file():
        folder, found = path.parent, {path, *_matching(path.parent, _BESIDE_WEIGHTS)}
    elif path.is_dir():
        folder, found = path, {each for each in path.rglob("*") if each.is_file()}
    else:
        raise ConfigError(f"{reference}: there is no such model")
    described = folder / open_clip_config.CONFIG
    if described.is_file() and not (folder / EXPORT).is_file():  # which says all of it
        text = read_open_clip_file(described).model["text_cfg"]
        for key, patterns in (("hf_model_name", ("config.json",)), ("hf_tokenizer_name", TOKENIZER_FILES)):
            found.update(_matching(Path(text[key]), patterns) if key in text else ())
    return sorted(found)


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return [each for pattern in patterns for each in folder.glob(pattern) if each.is_file()]


def _open_checkpoint(reference: str, run: Path, path: Path) -> Source:
    state = read_state(path)
    config = stage_before(stages_of(read_config(run)), state.step).config
    return _source(reference, config.model, in_checkpoint(path))._replace(checkpoint=Checkpoint(run, path, config, state))


def _open_file(reference: str, path: Path, like: ModelConfig | None) -> Source:
    file = read_weights_file(path)
    names = file.weights.shapes
    if open_clip_names.is_resnet(names):
        raise ConfigError(f"{reference} has CLIP's ResNet as its image tower, whose batch norm no tower here has: use a ViT")
    if not open_clip_names.is_open_clip(names):
        raise ConfigError(f"{reference} holds no CLIP of open_clip or OpenAI: it has {named(sorted(names))}")
    config = _file_config(reference, path, file, like)
    model = _described_model(reference, config)
    rules = open_clip_names.name_rules(config, model, names)
    weights = to_ours(rules, file.weights, reference)
    return _source(reference, config, weights.with_constants(open_clip_names.constants(config, model, names)))


def _file_config(reference: str, path: Path, file: WeightsFile, like: ModelConfig | None) -> ModelConfig:
    """What a file of weights is: an export says it, then open_clip's configuration, then the user, then shapes."""
    if (exported := _exported_config(path.parent)) is not None:
        return exported
    described = path.parent / open_clip_config.CONFIG
    if described.is_file():
        file_config = read_open_clip_file(described)
        config = open_clip_config.model_config(file_config.model, file_config.preprocess, str(described))
        resizing.warn_of_open_clips(file_config.preprocess, str(described))
        vocabulary = file_config.model["text_cfg"].get("hf_tokenizer_name")
        if vocabulary and (path.parent / "tokenizer.json").is_file():
            vocabulary = str(path.parent)
        return _with_tokenizer(config, vocabulary) if vocabulary else config
    if like is not None and not file.is_openai:
        open_clip_config.model_cfg(like, _meta_model(like))  # raises where it has no such tower
        return like
    guessed = open_clip_config.guessed_cfg(file.weights, file.is_openai, reference)
    if not file.is_openai:
        log.warning(
            f"{reference} does not say its activation and its heads: taken as exact GELU and 64 channels a head; name its "
            f"architecture if it has others"
        )
    return open_clip_config.model_config(guessed, {}, reference)


def _open_transformers(reference: str, folder: Path, like: ModelConfig | None) -> Source:
    exported = _exported_config(folder)
    if exported is not None and not (folder / "config.json").is_file():
        files = {tower: _tensors(weight_files(folder / tower, reference), reference) for tower in (IMAGE, TEXT)}
        parts = {f"{tower}.body.{name}": (tower, name) for tower, file in files.items() for name in file.shapes}
        towers = Weights(
            {name: files[tower].shapes[theirs] for name, (tower, theirs) in parts.items()},
            lambda name: files[parts[name][0]].read(parts[name][1]),
            {name: files[tower].dtypes[theirs] for name, (tower, theirs) in parts.items() if theirs in files[tower].dtypes},
        )
        rest = _tensors([folder / PROJECTION], reference)
        return _source(reference, exported, towers.with_constants({name: rest.read(name) for name in rest.shapes}))
    described = exported or like
    kind, config = class_config(folder, reference, described.image if described else None)
    config = exported or config
    model = _described_model(reference, config)
    weights = to_ours(class_rules(kind, config, model), _tensors(weight_files(folder, reference), reference), reference)
    return _source(reference, config, weights.with_constants(class_constants(kind, config, folder)))


def _tensors(paths: Sequence[Path], reference: str) -> Weights:
    try:
        return in_safetensors(paths)
    except (OSError, SafetensorError) as error:
        files = ", ".join(path.name for path in paths)
        raise ConfigError(f"{reference}: {files} cannot be read: {error}; export or download it again") from error


def _exported_config(folder: Path) -> ModelConfig | None:
    """Of a folder that this project wrote."""
    if not (folder / EXPORT).is_file():
        return None
    try:
        tree = json.loads((folder / EXPORT).read_text())["model"]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder / EXPORT} is not what an export writes: {error!r}; export it again") from error
    config = open_clip_config.checked_model(tree, str(folder / EXPORT))
    # one of its own, which may lie elsewhere by now
    return config if config.text.tokenizer in SHIPPED else _with_tokenizer(config, str(folder))


def _with_tokenizer(config: ModelConfig, tokenizer: str) -> ModelConfig:
    return config.model_copy(update={"text": config.text.model_copy(update={"tokenizer": tokenizer})})


def _source(reference: str, config: ModelConfig, weights: Weights) -> Source:
    config = config.without_pretrained().model_copy(update=_NO_HEADS)
    model = _meta_model(config)
    parameters = {name for name, _ in model.named_parameters()}
    lacking = model.state_dict().keys() - weights.shapes.keys() - parameters
    if lacking:  # constants, which some towers keep beside their parameters and checkpoints do without
        built = DualEncoder(config).state_dict()
        weights = weights.with_constants({name: built[name] for name in lacking})
    return Source(reference, config, model, weights)


def _described_model(reference: str, config: ModelConfig) -> DualEncoder:
    try:
        return _meta_model(config)
    except ConfigError as error:  # whose keys are ours, not those of the file that was read
        raise ConfigError(f"{reference} describes a model that cannot be built: {error}") from error


def _meta_model(config: ModelConfig) -> DualEncoder:
    with torch.device("meta"):
        return DualEncoder(config.without_pretrained().model_copy(update=_NO_HEADS))
