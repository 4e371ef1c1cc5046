"""Whether a loss and its gradients are right: against fp64, and no worse than plain torch in the same dtype.

Shapes: N pairs, over all ranks unless said otherwise; D feature dims.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from loss_bench.points import Comparison, Errors, Kind
from scaleclip_kernels import sigmoid_contrastive_loss, softmax_contrastive_loss

if TYPE_CHECKING:
    from loss_bench.implementations import Loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# More than one panel in each direction, and the last of them not full.
_MOST_PAIRS = 1056
_LOGIT_BIAS = -10.0

_ALLOWED = 5.0
"""times plain torch's error"""
# Plus a few roundings, as plain torch can be right by luck; scalars cancel, and one number is luckier than a norm.
_TENSOR_SLACK = {"fp32": 1e-6, "bf16": 8e-3, "fp16": 1e-3}
_SCALAR_SLACK = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 4e-3}


class Inputs(NamedTuple):
    """Leaves of the graph."""

    x_ND: Tensor
    y_ND: Tensor
    scale: Tensor
    bias: Tensor | None

    def gradients(self) -> "Gradients":
        return Gradients(*(None if leaf is None or leaf.grad is None else leaf.grad.double() for leaf in self))


class Gradients(NamedTuple):
    """In fp64."""

    x_ND: Tensor | None
    y_ND: Tensor | None
    scale: Tensor | None
    bias: Tensor | None


class Step(NamedTuple):
    """One loss and its gradients, in fp64."""

    loss: Tensor
    gradients: Gradients


def make_inputs(comparison: Comparison, kind: Kind, num_pairs: int, seed: int, device: torch.device) -> Inputs:
    """Unit features, every second pair correlated: the same for the same seed."""
    random = torch.Generator(device).manual_seed(seed)
    x_ND, y_ND = (torch.randn(num_pairs, comparison.dim, generator=random, device=device) for _ in range(2))
    y_ND[::2] += x_ND[::2]
    dtype = DTYPES[comparison.dtype]
    x_ND, y_ND = (normalize(features).to(dtype).requires_grad_() for features in (x_ND, y_ND))
    scale = torch.tensor(comparison.scale, device=device, requires_grad=True)
    bias = torch.tensor(_LOGIT_BIAS, device=device, requires_grad=True) if kind == "sigmoid" else None
    return Inputs(x_ND, y_ND, scale, bias)


def check_size(comparison: Comparison) -> int:
    """Pairs over all ranks of the batch that is checked."""
    most = min(comparison.batch, max(_MOST_PAIRS, comparison.world))
    return most - most % comparison.world


def take(inputs: Inputs, pairs: slice = slice(None), dtype: torch.dtype | None = None) -> Inputs:
    """Some of the pairs as leaves of their own, in `dtype` where one is given (scale and bias then too)."""
    scalars = [None if s is None else s.detach().to(dtype or s.dtype).clone().requires_grad_() for s in inputs[2:]]
    features = [f[pairs].detach().to(dtype or f.dtype).clone().requires_grad_() for f in (inputs.x_ND, inputs.y_ND)]
    assert scalars[0] is not None, "every loss has a scale"
    return Inputs(features[0], features[1], scalars[0], scalars[1])


def run_step(loss: "Loss", inputs: Inputs) -> Step:
    value = loss(*inputs)
    value.backward()  # type: ignore[no-untyped-call]
    return Step(value.detach().double(), inputs.gradients())


def truth_of(kind: Kind, inputs: Inputs) -> Step:
    """In fp64, by the definition."""

    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        if kind == "sigmoid":
            return sigmoid_contrastive_loss(x, y, scale, bias, backend="reference")
        return softmax_contrastive_loss(x, y, scale, backend="reference")

    return run_step(loss, take(inputs, dtype=torch.float64))


def plain_torch(kind: Kind, comparison: Comparison) -> "Loss":
    """The loss as one writes it, under autocast in 16 bits: what a kernel's error is measured by."""

    def loss(x_ND: Tensor, y_ND: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        logits_NN = scale * x_ND @ y_ND.T
        if bias is not None:
            sign_NN = 2 * torch.eye(len(x_ND), device=x_ND.device) - 1
            return -logsigmoid(sign_NN * (logits_NN + bias)).sum() / len(x_ND)
        labels_N = torch.arange(len(x_ND), device=x_ND.device)
        return (cross_entropy(logits_NN, labels_N) + cross_entropy(logits_NN.T, labels_N)) / 2

    def under_autocast(*inputs: Tensor | None) -> Tensor:
        dtype = DTYPES[comparison.dtype]
        with torch.autocast(comparison.device, dtype=dtype, enabled=dtype != torch.float32):
            return loss(*inputs)  # type: ignore[arg-type]

    return under_autocast


def over_ranks(steps: Sequence[Step], feature_factor: float) -> Step:
    """The global step from every rank's: features side by side, scalars as the trainer's mean over ranks makes them."""
    gradients: list[Tensor | None] = []
    for field, parts in enumerate(zip(*(step.gradients for step in steps), strict=True)):
        there = [part for part in parts if part is not None]
        if len(there) < len(parts):
            gradients.append(None)
        else:
            gradients.append(torch.cat(there) / feature_factor if field < 2 else torch.stack(there).mean())
    return Step(torch.stack([step.loss for step in steps]).mean(), Gradients(*gradients))


def errors(step: Step, truth: Step) -> Errors:
    """A gradient that is missing has an error of 1, as if it were 0."""
    loss = _relative(step.loss, truth.loss)
    found = [
        None if true is None else _relative(torch.zeros_like(true) if mine is None else mine, true)
        for mine, true in zip(step.gradients, truth.gradients, strict=True)
    ]
    x, y, scale, bias = found
    if x is None or y is None or scale is None:
        raise AssertionError("the truth has every gradient")
    return Errors(loss, x, y, scale, bias)


def faults(found: Errors, plain: Errors, dtype: str) -> list[str]:
    """What is wrong, in words; empty if nothing is."""
    messages = []
    for name, error in asdict(found).items():
        if error is None:
            continue
        slack = (_TENSOR_SLACK if name in ("x", "y") else _SCALAR_SLACK)[dtype]
        allowed = _ALLOWED * asdict(plain)[name] + slack
        if not error <= allowed:  # NaN is wrong too
            what = "loss" if name == "loss" else f"gradient of {name}"
            messages.append(f"{what} is off by {error:.1e}, allowed {allowed:.1e}")
    return messages


def _relative(value: Tensor, truth: Tensor) -> float:
    if value.shape != truth.shape:
        return math.inf
    return float((value - truth).norm() / truth.norm())
