"""Tensors by name, each read when it is asked for: a model that is converted is never in memory as a whole.

The format of safetensors (https://github.com/huggingface/safetensors#format) is the header's length in 8 bytes, the header as
JSON and the tensors' bytes. The library writes from tensors that are all there; here each is made, written and dropped.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from scaleclip.checkpoint.loading import Reader, rank_files
from scaleclip.checkpoint.rank_file import read_pieces

# as the format names them; what is not a number with a point keeps its type
_NAMES = {
    torch.float32: "F32", torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64",
}  # fmt: skip
_TYPES = {name: dtype for dtype, name in _NAMES.items()}


class Weights(NamedTuple):
    """Tensors of a model by name.

    Half precision is read as fp32, which holds each of its values: what is computed and written here is fp32, whoever trained.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    """A whole tensor on the CPU."""
    dtypes: Mapping[str, torch.dtype] = {}
    """Of those that are not fp32: counters and indices, which some towers keep beside their parameters."""

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor as it is read."""
        return self.dtypes.get(name, torch.float32)

    def num_bytes(self) -> int:
        """Of all tensors as they are read."""
        return sum(math.prod(shape) * self.dtype(name).itemsize for name, shape in self.shapes.items())

    def with_constants(self, constants: Mapping[str, Tensor]) -> "Weights":
        """These and some more, which are in memory."""
        others = in_memory(constants)
        return Weights(
            {**self.shapes, **others.shapes},
            lambda name: others.read(name) if name in constants else self.read(name),
            {**self.dtypes, **others.dtypes},
        )


def in_memory(tensors: Mapping[str, Tensor]) -> Weights:
    """Tensors that are there already, or mapped from a file."""
    return Weights(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        lambda name: _plain(tensors[name]),
        {name: tensor.dtype for name, tensor in tensors.items() if not tensor.is_floating_point()},
    )


def in_safetensors(paths: Sequence[Path]) -> Weights:
    """Those of safetensors files, which stay open as long as this is in use.

    Raises:
        SafetensorError: a file is none.
    """
    files: list[Any] = [safe_open(path, "pt") for path in paths]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118  # the file is no mapping
    slices = {name: file.get_slice(name) for name, file in where.items()}
    types = {name: _TYPES.get(each.get_dtype(), torch.float32) for name, each in slices.items()}
    return Weights(
        {name: tuple(each.get_shape()) for name, each in slices.items()},
        lambda name: _plain(where[name].get_tensor(name)),
        {name: dtype for name, dtype in types.items() if not dtype.is_floating_point},
    )


def in_checkpoint(path: Path) -> Weights:
    """The fp32 parameters of a run's checkpoint whose checksums hold, however its ranks sharded them.

    Raises:
        RunError: when reading: elements of a parameter are missing.
    """
    pieces = {name: read_pieces(path / name) for name in rank_files(path)}
    reader = Reader(path, pieces, ExitStack())
    return Weights(
        {piece.name: piece.shape for file in pieces.values() for piece in file}, lambda name: reader.whole(name, "weight")
    )


def write_safetensors(path: Path, weights: Weights, done: Callable[[int], object] = lambda size: None) -> None:
    """Write a file, one tensor after the other; `done` is told the bytes of each.

    Raises:
        OSError: it cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in weights.shapes.items():
        dtype = weights.dtype(name)
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors' bytes begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in weights.shapes.items():
            tensor = weights.read(name).detach().contiguous()
            found, said = (tuple(tensor.shape), tensor.dtype), (shape, weights.dtype(name))
            assert found == said, f"{name}: {found}, said to be {said}"
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            done(tensor.nbytes)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
