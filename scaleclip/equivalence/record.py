"""What was seen of a run's first steps, and how far two such records are apart."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Traffic(NamedTuple):
    """Bytes that a rank handed to DeepSpeed's collectives in one optimizer step."""

    reduced_bytes: int
    gathered_bytes: int


class Record(NamedTuple):
    """Steps of a run."""

    losses: list[float]
    """By step."""
    gradients: list[dict[str, Tensor]]
    """By step: the mean over the global batch, before clipping, of every parameter that learns."""
    parameters: dict[str, Tensor]
    """After the last step."""
    traffic: list[Traffic]
    """By step; none of a process alone."""


class Differences(NamedTuple):
    """How far a record is from the true one. NaN where one of the two has it."""

    loss: float
    """The largest |difference| / |loss| of all steps."""
    gradients: list[float]
    """By step: the largest |difference| over all parameters / the largest |gradient| of all parameters."""
    parameters: float
    """The largest |difference| / learning rate of all elements, each weighed by its |gradient| / the largest |gradient|.

    AdamW's first steps move an element by the learning rate in its gradient's direction, however small the gradient is: one
    that is nothing but rounding (a key's bias) goes anywhere. An error of x in a gradient moves an element by about
    x / |gradient| learning rates, so that the weight, the smallest of all steps, makes this of the size of `gradients`.
    Two units in the last place of the element a step are left out: decaying it and adding the step round as much.
    """
    worst_parameter: str
    """The one whose gradient differs most."""


def differences(record: Record, truth: Record, lr: float) -> Differences:
    """How far `record` is from `truth`, of which both took their steps with learning rate `lr`."""
    losses = torch.tensor([record.losses, truth.losses], dtype=torch.float64)
    largest = [_largest(gradients) for gradients in truth.gradients]
    by_step = [
        {name: float((found[name] - true[name]).abs().max() / top) for name in true}
        for found, true, top in zip(record.gradients, truth.gradients, largest, strict=True)
    ]
    moved = []
    for name in truth.gradients[0]:
        weights = [true[name].abs() / top for true, top in zip(truth.gradients, largest, strict=True)]
        rounding = 2 * len(truth.losses) * torch.finfo(torch.float32).eps * truth.parameters[name].abs()
        beyond = ((record.parameters[name] - truth.parameters[name]).abs() - rounding).clamp(min=0)
        moved.append((beyond / lr * torch.stack(weights).amin(0)).max())
    return Differences(
        float(((losses[0] - losses[1]).abs() / losses[1].abs()).max()),
        [_max(list(step.values())) for step in by_step],
        float(torch.stack(moved).max()),
        max(truth.gradients[0], key=lambda name: _with_nan_last([step[name] for step in by_step])),
    )


def furthest(found: Sequence[Differences]) -> Differences:
    """The largest of each figure, with the worst parameter of the one whose gradients are furthest away."""
    worst = max(found, key=lambda each: _with_nan_last(each.gradients))
    return Differences(
        _max([each.loss for each in found]),
        [_max(step) for step in zip(*(each.gradients for each in found), strict=True)],
        _max([each.parameters for each in found]),
        worst.worst_parameter,
    )


def _largest(gradients: dict[str, Tensor]) -> Tensor:
    return torch.stack([gradient.abs().max() for gradient in gradients.values()]).max()


def _max(values: Sequence[float]) -> float:
    # Python's own max may pass over a NaN
    return float(torch.tensor(values, dtype=torch.float64).max())


def _with_nan_last(values: Sequence[float]) -> float:
    return float(torch.tensor(values).nan_to_num(torch.inf).max())
