"""Models of transformers from their folders."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig

from scaleclip.errors import ConfigError

DType = Literal["auto", "float32", "bfloat16", "float16"]

_SAMPLED_BYTES = 1 << 20  # of each weights file, at three places


def folder_digest(folder: Path) -> str:
    """A digest of a model's folder: its configuration, its tokenizer, and sizes and some parts of its weights' files."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.suffix not in (".json", ".jinja", ".model", ".txt", ".safetensors", ".bin"):
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        starts = (0, (size - _SAMPLED_BYTES) // 2, size - _SAMPLED_BYTES) if size > 3 * _SAMPLED_BYTES else (0,)
        with file.open("rb") as content:
            for start in starts:
                content.seek(start)
                digest.update(content.read(_SAMPLED_BYTES if len(starts) > 1 else -1))
    return digest.hexdigest()[:16]


def load(kind: Any, folder: Path, **options: Any) -> Any:
    """What a class of transformers makes of a folder. Raises ConfigError where it cannot."""
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is no folder, and models are not fetched by name: download it first, for example with `hf download NAME "
            f"--local-dir FOLDER`"
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json: give the folder of a model as transformers saves it")
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, ImportError, json.JSONDecodeError, SafetensorError) as error:
        # transformers goes on with a list of all that it has
        reason = re.split(r"(?<=\.)\s|\n", str(error).strip(), maxsplit=1)[0]
        raise ConfigError(f"{folder} cannot be loaded by {kind.__name__}: {reason}") from error


def load_model(kind: Any, folder: Path, dtype: DType, device: torch.device) -> Any:
    """A model that is a decoder alone, in evaluation mode, by an `AutoModelFor...` of transformers.

    Args:
        kind: the class.
        folder: of transformers.
        dtype: of the weights; `auto` is bfloat16 on a GPU, else float32.
        device: where it runs.

    Raises:
        ConfigError: the folder holds no such model, or not all of it.
    """
    config = load(AutoConfig, folder)
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{folder} holds a {config.model_type}, an encoder with a decoder: take a model that is a decoder alone"
        )
    name = ("bfloat16" if device.type == "cuda" else "float32") if dtype == "auto" else dtype
    model, report = load(kind, folder, config=config, dtype=getattr(torch, name), output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError(f"{folder} lacks weights of {type(model).__name__}, {missing[0]} first: take a folder that is whole")
    return model.to(device).eval()
