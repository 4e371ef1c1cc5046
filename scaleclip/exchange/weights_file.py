"""Files of weights that open_clip and OpenAI write: safetensors, state dicts, training checkpoints, TorchScript archives."""

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from scaleclip.errors import ConfigError
from scaleclip.exchange.weights import Weights, in_memory, in_safetensors

# what DistributedDataParallel and torch.compile put before names
_WRAPPERS = ("module.", "_orig_mod.")
# constants that OpenAI stored beside its weights
_OPENAI = "input_resolution"


class WeightsFile(NamedTuple):
    """What a file holds."""

    weights: Weights
    is_openai: bool
    """Whether OpenAI made it, whose models have the quick GELU."""


def read_weights_file(path: Path) -> WeightsFile:
    """The tensors of a file, by name, mapped into memory where the format allows.

    Nothing in the file is run: `torch.load` reads with `weights_only`, and a TorchScript archive, OpenAI's form, goes through
    `torch.jit.load` on the CPU, whose programs know tensors only, and is not called.

    Raises:
        ConfigError: it cannot be read, or holds no tensors by name.
    """
    if path.suffix == ".safetensors":
        try:
            return WeightsFile(in_safetensors([path]), is_openai=False)
        except SafetensorError as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
    if _is_torchscript(path):
        load: Any = torch.jit.load  # without types
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the format is on its way out, and OpenAI's files are in it
            state: Any = load(path, map_location="cpu").state_dict()
        return WeightsFile(in_memory(state), is_openai=True)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{path} cannot be read safely: {error}; save its state dict alone, as safetensors") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]  # a training checkpoint, whose optimizer stays on the disk
    tensors = {name: each for name, each in state.items() if isinstance(each, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise ConfigError(f"{path} holds no weights by name")
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): each for name, each in tensors.items()}
    return WeightsFile(in_memory(tensors), is_openai=_OPENAI in tensors)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())
