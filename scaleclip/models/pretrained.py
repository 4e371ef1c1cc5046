"""Towers that start from the weights of a transformers folder (config.json and safetensors).

The run's configuration decides what is built, and the folder has to agree. A folder of two towers (CLIPModel) serves both.
"""

import inspect
import json
import math
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from scaleclip.config import ImageTowerConfig, TextTowerConfig
from scaleclip.errors import ConfigError
from scaleclip.models.timm_towers import TIMM

# Parts of names whose values may differ: how fresh weights are drawn, what drops in training, the tokenizer's ids
# (`check_tokenizer` compares them), the width of a projection outside the tower, further outputs, heads, compilation.
FREE = (
    "dropout", "drop_path", "initializer", "init_value", "token_id", "projection_dim", "use_cache", "out_", "classifier",
    "decoder_bias", "sparse_pred", "repad_logits", "reference_compile",
)  # fmt: skip
# These matter only to a tower with a table of their size, and its shape then tells.
TABLE_SIZES = ("image_size", "max_position_embeddings")
NUM_NAMED = 3


def start_from_folder(key: str, tower: ImageTowerConfig | TextTowerConfig, config: PretrainedConfig) -> PreTrainedModel:
    """The tower of `config` with the weights of the folder `tower.pretrained`, in fp32 and in training mode.

    Under `torch.device("meta")` the folder's configuration is compared and its weights are not read. A pooler that
    `tower.pooling` does not use is drawn afresh where the folder has none, and SigLIP's is left in the folder.

    Args:
        key: the tower's section, `model.image` or `model.text`.
        tower: its values.
        config: the transformers configuration made of them.

    Raises:
        ConfigError: no such folder, or it differs from the configuration in a value or a weight.
    """
    assert tower.pretrained is not None
    folder = Path(tower.pretrained).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"{key}.pretrained={tower.pretrained} is no folder, and models are not fetched by name: download it first, for "
            f"example with `hf download NAME --local-dir FOLDER`"
        )
    theirs = _folder_config(key, tower, folder)
    differing = {name: setting(f"{key}.config.{name}", getattr(theirs, name)) for name in differing_values(config, theirs)}
    settings = [setting for name, setting in differing.items() if name not in TABLE_SIZES]
    if isinstance(tower, ImageTowerConfig):
        settings += _normalisation(tower, folder, theirs)
        if "image_size" in differing and "image_size" not in tower.config:
            differing["image_size"] = setting("model.image.size", theirs.image_size)
        elif tower.type == TIMM and (theirs.model_args or {}).get("img_size", tower.size) != tower.size:
            differing["image_size"] = setting("model.image.size", theirs.model_args["img_size"])
    if settings:
        raise ConfigError(f"{key}.pretrained={tower.pretrained} belongs to other values: set {' '.join(settings)}")
    if torch.get_default_device().type == "meta":
        return cast(PreTrainedModel, AutoModel.from_config(config))
    return _read_weights(key, tower, folder, config, " ".join(differing.values()))


def _folder_config(key: str, tower: ImageTowerConfig | TextTowerConfig, folder: Path) -> PretrainedConfig:
    try:
        whole = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}.pretrained={tower.pretrained} holds no model of transformers: {error}") from error
    parts = [whole, *(getattr(whole, name) for name in whole.sub_configs)]
    for part in parts:
        if part.model_type == tower.type:
            return cast(PretrainedConfig, part)
    raise ConfigError(
        f"{key}.pretrained={tower.pretrained} holds {', '.join(part.model_type for part in parts)}, not "
        f"{key}.type={tower.type}: change one of the two"
    )


def differing_values(ours: PretrainedConfig, theirs: PretrainedConfig) -> list[str]:
    """Names of the values in which two towers of a type compute differently; `TABLE_SIZES` among them."""
    names = inspect.signature(type(ours).__init__).parameters.keys() - {"self", "kwargs"}
    compared = [name for name in sorted(names) if hasattr(theirs, name) and not any(part in name for part in FREE)]
    return [name for name in compared if _plain(name, getattr(ours, name)) != _plain(name, getattr(theirs, name))]


def _plain(name: str, value: Any) -> object:
    if name == "model_args":
        # timm's form of image_size, which the shape of a table tells
        return {argument: _plain(argument, each) for argument, each in (value or {}).items() if argument != "img_size"}
    return list(value) if isinstance(value, tuple) else value


def setting(key: str, value: object) -> str:
    """A setting as a shell takes it: without spaces."""
    return f"{key}={json.dumps(value, separators=(',', ':'))}"


def _normalisation(tower: ImageTowerConfig, folder: Path, config: PretrainedConfig) -> list[str]:
    """What to set so that pixels reach the tower as the folder's image processor, or timm's configuration, makes them."""
    file = folder / "preprocessor_config.json"
    try:
        values = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"model.image.pretrained={tower.pretrained}: its {file.name} is no JSON: {error}") from error
    timms = config.pretrained_cfg if tower.type == TIMM and hasattr(config, "pretrained_cfg") else {}
    settings = []
    for name, ours in (("mean", tower.mean), ("std", tower.std)):
        theirs = values.get(f"image_{name}", timms.get(name, ours))
        if not all(math.isclose(a, b, abs_tol=1e-3) for a, b in zip(ours, theirs, strict=True)):
            settings.append(setting(f"model.image.{name}", theirs))
    return settings


def _read_weights(
    key: str, tower: ImageTowerConfig | TextTowerConfig, folder: Path, config: PretrainedConfig, table_sizes: str
) -> PreTrainedModel:
    try:
        body, report = AutoModel.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are reported, and are an error below
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{key}.pretrained={tower.pretrained} cannot be read: {error}") from error
    parts = {name for name, _ in body.named_children()}
    left = [name for name in report["unexpected_keys"] if name.split(".")[0] in parts]
    if tower.pooling != "pooler":
        left = [name for name in left if not name.startswith("vision_model.head.")]
    faults = {
        "lacks": [name for name in report["missing_keys"] if tower.pooling == "pooler" or not name.startswith("pooler.")],
        # another tower or a head for another task is no part of this one
        "has, and the tower does not,": left,
        "has in another shape": report["mismatched_keys"],
    }
    found = [f"{fault} {_named(names)}" for fault, names in faults.items() if names]
    if found:
        cause = f": set {table_sizes}" if report["mismatched_keys"] and table_sizes else ""
        raise ConfigError(f"{key}.pretrained={tower.pretrained} {', '.join(found)}{cause}")
    return cast(PreTrainedModel, body.train())


def _named(names: list[str]) -> str:
    names = sorted(names)
    return " ".join(names[:NUM_NAMED]) + f" and {len(names) - NUM_NAMED} more" * (len(names) > NUM_NAMED)
