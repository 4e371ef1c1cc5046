"""Reads any fragment from a checkpoint's files, wherever the ranks that saved it put its elements.

N: elements of a part of a flattened parameter.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from scaleclip.checkpoint.folders import read_checksums
from scaleclip.checkpoint.rank_file import Piece, rank_file, read_pieces
from scaleclip.checkpoint.shard import Shard
from scaleclip.errors import RunError

SCALARS = "scalars.safetensors"


def rank_files(path: Path) -> list[str]:
    """Names of the ranks' files of a checkpoint whose checksums hold."""
    names = set(read_checksums(path))
    return [name for rank in range(len(names)) if (name := rank_file(rank)) in names]


def fill(shard: Shard, path: Path, pieces: Mapping[str, Sequence[Piece]]) -> None:
    """Write a checkpoint's values into a rank's state, in place. `pieces`: what each of its files holds.

    Raises:
        RunError: the checkpoint lacks a parameter or some of its elements, or has it with another shape.
    """
    with ExitStack() as stack:
        reader = Reader(path, pieces, stack)
        for fragment in shard.fragments:
            for kind, tensor_N in fragment.tensors.items():
                reader.read(fragment.name, fragment.shape, kind, fragment.start, tensor_N)
    _fill_scalars(shard.scalars, path)


def load_weights(path: Path) -> dict[str, Tensor]:
    """The whole fp32 parameters of a checkpoint whose checksums hold, by name, on the CPU.

    Raises:
        RunError: elements of a parameter are missing.
    """
    pieces = {name: read_pieces(path / name) for name in rank_files(path)}
    shapes = {piece.name: piece.shape for file in pieces.values() for piece in file}
    weights = {name: torch.empty(shape) for name, shape in shapes.items()}
    with ExitStack() as stack:
        reader = Reader(path, pieces, stack)
        for name, weight in weights.items():
            reader.read(name, shapes[name], "weight", 0, weight.view(-1))
    return weights


def read_scalars(path: Path) -> dict[str, Tensor]:
    """The small tensors that ranks hold alike."""
    found: dict[str, Tensor] = safetensors.torch.load_file(path / SCALARS)
    return found


class Reader:
    """Files of a checkpoint, opened when they are needed and closed by `stack`."""

    def __init__(self, path: Path, pieces: Mapping[str, Iterable[Piece]], stack: ExitStack) -> None:
        self._path, self._stack = path, stack
        self._files: dict[str, Any] = {}
        self._stored: dict[str, list[tuple[Piece, str]]] = defaultdict(list)
        for file, held in pieces.items():
            for piece in held:
                self._stored[piece.name].append((piece, file))
        for stored in self._stored.values():
            stored.sort(key=lambda entry: entry[0].start)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a whole parameter; None if the checkpoint has no such one."""
        stored = self._stored.get(name)
        return stored[0][0].shape if stored else None

    def has(self, name: str, kind: str) -> bool:
        """Whether any file has a `kind` of the parameter: a moment is there where it learned."""
        return any(kind in piece.kinds for piece, _ in self._stored.get(name, []))

    def whole(self, name: str, kind: str) -> Tensor:
        """A whole parameter that the checkpoint has, or a moment of it, fp32 on the CPU."""
        shape = self._stored[name][0][0].shape
        whole = torch.empty(shape)
        self.read(name, shape, kind, 0, whole.view(-1))
        return whole

    def read(self, name: str, shape: tuple[int, ...], kind: str, start: int, target_N: Tensor) -> None:
        """Copy elements `start` to `start` + N of a flattened parameter, or of its optimizer state, to `target_N`."""
        stored = self._stored.get(name, [])
        if not stored:
            raise self._misfit(f"has no parameter {name}")
        if stored[0][0].shape != shape:
            raise self.misshapen(name, shape)
        end = start + len(target_N)
        assert end <= math.prod(shape) or start == end, f"{name} has no elements {start} to {end}"
        for piece, file in stored:
            if start < end and piece.start <= start < piece.end and kind in piece.kinds:
                stop = min(piece.end, end)
                found_N = self._open(file).get_slice(piece.key(kind))[start - piece.start : stop - piece.start]
                target_N[len(target_N) - (end - start) :][: stop - start].copy_(found_N)
                start = stop
        if start < end:
            raise self._misfit(f"lacks {kind} of {name} from element {start:,} on")

    def misshapen(self, name: str, shape: tuple[int, ...]) -> RunError:
        """The error of a parameter that the model has with `shape`, and the checkpoint with another."""
        return self._misfit(f"has {name} with shape {self.shape(name)}, this model with {shape}")

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = self._stack.enter_context(safe_open(self._path / file, "pt"))
        return self._files[file]

    def _misfit(self, what: str) -> RunError:
        return _misfit(self._path, what)


def _fill_scalars(scalars: Mapping[str, Tensor], path: Path) -> None:
    found = read_scalars(path)
    for name, scalar in scalars.items():
        if name not in found or found[name].shape != scalar.shape:
            raise _misfit(path, f"has no {name} of shape {tuple(scalar.shape)}")
        scalar.copy_(found[name])


def _misfit(path: Path, what: str) -> RunError:
    return RunError(
        f"{path} {what}: it was saved with other model or train settings, or by another version of scaleclip; go on with "
        f"those, or start in another run.folder"
    )
