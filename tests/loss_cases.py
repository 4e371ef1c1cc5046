"""Inputs for the tests of the losses, and the error budget: twice the error of plain torch, plus two units of rounding.

Shapes: N pairs, V views, M columns, D feature dims.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from scaleclip_kernels import panels, sigmoid_contrastive_loss, softmax_contrastive_loss

REGIMES = ("random", "gap", "low", "hot")
DUPLICATES = ("negative", "ignore", "positive")
SOFTMAX_WEIGHTS = ((0.5, 0.5), (1.0, 0.0), (0.0, 1.0), (0.3, 0.9))
NUM_DRAWS = 6
TINY_PANELS = (32, 48)

Loss = Callable[..., Tensor]


class Result(NamedTuple):
    """A loss and its gradients; softmax has no bias, whose gradient is then 0."""

    loss: Tensor
    x: Tensor
    y: Tensor
    logit_scale: Tensor
    logit_bias: Tensor


def features(regime: str, num_pairs: int, dim: int, seed: int = 0, *, views: int = 1, extras: int = 0) -> tuple[Tensor, Tensor]:
    """Unit-length fp32 x [N, D] and y [V N + extras, D].

    "random"; "gap": the modalities far apart but for two pairs; "low": nearly solved; "hot": the modalities far apart, and
    one row and one column near everything of the other side.
    """
    generator = torch.Generator().manual_seed(seed)
    num_columns = views * num_pairs + extras
    x, y, axis = (normalize(torch.randn(n, dim, generator=generator)) for n in (num_pairs, num_columns, 1))
    if regime == "low":
        x = x + 2 * axis
        y[: views * num_pairs] = x.repeat(views, 1) + 0.1 * y[: views * num_pairs]
    if regime in ("gap", "hot"):
        x, y = x + 3 * axis, y - 3 * axis
    if regime == "gap":
        y[:2] = x[:2]
    if regime == "hot":
        x[num_pairs // 2 : num_pairs // 2 + 1] -= 6 * axis
        y[num_columns // 3 : num_columns // 3 + 1] += 6 * axis
    return normalize(x), normalize(y)


def evaluate(function: Loss, x: Tensor, y: Tensor, scale: float, bias: float | None = None, **options: Any) -> Result:
    """The loss and every gradient for leaves made of x and y, with scalars in fp32, or in fp64 for fp64 features."""
    x, y = (t.detach().clone().requires_grad_() for t in (x, y))
    scalar_dtype = torch.promote_types(x.dtype, torch.float32)
    # rounded to fp32 first, so that all dtypes are given the same number
    scalars = [torch.tensor(value).to(scalar_dtype).requires_grad_() for value in (scale, bias) if value is not None]
    loss = function(x, y, *scalars, **options)
    loss.backward()
    assert loss.shape == ()
    assert (x.grad.dtype, y.grad.dtype) == (x.dtype, y.dtype)
    gradients = [t.grad for t in (x, y, *scalars)]
    return Result(loss.detach(), *gradients, *([torch.zeros(())] if bias is None else []))


def set_panels(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int]) -> None:
    monkeypatch.setattr(panels, "PANEL_ROWS", sizes[0])
    monkeypatch.setattr(panels, "PANEL_COLUMNS", sizes[1])


def assert_within_budget(
    function: Loss,
    regime: str,
    num_pairs: int,
    dim: int,
    scale: float,
    bias: float | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    extras: int = 0,
    **options: Any,
) -> None:
    """Largest errors of panels and of plain torch, averaged over draws: one draw's scalar can be right by chance.

    The truth is fp64 arithmetic on the features as the compute dtype rounds them.
    """
    our_errors, plain_errors, slack = torch.zeros(3, len(Result._fields), dtype=torch.float64)
    for seed in range(NUM_DRAWS):
        x, y = (t.to(dtype) for t in features(regime, num_pairs, dim, seed, views=options.get("views", 1), extras=extras))
        rounded_x, rounded_y = (t.to(compute_dtype or dtype) for t in (x, y))
        plain_options = {"backend": "reference", **options}
        truth = evaluate(function, rounded_x.double(), rounded_y.double(), scale, bias, **plain_options)
        plain = evaluate(function, x, y, scale, bias, compute_dtype=compute_dtype, **plain_options)
        in_fp32 = evaluate(function, rounded_x.float(), rounded_y.float(), scale, bias, **plain_options)
        ours = evaluate(function, x, y, scale, bias, compute_dtype=compute_dtype, backend="panels", **options)
        for i, (name, true, theirs, got) in enumerate(zip(Result._fields, truth, plain, ours, strict=True)):
            assert got.dtype == theirs.dtype
            assert got.isfinite().all(), name
            if true.numel() == 0:
                continue
            plain_error, size = (theirs - true).abs().max(), true.abs().max()
            if name == "logit_scale":
                # <dx, x> / scale, without a pass of its own over the logits, has what rounding there is in dx
                from_x = (in_fp32.x.double() * rounded_x.double()).nan_to_num().sum() / scale
                plain_error = torch.maximum(plain_error, (from_x - true).abs())
            if name == "logit_bias":
                size = size.clamp(min=1)  # a sum of terms up to 1, which cancel
            plain_errors[i] += plain_error / NUM_DRAWS
            our_errors[i] += (got - true).abs().max() / NUM_DRAWS
            # what lies below the smallest normal number may be taken for 0
            slack[i] += 2 * (torch.finfo(got.dtype).eps * size + max(scale, 1) * torch.finfo(torch.float32).tiny) / NUM_DRAWS
    for name, *errors in zip(Result._fields, our_errors, plain_errors, slack, strict=True):
        assert errors[0] <= 2 * errors[1] + errors[2], "{}: ours {:.2e}, plain {:.2e}, slack {:.2e}".format(name, *errors)


@dataclass(frozen=True)
class Case:
    """One random choice of everything that a loss can be given."""

    num_pairs: int
    dim: int
    regime: str
    scale: float
    bias: float | None
    panel_sizes: tuple[int, int]
    dtype: torch.dtype
    options: dict[str, Any] = field(repr=False)
    shown: str = ""

    def check(self, function: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
        set_panels(monkeypatch, self.panel_sizes)
        inputs = (self.regime, self.num_pairs, self.dim, self.scale, self.bias)
        assert_within_budget(function, *inputs, dtype=self.dtype, **self.options)


def random_case(loss: str, seed: int) -> Case:
    """Every option by chance; about one case in five in low precision."""
    choice = random.Random(f"{loss} {seed}")
    generator = torch.Generator().manual_seed(choice.getrandbits(32))
    num_pairs = choice.choice([1, 2, choice.randint(3, 70), choice.randint(3, 300), choice.randint(3, 300)])
    views, extras = choice.choice([(1, 0), (1, 0), (2, 0), (3, 0), (1, choice.randint(1, 200))])
    num_columns = views * num_pairs + extras

    def mask(size: int) -> Tensor | None:
        share = choice.choice([None, None, 0.0, 0.5, 0.9])
        return None if share is None else torch.rand(size, generator=generator) < share

    duplicates = choice.choice(DUPLICATES)
    num_ids = max(1, num_pairs // choice.choice([1, 2, 10]))
    ids = torch.randint(num_ids, (num_pairs,), generator=generator)
    column_ids = torch.randint(num_ids, (num_columns,), generator=generator) if extras or choice.random() < 0.3 else None
    options: dict[str, Any] = {
        "valid": mask(num_pairs),
        "column_valid": mask(num_columns),
        "ids": ids,
        "column_ids": column_ids,
        "duplicates": duplicates,
        "views": views,
        "extras": extras,
    }
    if loss == "softmax":
        options["weights"] = choice.choice(SOFTMAX_WEIGHTS)
    dtype, compute_dtype = choice.choice(
        [(torch.float32, None)] * 8 + [(torch.bfloat16, None), (torch.float16, None), (torch.float32, torch.bfloat16)]
    )
    options["compute_dtype"] = compute_dtype
    shown = f"{duplicates=} {views=} {extras=}"
    return Case(
        num_pairs,
        choice.choice([8, 64, 100, 640, 1152]),
        choice.choice(REGIMES),
        choice.choice([1.0, 14.3, 50.0, 100.0]),
        None if loss == "softmax" else choice.choice([0.0, -10.0, 3.0]),
        choice.choice([TINY_PANELS, (7, 300), (300, 7), (64, 64), (1024, 1024)]),
        dtype,
        options,
        shown,
    )


FUNCTIONS: dict[str, Loss] = {"softmax": softmax_contrastive_loss, "sigmoid": sigmoid_contrastive_loss}
