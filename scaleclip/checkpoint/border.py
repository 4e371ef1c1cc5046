"""Fills a model from a checkpoint of the stage before, whose model may have had other positions and other parts.

N: elements of a parameter that are on this rank.
"""

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from scaleclip.checkpoint.loading import Reader, read_scalars
from scaleclip.checkpoint.rank_file import Piece
from scaleclip.checkpoint.shard import Fragment, Shard

Fit = Callable[[str, Tensor, tuple[int, ...]], Tensor | None]

_ADAM_STEP, _SQUARES = "adam_step", "exp_avg_sq"
_MOST_NAMES = 3


class Border(NamedTuple):
    """Where a stage goes on with the weights of the one before."""

    step: int
    """Optimizer steps of the run there: only a checkpoint of just this step is one of the stage before."""
    keeps_optimizer: bool
    """Whether moments and AdamW's step counter are taken over; otherwise they are 0."""
    fit: Fit
    """(name, whole parameter or moment, fp32 on the CPU, another shape) -> it in that shape; None where that cannot be done."""


class Changes(NamedTuple):
    """What became of parameters at a border, by name."""

    present: frozenset[str] = frozenset()
    """That the model has."""
    resized: frozenset[str] = frozenset()
    """That the checkpoint has with another shape."""
    fresh: frozenset[str] = frozenset()
    """That the checkpoint lacks."""
    new_moments: frozenset[str] = frozenset()
    """That begin without moments though those of others are kept: they were locked, or their moments do not fit."""

    def told(self, stored: Iterable[str]) -> str:
        """In words; `stored` are the names in the checkpoint."""
        told = {
            "resized": self.resized,
            "left fresh": self.fresh,
            "without moments so far": self.new_moments,
            "dropped": set(stored) - self.present,
        }
        return "; ".join(f"{what}: {_listed(names)}" for what, names in told.items() if names) or "same parameters"


def merge(parts: Iterable[Changes]) -> Changes:
    """What all ranks found."""
    return Changes(*(frozenset[str]().union(*names) for names in zip(*parts, strict=True)))


def fill_across(
    shard: Shard, path: Path, pieces: Mapping[str, Sequence[Piece]], border: Border, fresh: MutableMapping[str, Tensor]
) -> Changes:
    """Write what the checkpoint of the stage before has into a rank's state, in place.

    Memory: one whole parameter that is resized at a time.

    Args:
        shard: the rank's; weights that the checkpoint lacks are left as they are.
        path: of the checkpoint.
        pieces: what each of its files holds.
        border: how.
        fresh: copies of what is left as it is, made the first time; later, with weights that were trained, put back.

    Raises:
        RunError: a shape differs and `border.fit` returns None, or elements are missing.
    """
    resized, left, new_moments = set[str](), set[str](), set[str]()
    with ExitStack() as stack:
        reader = Reader(path, pieces, stack)
        for fragment in shard.fragments:
            name, shape = fragment.name, reader.shape(fragment.name)
            if shape is None:
                left.add(name)
                _keep(fresh, name, fragment.tensors["weight"])
            elif shape != fragment.shape:
                resized.add(name)
                if not _resize(reader, fragment, "weight", border.fit):
                    raise reader.misshapen(name, fragment.shape)
            else:
                reader.read(name, shape, "weight", fragment.start, fragment.tensors["weight"])
            for kind in fragment.tensors.keys() - {"weight"}:
                if not (border.keeps_optimizer and _take_moment(reader, fragment, kind, border.fit)):
                    fragment.tensors[kind].zero_()
                    if border.keeps_optimizer and shape is not None:
                        new_moments.add(name)
    _fill_scalars(shard.scalars, path, border, fresh)
    present = frozenset(fragment.name for fragment in shard.fragments)
    return Changes(present, frozenset(resized), frozenset(left), frozenset(new_moments))


def _take_moment(reader: Reader, fragment: Fragment, kind: str, fit: Fit) -> bool:
    """Whether the checkpoint has the moment in a shape that fits; then it is written."""
    name, target_N = fragment.name, fragment.tensors[kind]
    if not reader.has(name, kind):
        return False
    if reader.shape(name) == fragment.shape:
        reader.read(name, fragment.shape, kind, fragment.start, target_N)
        return True
    is_taken = _resize(reader, fragment, kind, fit)
    if kind == _SQUARES:
        target_N.clamp_(min=0)  # interpolation may overshoot, and AdamW takes the root
    return is_taken


def _resize(reader: Reader, fragment: Fragment, kind: str, fit: Fit) -> bool:
    """Write this rank's slice of the whole, resized; False where `fit` cannot."""
    if not fragment.length:
        return True
    whole = fit(fragment.name, reader.whole(fragment.name, kind), fragment.shape)
    if whole is None:
        return False
    assert whole.shape == fragment.shape, f"{fragment.name} was resized to {tuple(whole.shape)}"
    fragment.tensors[kind].copy_(whole.flatten()[fragment.start : fragment.start + fragment.length])
    return True


def _fill_scalars(scalars: Mapping[str, Tensor], path: Path, border: Border, fresh: MutableMapping[str, Tensor]) -> None:
    found = read_scalars(path)
    for name, scalar in scalars.items():
        if name == _ADAM_STEP and not border.keeps_optimizer:
            scalar.zero_()
        elif name in found:
            scalar.copy_(found[name])
        else:  # fp16's, where the stage before had another precision
            _keep(fresh, name, scalar)


def _keep(fresh: MutableMapping[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in fresh:
        tensor.copy_(fresh[name])
    else:
        fresh[name] = tensor.detach().to("cpu", copy=True)


def _listed(names: Iterable[str]) -> str:
    first = sorted(names)
    more = f" and {len(first) - _MOST_NAMES} more" if len(first) > _MOST_NAMES else ""
    return ", ".join(first[:_MOST_NAMES]) + more
