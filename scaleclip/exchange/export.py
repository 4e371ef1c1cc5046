"""A dual encoder as a folder that transformers or open_clip loads.

Weights go from the source to the folder one tensor at a time: whatever the model's size, memory holds its largest one.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import PretrainedConfig

from scaleclip.config import ModelConfig
from scaleclip.errors import ConfigError
from scaleclip.exchange import open_clip_config
from scaleclip.exchange.card import model_card
from scaleclip.exchange.open_clip_names import HF_TYPES, name_rules
from scaleclip.exchange.rules import projecting, to_theirs
from scaleclip.exchange.source import EXPORT, Source
from scaleclip.exchange.transformers_folder import TEXT, as_folder, fitting_kind, write_processor
from scaleclip.exchange.weights import Weights, write_safetensors
from scaleclip.files import publish_folder, restore_folder

Format = Literal["transformers", "open_clip"]
_PARTIAL = ".partial-"


class Export(NamedTuple):
    """What is written, before it is."""

    kind: str
    """The class that loads it."""
    configs: Mapping[str, PretrainedConfig]
    """Of transformers, by folder."""
    files: Mapping[str, Weights]
    """By path."""
    config: ModelConfig
    """What reads it back."""
    open_clip: Mapping[str, Any] | None = None
    """open_clip's own configuration."""

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        return sum(weights.num_bytes() for weights in self.files.values())


def prepare(source: Source, to: Format) -> Export:
    """What `to` makes of a model; reads at most its projections.

    Raises:
        ConfigError: `to` cannot hold it; the message names what fits.
    """
    if to == "transformers":
        kind, configs, files = as_folder(source.config, source.model, source.weights)
        return Export(kind, configs, files, source.config)
    try:
        cfg = open_clip_config.model_cfg(source.config, source.model)
    except ConfigError as error:
        kind = fitting_kind(source.config, source.model)
        raise ConfigError(f"--to open_clip: {error}; --to transformers fits, as {kind}") from None
    rules = name_rules(source.config, source.model)
    text = source.config.text
    if text.tokenizer != "clip":
        # the folder itself, wherever it lies; its own cleaning would be a second one
        cfg["text_cfg"] |= {"hf_tokenizer_name": "tokenizer.json", "tokenizer_kwargs": {"clean": "whitespace"}}
    image = source.config.image
    preprocess = {
        "size": image.size,
        "mean": image.mean,
        "std": image.std,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    configs = {TEXT: source.model.text.body.config} if text.type in HF_TYPES else {}
    files = {open_clip_config.WEIGHTS: to_theirs(rules, projecting(source.weights, source.config, source.model))}
    config = source.config
    if "max_position_embeddings" in text.config and not configs:  # open_clip has as many as tokens
        values = {**text.config, "max_position_embeddings": text.context_length}
        config = config.model_copy(update={"text": text.model_copy(update={"config": values})})
    return Export("open_clip", configs, files, config, {"model_cfg": cfg, "preprocess_cfg": preprocess})


def check_target(out: Path, *, force: bool) -> None:
    """Raise ConfigError if a folder is in the way: only an earlier export is replaced, and only by force.

    One that a crash took away while it was being replaced is brought back first.
    """
    restore_folder(out)
    if not out.exists() or (force and (out / EXPORT).is_file()):
        return
    way = "add --force to replace it" if (out / EXPORT).is_file() else "it is no export, so nothing replaces it"
    raise ConfigError(f"--out={out} exists: {way}, or name another folder")


def write(export: Export, source: Source, out: Path, done: Callable[[int], object] = lambda size: None) -> None:
    """Write the folder under another name, and rename it when it is whole and on the disk; an earlier one stays until then, and
    if anything fails. `done` is told bytes of weights as they are written.

    Raises:
        ConfigError: it cannot be written.
        RunError: the checkpoint lacks elements.
    """
    partial = out.with_name(f"{_PARTIAL}{out.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_files(export, source, partial, out, done)
        publish_folder(partial, out)
    except OSError as error:
        raise ConfigError(f"--out={out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_files(export: Export, source: Source, folder: Path, out: Path, done: Callable[[int], object]) -> None:
    for name, config in export.configs.items():
        config.save_pretrained(folder / name)
    if export.open_clip is None:
        write_processor(folder, source.config)
    else:
        if source.config.text.tokenizer != "clip":
            write_processor(folder, source.config)
        content = json.loads(json.dumps(export.open_clip))
        if export.configs:  # open_clip reads it by a path of its own, and from nowhere else
            content["model_cfg"]["text_cfg"]["hf_model_name"] = str(out.absolute() / TEXT)
        (folder / open_clip_config.CONFIG).write_text(json.dumps(content, indent=2))
    for name, weights in export.files.items():
        write_safetensors(folder / name, weights, done)
    checkpoint = source.checkpoint
    facts = {
        "kind": export.kind,
        "step": checkpoint.state.step if checkpoint else None,
        "samples": checkpoint.state.samples if checkpoint else None,
        "model": export.config.model_dump(mode="json"),
    }
    (folder / EXPORT).write_text(json.dumps(facts, indent=2))
    (folder / "README.md").write_text(model_card(export.kind, source, out.name))
