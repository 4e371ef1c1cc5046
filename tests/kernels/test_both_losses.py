"""What the softmax and the sigmoid loss promise alike: invalid features, dtypes, gradients wanted, memory, user faults.

Shapes: N pairs, M columns, D feature dims.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loss_cases import DUPLICATES, LOSSES, TINY_PANELS, Result, evaluate, features, set_panels
from scaleclip_kernels import arguments, gemm, triton_launch
from storage_tracker import StorageTracker

pytestmark = pytest.mark.parametrize("name", LOSSES)
BACKENDS = pytest.mark.parametrize("backend", ["panels", "triton", "reference"])
TILED = pytest.mark.parametrize("backend", ["panels", "triton"])


def arguments_of(name: str, scale: float) -> tuple[float, float | None]:
    """Scale and bias as `evaluate` takes them."""
    return (scale, None) if name == "softmax" else (scale, -2.0)


def scalars_of(name: str, **options: Any) -> list[Tensor]:
    return [torch.tensor(value, **options) for value in arguments_of(name, 14.3) if value is not None]


def assert_same(got: Result, expected: Result) -> None:
    for value, true in zip(got, expected, strict=True):
        assert torch.equal(value, true)


@BACKENDS
@pytest.mark.parametrize("duplicates", DUPLICATES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_invalid_pairs_are_as_if_absent(
    name: str, poison: float, duplicates: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_panels(monkeypatch, *TINY_PANELS)
    x, y = features("gap", 60, 32)
    # periods that no panel size is a multiple of
    ids, valid = torch.arange(60) % 25, torch.arange(60) % 7 != 1
    arguments, options = arguments_of(name, 100.0), {"duplicates": duplicates, "backend": backend}
    expected = evaluate(LOSSES[name], x[valid], y[valid], *arguments, ids=ids[valid], **options)
    x[~valid], y[~valid] = poison, poison
    got = evaluate(LOSSES[name], x, y, *arguments, ids=ids, valid=valid, **options)
    close = {"rtol": 1e-5, "atol": 1e-5}
    for value, true in ((got.loss, expected.loss), (got.logit_scale, expected.logit_scale)):
        torch.testing.assert_close(value, true, **close)
    for grad, true in ((got.x, expected.x), (got.y, expected.y)):
        torch.testing.assert_close(grad[valid], true, **close)
        assert (grad[~valid] == 0).all()


@BACKENDS
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_rows_and_columns_are_invalid_on_their_own(
    name: str, poison: float, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropping every invalid row and column, extra columns among them, leaves the same loss of the pairs that are whole."""
    set_panels(monkeypatch, *TINY_PANELS)
    x, y = features("random", 50, 32, extras=30)
    row_valid, column_valid = torch.arange(50) % 3 != 1, torch.arange(80) % 7 != 2
    whole = torch.arange(50)[row_valid & column_valid[:50]]
    lone_rows = torch.arange(50)[row_valid & ~column_valid[:50]]
    lone_columns = torch.arange(80)[column_valid & ~torch.nn.functional.pad(row_valid, (0, 30))]
    # what has lost its partner: rows with an invalid column each, and columns after all pairs
    kept_rows, kept_columns = torch.cat([whole, lone_rows]), torch.cat([whole, torch.zeros_like(lone_rows), lone_columns])
    kept_valid = torch.cat([torch.ones(len(whole)), torch.zeros(len(lone_rows)), torch.ones(len(lone_columns))]).bool()
    arguments = arguments_of(name, 14.3)
    expected = evaluate(LOSSES[name], x[kept_rows], y[kept_columns], *arguments, column_valid=kept_valid, backend="reference")
    x[~row_valid], y[~column_valid] = poison, poison
    got = evaluate(LOSSES[name], x, y, *arguments, valid=row_valid, column_valid=column_valid, backend=backend)
    torch.testing.assert_close(got.loss, expected.loss)
    # of gradients up to 1, each a sum of terms that may cancel
    torch.testing.assert_close(got.x[kept_rows], expected.x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.y[kept_columns[kept_valid]], expected.y[kept_valid], rtol=1e-5, atol=1e-6)
    assert (got.x[~row_valid] == 0).all()
    assert (got.y[~column_valid] == 0).all()


@BACKENDS
def test_nan_in_a_valid_row_is_not_hidden(name: str, backend: str) -> None:
    x, y = features("random", 20, 16)
    x[4, 3] = float("nan")
    assert LOSSES[name](x, y, *scalars_of(name), backend=backend).isnan()


@BACKENDS
def test_ids_play_no_part_when_duplicates_are_negative(name: str, backend: str) -> None:
    x, y = features("random", 40, 16)
    arguments, ids = arguments_of(name, 14.3), torch.zeros(40, dtype=torch.int64)
    with_ids = evaluate(LOSSES[name], x, y, *arguments, ids=ids, column_ids=ids, backend=backend)
    assert_same(with_ids, evaluate(LOSSES[name], x, y, *arguments, backend=backend))


def test_auto_is_panels(name: str) -> None:
    x, y = features("random", 40, 16)
    arguments = arguments_of(name, 14.3)
    assert_same(evaluate(LOSSES[name], x, y, *arguments), evaluate(LOSSES[name], x, y, *arguments, backend="panels"))


@TILED
def test_same_bits_every_time(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_panels(monkeypatch, *TINY_PANELS)
    x, y = features("random", 100, 64)
    arguments = arguments_of(name, 14.3)
    assert_same(
        evaluate(LOSSES[name], x, y, *arguments, backend=backend), evaluate(LOSSES[name], x, y, *arguments, backend=backend)
    )


@TILED
def test_masks_of_nothing_change_nothing(name: str, backend: str) -> None:
    x, y = features("random", 40, 16, extras=7)
    arguments, everything = arguments_of(name, 14.3), {"valid": torch.ones(40).bool(), "column_valid": torch.ones(47).bool()}
    assert_same(
        evaluate(LOSSES[name], x, y, *arguments, **everything, backend=backend),
        evaluate(LOSSES[name], x, y, *arguments, backend=backend),
    )


@BACKENDS
def test_no_features_at_all(name: str, backend: str) -> None:
    """D = 0: every logit is the bias."""
    x, y = torch.zeros(8, 0), torch.zeros(8, 0)
    got = evaluate(LOSSES[name], x, y, *arguments_of(name, 14.3), backend=backend)
    softplus = torch.nn.functional.softplus(torch.tensor([2.0, -2.0]))
    expected = torch.tensor(8.0).log() if name == "softmax" else softplus[0] + 7 * softplus[1]
    torch.testing.assert_close(got.loss, expected)
    assert got.logit_scale == 0


def test_non_contiguous_inputs(name: str) -> None:
    x, y = features("random", 100, 64)
    ids, valid = torch.arange(200) % 30, torch.arange(200) % 11 != 0
    arguments, labels = arguments_of(name, 14.3), {"ids": ids[::2].clone(), "valid": valid[::2].clone()}
    expected = evaluate(LOSSES[name], x, y, *arguments, **labels, duplicates="ignore")
    wide = torch.cat([x, y], dim=1).requires_grad_()
    transposed = y.T.contiguous().requires_grad_()
    scalars = [scalar.reshape(1) for scalar in scalars_of(name)]
    loss = LOSSES[name](wide[:, :64], transposed.T, *scalars, ids=ids[::2], valid=valid[::2], duplicates="ignore")
    loss.backward()
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(wide.grad, torch.cat([expected.x, torch.zeros_like(y)], dim=1), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(transposed.grad.T, expected.y, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("wanted", ["x", "y", "logit_scale", "logit_bias"])
@TILED
def test_partial_gradients(name: str, backend: str, wanted: str) -> None:
    if (name, wanted) == ("softmax", "logit_bias"):
        pytest.skip("softmax has no bias")
    x, y = features("random", 50, 16, views=2)
    ids = torch.arange(50) % 20
    options = {"views": 2, "ids": ids, "duplicates": "positive", "backend": backend}
    expected = evaluate(LOSSES[name], x, y, *arguments_of(name, 14.3), **options)
    inputs = dict(zip(("x", "y", "logit_scale", "logit_bias"), [x, y, *scalars_of(name)], strict=False))
    inputs[wanted].requires_grad_()
    LOSSES[name](*inputs.values(), **options).backward()
    for key, tensor in inputs.items():
        assert (tensor.grad is not None) == (key == wanted)
    torch.testing.assert_close(inputs[wanted].grad, getattr(expected, wanted))


@TILED
def test_no_gradient_wanted(name: str, backend: str) -> None:
    """Under no_grad, and for inputs that need none: the same loss, and nothing to differentiate."""
    x, y = features("random", 50, 16)
    expected = evaluate(LOSSES[name], x, y, *arguments_of(name, 14.3), backend=backend).loss
    loss = LOSSES[name](x, y, *scalars_of(name), backend=backend)
    assert loss == expected
    assert not loss.requires_grad
    with torch.no_grad():
        loss = LOSSES[name](x.requires_grad_(), y, *scalars_of(name), backend=backend)
    assert loss == expected
    assert not loss.requires_grad


@TILED
def test_upstream_gradient_and_zero_scale(name: str, backend: str) -> None:
    """The gradient of the scale is not taken from features' gradients that a scale of 0 has made 0."""
    x, y = features("random", 50, 16)
    expected = evaluate(LOSSES[name], x, y, *arguments_of(name, 0.0), backend="reference")
    x.requires_grad_()
    logit_scale = torch.tensor([0.0], requires_grad=True)
    (3 * LOSSES[name](x, y, logit_scale, *scalars_of(name)[1:], backend=backend)).backward()
    torch.testing.assert_close(x.grad, 3 * expected.x)
    torch.testing.assert_close(logit_scale.grad, 3 * expected.logit_scale.reshape(1))
    assert logit_scale.grad != 0


def test_fp64_scalars_get_fp64_gradients(name: str) -> None:
    x, y = features("random", 50, 16)
    scalars = scalars_of(name, dtype=torch.float64, requires_grad=True)
    LOSSES[name](x, y, *scalars).backward()
    expected = evaluate(LOSSES[name], x, y, *arguments_of(name, 14.3))
    for scalar, true in zip(scalars, expected[3:], strict=False):
        assert scalar.grad.dtype == torch.float64
        torch.testing.assert_close(scalar.grad.float(), true)


@TILED
def test_negative_scale(name: str, backend: str) -> None:
    x, y = features("random", 50, 16)
    expected = evaluate(LOSSES[name], x.double(), y.double(), *arguments_of(name, -14.3), backend="reference")
    for got, true in zip(evaluate(LOSSES[name], x, y, *arguments_of(name, -14.3), backend=backend), expected, strict=True):
        torch.testing.assert_close(got, true.float(), rtol=1e-5, atol=1e-6)


@TILED
def test_backward_twice_over_one_graph(name: str, backend: str) -> None:
    x, y = (t.requires_grad_() for t in features("random", 50, 16))
    loss = LOSSES[name](x, y, *scalars_of(name), backend=backend)
    first, second = (torch.autograd.grad(loss, (x, y), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@TILED
def test_differentiable_once_and_says_so(name: str, backend: str) -> None:
    x, y = (t.requires_grad_() for t in features("random", 10, 4))
    weighted = torch.ones((), requires_grad=True) * LOSSES[name](x, y, *scalars_of(name), backend=backend)
    (gradient,) = torch.autograd.grad(weighted, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_reference_gradients_by_finite_differences(name: str, duplicates: str) -> None:
    x, y = (t.double().requires_grad_() for t in features("random", 6, 4))
    scalars = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (3.0, -1.0)]
    ids, valid = torch.tensor([0, 1, 0, 2, 2, 0]), torch.tensor([True, True, True, False, True, True])

    def loss(*inputs: Tensor) -> Tensor:
        return LOSSES[name](*inputs, valid=valid, ids=ids, duplicates=duplicates, backend="reference")

    inputs = (x, y, *scalars[: 1 if name == "softmax" else 2])
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("duplicates", DUPLICATES)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_compute_dtype_is_a_cast_of_the_features(
    name: str, low: torch.dtype, duplicates: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of fp32 features: the loss of features cast beforehand, to the bit; gradients unrounded, in fp32."""
    set_panels(monkeypatch, *TINY_PANELS)
    x, y = features("random", 100, 64)
    arguments, options = arguments_of(name, 14.3), {"ids": torch.arange(100) % 40, "duplicates": duplicates}
    computed = evaluate(LOSSES[name], x, y, *arguments, compute_dtype=low, **options)
    cast = evaluate(LOSSES[name], x.to(low), y.to(low), *arguments, **options)
    widened = evaluate(LOSSES[name], x.to(low).float(), y.to(low).float(), *arguments, **options)
    assert computed.loss == cast.loss
    assert computed.loss != evaluate(LOSSES[name], x, y, *arguments, **options).loss
    for got, rounded, exact in zip(computed[1:3], cast[1:3], widened[1:3], strict=True):
        assert (got.dtype, rounded.dtype) == (torch.float32, low)
        assert torch.equal(got.to(low), rounded)
        assert torch.equal(got, exact)
    assert computed.logit_scale == cast.logit_scale
    assert computed.logit_bias == cast.logit_bias


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_compute_dtype_of_the_reference(name: str, low: torch.dtype) -> None:
    x, y = features("random", 100, 64)
    arguments = arguments_of(name, 14.3)
    expected = evaluate(LOSSES[name], x, y, *arguments, compute_dtype=low, backend="panels")
    got = evaluate(LOSSES[name], x, y, *arguments, compute_dtype=low, backend="reference")
    for value, true in zip(got, expected, strict=True):
        # autograd's cast back rounds the gradients of features to the compute dtype
        torch.testing.assert_close(value, true, rtol=torch.finfo(low).eps, atol=1e-6)


@TILED
def test_features_below_the_normal_numbers(name: str, backend: str) -> None:
    """fp32 numbers from 1e-38 down have fewer digits or are taken for 0: the logits are the bias either way."""
    x, y = features("random", 50, 16)
    got = evaluate(LOSSES[name], 1e-39 * x, y, *arguments_of(name, 100.0), backend=backend)
    expected = evaluate(LOSSES[name], 0 * x.double(), y.double(), *arguments_of(name, 100.0), backend="reference")
    for value, true in zip(got, expected, strict=True):
        torch.testing.assert_close(value, true.float(), rtol=1e-5, atol=1e-6)


@BACKENDS
def test_autocast_does_not_round_the_logits(name: str, backend: str) -> None:
    """Autocast would turn the fp32 matmuls of forward and backward into bf16 ones."""
    x, y = features("random", 50, 16)
    arguments = arguments_of(name, 100.0)
    expected = evaluate(LOSSES[name], x, y, *arguments, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = evaluate(LOSSES[name], x, y, *arguments, backend=backend)
    assert got.loss == expected.loss
    if backend != "reference":  # autograd's own backward of the reference follows the caller's autocast
        assert_same(got, expected)


def test_a_group_of_one_rank_is_no_group(name: str) -> None:
    x, y = features("random", 50, 16)
    arguments = arguments_of(name, 14.3)
    expected = evaluate(LOSSES[name], x, y, *arguments)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert_same(evaluate(LOSSES[name], x, y, *arguments, group=dist.group.WORLD, sizes=[50]), expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("views", "extras"), [(1, 0), (2, 0), (1, 512)])
def test_memory_is_far_below_the_logits(name: str, views: int, extras: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak of all live storages made by forward and backward, and the largest single one."""
    set_panels(monkeypatch, 512, 512)
    num_pairs, dim = 3072, 16
    x, y = (t.requires_grad_() for t in features("random", num_pairs, dim, views=views, extras=extras))
    scalars = scalars_of(name, requires_grad=True)
    ids = torch.arange(num_pairs) // 2
    options = {"views": views, "ids": ids, "duplicates": "positive", "valid": torch.ones(num_pairs, dtype=torch.bool)}
    options["column_ids"] = torch.arange(len(y)) // 2
    gemm.cpu_library(dim)  # its check, once a process, has a few panels of its own
    logits_bytes = 4 * num_pairs * len(y)
    with StorageTracker() as tracker:
        LOSSES[name](x, y, *scalars, **options, backend="panels").backward()
    assert 4 * 512 * 512 <= tracker.largest_bytes < logits_bytes / 16
    assert tracker.peak_bytes < logits_bytes / 4
    with StorageTracker() as tracker:  # the tracker does see what a dense implementation stores
        LOSSES[name](x, y, *scalars, **options, backend="reference").backward()
    assert tracker.largest_bytes >= logits_bytes / views
    assert tracker.peak_bytes >= 2 * logits_bytes / views


class CrossingsForbidden(TorchDispatchMode):
    """Raises where a tensor is copied between the host and a device: each such copy makes the host wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices_in, devices_out = (
            {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)} for tree in ((args, kwargs), out)
        )
        if devices_in and not devices_out <= devices_in:
            raise AssertionError(f"{func} copies from {devices_in} to {devices_out}")
        return out


@TILED
@pytest.mark.parametrize(("views", "extras"), [(1, 0), (2, 0), (1, 30)])
@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_device_is_never_waited_for(
    name: str, duplicates: str, views: int, extras: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward on a pretended GPU, whose tensors have no values: reading one on the host is an error."""
    set_panels(monkeypatch, *TINY_PANELS)
    num_pairs, num_columns = 70, 70 * views + extras
    with FakeTensorMode():
        cuda = {"device": "cuda"}
        x, y = (torch.randn(n, 16, dtype=torch.bfloat16, **cuda).requires_grad_() for n in (num_pairs, num_columns))
        scalars = [torch.ones((), **cuda).requires_grad_() for _ in scalars_of(name)]
        labels = {
            "valid": torch.ones(num_pairs, dtype=torch.bool, **cuda),
            "column_valid": torch.ones(num_columns, dtype=torch.bool, **cuda),
            "ids": torch.zeros(num_pairs, dtype=torch.int64, **cuda),
            "column_ids": torch.zeros(num_columns, dtype=torch.int64, **cuda),
        }
        with pytest.raises(DataDependentOutputException):  # what the losses must not do
            bool(labels["valid"].any())
        ones = torch.ones((), **cuda)
        with CrossingsForbidden():
            with pytest.raises(AssertionError, match="copies from"):
                ones.to("cpu")
            loss = LOSSES[name](x, y, *scalars, **labels, duplicates=duplicates, views=views, backend=backend)
            # the engine behind loss.backward() asks for a real device
            gradients = loss.grad_fn.apply(ones)
    assert (loss.device.type, loss.dtype, loss.shape) == ("cuda", torch.float32, ())
    for gradient, leaf in zip(gradients, [x, y, *scalars], strict=False):
        assert (gradient.device, gradient.dtype, gradient.shape) == (leaf.device, leaf.dtype, leaf.shape)


@TILED
def test_a_million_pairs_need_no_quadratic_tensor(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the pretended GPU: 10^12 logits, and nothing larger than a panel is ever made."""
    num_pairs, dim, panel = 1_000_000, 16, 1 << 17
    set_panels(monkeypatch, panel, panel)
    monkeypatch.setattr(triton_launch, "PARTIAL_BYTES", 1 << 33)
    with FakeTensorMode(), StorageTracker() as tracker:
        x, y = (torch.empty(num_pairs, dim, device="cuda").requires_grad_() for _ in range(2))
        scalars = [torch.ones((), device="cuda").requires_grad_() for _ in scalars_of(name)]
        ids = torch.empty(num_pairs, dtype=torch.int64, device="cuda")
        loss = LOSSES[name](x, y, *scalars, ids=ids, duplicates="ignore", backend=backend)
        gradients = loss.grad_fn.apply(torch.ones((), device="cuda"))
    assert gradients[0].shape == gradients[1].shape == (num_pairs, dim)
    assert tracker.largest_bytes == (2 if backend == "panels" else 1) * 4 * panel**2
    assert tracker.peak_bytes < 4 * num_pairs**2 / 10


def bad(dtype: torch.dtype = torch.float32, *shape: int) -> Tensor:
    return torch.zeros(shape or (4, 8), dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, r"backend='cuda' is not one of auto, triton, panels, reference"),
        ({"backend": "triton", "y_MD": bad(torch.float32, 3, 8)}, r"y has 3 columns for 4 pairs in views=1"),
        ({"fp32_precision": "tf32"}, r"fp32_precision='tf32' is not one of ieee, tf32x3"),
        ({"fp32_precision": "tf32x3"}, r"fp32_precision='tf32x3' is for tensor cores: backend='panels' on cpu has only 'ieee'"),
        ({"duplicates": "drop"}, r"duplicates='drop' is not one of negative, ignore, positive"),
        ({"schedule": "tree"}, r"schedule='tree' is not one of auto, ring, gather"),
        ({"duplicates": "ignore"}, r"duplicates='ignore' needs ids: pass ids of shape \(N,\)"),
        ({"duplicates": "positive"}, r"duplicates='positive' needs ids"),
        (
            {"duplicates": "positive", "y_MD": bad(torch.float32, 6, 8), "ids": bad(torch.int64, 4)},
            r"duplicates='positive' with 2 extra columns needs column_ids of shape \(M,\)",
        ),
        ({"x_ND": bad(torch.float32, 4)}, r"\(N, D\) and \(M, D\) with one D, got \(4,\) and \(4, 8\)"),
        ({"y_MD": bad(torch.float32, 4, 8, 1)}, r"\(N, D\) and \(M, D\) with one D, got \(4, 8\) and \(4, 8, 1\)"),
        ({"y_MD": bad(torch.float32, 4, 7)}, r"\(N, D\) and \(M, D\) with one D, got \(4, 8\) and \(4, 7\)"),
        ({"y_MD": bad(torch.float32, 3, 8)}, r"y has 3 columns for 4 pairs in views=1: pair i of view v is column v \* N \+ i"),
        ({"views": 2}, r"y has 4 columns for 4 pairs in views=2"),
        ({"views": 0}, r"views=0: .* views must be at least 1"),
        ({"views": -1}, r"views=-1: .* views must be at least 1"),
        ({"views": 1.0}, r"views=1.0 must be a whole number"),
        ({"logit_scale": 14.3}, r"logit_scale=14.3 must be a tensor of shape \(\) or \(1,\): torch.tensor\(14.3\)"),
        ({"views": 2, "y_MD": bad(torch.float32, 9, 8)}, r"9 columns, 1 more than views=2 of 4 pairs: that needs views=1"),
        ({"y_MD": bad(torch.bfloat16)}, r"share a floating-point dtype, got torch.float32 and torch.bfloat16: cast one"),
        ({"x_ND": bad(torch.int64), "y_MD": bad(torch.int64)}, r"floating-point dtype, got torch.int64 and torch.int64"),
        (
            {"x_ND": bad(torch.float64), "y_MD": bad(torch.float64)},
            r"backend='auto' computes in fp32, bf16 or fp16, not torch.float64.*backend='reference'",
        ),
        ({"compute_dtype": torch.float64}, r"backend='auto' computes in fp32, bf16 or fp16, not torch.float64"),
        ({"compute_dtype": torch.int64, "backend": "reference"}, r"computes in fp32, bf16 or fp16, not torch.int64"),
        (
            {"x_ND": bad(torch.bfloat16), "y_MD": bad(torch.bfloat16), "compute_dtype": torch.float16},
            r"compute_dtype=torch.float16 takes features in fp32 or torch.float16, got torch.bfloat16",
        ),
        (
            {"x_ND": bad(torch.bfloat16), "y_MD": bad(torch.bfloat16), "compute_dtype": torch.float32},
            r"compute_dtype=torch.float32 takes features in fp32.*got torch.bfloat16",
        ),
        ({"logit_scale": torch.ones(2)}, r"logit_scale must have shape \(\) or \(1,\), got \(2,\)"),
        ({"logit_scale": torch.tensor(1.0).bfloat16()}, r"logit_scale must be fp32, got torch.bfloat16"),
        ({"logit_scale": torch.tensor(1)}, r"logit_scale must be fp32, got torch.int64"),
        ({"logit_scale": torch.ones((), device="meta")}, r"logit_scale is on meta and x on cpu: move them to one device"),
        ({"valid": torch.ones(4)}, r"^valid must be torch.bool of shape \(4,\), got torch.float32 of shape \(4,\)"),
        ({"valid": bad(torch.bool, 3)}, r"^valid must be torch.bool of shape \(4,\), got torch.bool of shape \(3,\)"),
        ({"column_valid": bad(torch.bool, 3)}, r"column_valid must be torch.bool of shape \(4,\), got .* \(3,\)"),
        ({"ids": bad(torch.int32, 4)}, r"^ids must be torch.int64 of shape \(4,\), got torch.int32"),
        ({"column_ids": bad(torch.int64, 4, 1)}, r"column_ids must be torch.int64 of shape \(4,\), got .* \(4, 1\)"),
        ({"ids": bad(torch.int64, 4).to("meta")}, r"ids is on meta and x on cpu"),
        ({"y_MD": bad().to("meta")}, r"y is on meta and x on cpu"),
        ({"sizes": [3]}, r"sizes=\[3\] must name the pairs of each of 1 ranks, and rank 0 has 4"),
        ({"sizes": [4, 4]}, r"sizes=\[4, 4\] must name the pairs of each of 1 ranks"),
    ],
)
def test_user_faults_are_named(name: str, change: dict[str, Any], message: str) -> None:
    good = {"x_ND": bad(), "y_MD": bad(), "logit_scale": torch.tensor(1.0)}
    assert LOSSES[name](**good).isfinite()
    with pytest.raises(ValueError, match=message):
        LOSSES[name](**(good | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": (-0.1, 1.0)}, r"weights=\(-0.1, 1.0\) must be two finite numbers \(x to y, y to x\), none below 0"),
        ({"weights": (0.0, 0.0)}, r"weights=\(0.0, 0.0\) must be two finite numbers .* not both 0"),
        ({"weights": 1.0}, r"weights=1.0 must be two finite numbers"),
        ({"weights": (1.0,)}, r"weights=\(1.0,\) must be two finite numbers"),
        ({"weights": (1.0, 1.0, 1.0)}, r"must be two finite numbers"),
        ({"weights": (float("nan"), 1.0)}, r"weights=\(nan, 1.0\) must be two finite numbers"),
        ({"weights": (1.0, float("inf"))}, r"weights=\(1.0, inf\) must be two finite numbers"),
        ({"logit_bias": -10.0}, r"logit_bias=-10.0 must be a tensor of shape"),
        ({"logit_bias": torch.ones(2)}, r"logit_bias must have shape \(\) or \(1,\), got \(2,\)"),
        ({"logit_bias": torch.tensor(1.0).bfloat16()}, r"logit_bias must be fp32, got torch.bfloat16"),
        ({"logit_bias": torch.ones((), device="meta")}, r"logit_bias is on meta and x on cpu"),
    ],
)
def test_faults_of_one_loss_are_named(name: str, change: dict[str, Any], message: str) -> None:
    if ("weights" in change) != (name == "softmax"):
        pytest.skip("the other loss's argument")
    with pytest.raises(ValueError, match=message):
        LOSSES[name](bad(), bad(), torch.tensor(1.0), **change)


def test_reference_refuses_several_ranks(name: str) -> None:
    with pytest.raises(ValueError, match=r"backend='reference' cannot run over 3 ranks: .* choose 'auto'"):
        arguments._backend("reference", "ieee", torch.device("cpu"), 3)
