"""softmax_contrastive_loss: values and gradients against fp64, options, memory, errors.

Error budget: at most twice the error of plain PyTorch in the same dtype, plus two units of rounding.
"""

import weakref
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scaleclip_kernels import panels, reference, softmax_contrastive_loss

NUM_DRAWS = 6
TINY_PANELS = {"panel_rows": 32, "panel_columns": 48}


class Result(NamedTuple):
    loss: Tensor
    x: Tensor
    y: Tensor
    logit_scale: Tensor


def features(regime: str, num_pairs: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit-length fp32 features: "random"; "gap", the modalities far apart but for two pairs; "low", nearly solved."""
    generator = torch.Generator().manual_seed(seed)
    x, y, axis = (torch.randn(n, dim, generator=generator) for n in (num_pairs, num_pairs, 1))
    if regime == "gap":
        x, y = normalize(x) + 3 * normalize(axis), normalize(y) - 3 * normalize(axis)
        y[:2] = x[:2]
    if regime == "low":
        x = normalize(x) + 2 * normalize(axis)
        y = x + 0.1 * normalize(y)
    return normalize(x), normalize(y)


def evaluate(function, x: Tensor, y: Tensor, scale: float, dtype: torch.dtype = torch.float32, **options) -> Result:
    x, y = (t.detach().clone().to(dtype).requires_grad_() for t in (x, y))
    scale_dtype = torch.promote_types(dtype, torch.float32)
    logit_scale = torch.tensor(scale, dtype=torch.float32).to(scale_dtype).requires_grad_()
    loss = function(x, y, logit_scale, **options)
    loss.backward()
    assert loss.shape == ()
    assert x.grad.dtype == y.grad.dtype == dtype
    return Result(loss.detach(), x.grad, y.grad, logit_scale.grad)


def assert_within_budget(
    regime: str, num_pairs: int, dim: int, scale: float, panel_sizes: dict[str, int], dtype=torch.float32, **options
) -> None:
    """Compare largest errors, averaged over draws: a single draw's scalar can be right to the last bit by chance."""
    plain_errors, our_errors, slack = torch.zeros(3, len(Result._fields), dtype=torch.float64)
    for seed in range(NUM_DRAWS):
        x, y = (t.to(dtype) for t in features(regime, num_pairs, dim, seed))
        truth = evaluate(reference.softmax_contrastive_loss, x, y, scale, torch.float64, **options)
        plain = evaluate(reference.softmax_contrastive_loss, x, y, scale, dtype, **options)
        ours = evaluate(panels.softmax_contrastive_loss, x, y, scale, dtype, **panel_sizes, **options)
        for i, (true, theirs, got) in enumerate(zip(truth, plain, ours, strict=True)):
            plain_errors[i] += (theirs - true).abs().max() / NUM_DRAWS
            our_errors[i] += (got - true).abs().max() / NUM_DRAWS
            slack[i] += 2 * torch.finfo(got.dtype).eps * true.abs().max() / NUM_DRAWS
    for name, *errors in zip(Result._fields, our_errors, plain_errors, slack, strict=True):
        assert errors[0] <= 2 * errors[1] + errors[2], "{}: ours {:.2e}, plain {:.2e}, slack {:.2e}".format(name, *errors)


@pytest.mark.parametrize("regime", ["random", "gap", "low"])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize(("num_pairs", "dim"), [(1, 64), (7, 100), (100, 64), (257, 100)])
def test_error_budget(num_pairs: int, dim: int, scale: float, regime: str) -> None:
    assert_within_budget(regime, num_pairs, dim, scale, TINY_PANELS)


@pytest.mark.parametrize("panel_sizes", [(1, 1), (1, 25), (25, 1), (5, 10), (24, 26), (1024, 1024)])
def test_error_budget_at_panel_borders(panel_sizes: tuple[int, int]) -> None:
    sizes = {"panel_rows": panel_sizes[0], "panel_columns": panel_sizes[1]}
    ids, valid = torch.arange(25) % 10, torch.arange(25) % 7 != 3
    for duplicates in ("negative", "ignore", "positive"):
        assert_within_budget("random", 25, 64, 14.3, sizes, ids_N=ids, valid_N=valid, duplicates=duplicates)


@pytest.mark.parametrize("with_valid", [False, True])
@pytest.mark.parametrize("regime", ["random", "gap", "low"])
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("duplicates", ["negative", "ignore", "positive"])
def test_error_budget_with_duplicates(duplicates: str, scale: float, regime: str, with_valid: bool) -> None:
    ids = torch.randint(50, (133,), generator=torch.Generator().manual_seed(1))
    valid = torch.arange(133) % 5 != 2 if with_valid else None
    assert_within_budget(regime, 133, 64, scale, TINY_PANELS, valid_N=valid, ids_N=ids, duplicates=duplicates)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_error_budget_in_low_precision(scale: float, dtype: torch.dtype) -> None:
    assert_within_budget("gap", 100, 64, scale, TINY_PANELS, dtype)


def test_low_loss_keeps_relative_accuracy() -> None:
    """A loss of 1e-6 is below the rounding of log-sum-exp minus the matched logit; negatives alone keep its digits."""
    x, y = features("low", 100, 64)
    truth = evaluate(reference.softmax_contrastive_loss, x, y, 100.0, torch.float64)
    ours = evaluate(panels.softmax_contrastive_loss, x, y, 100.0, **TINY_PANELS)
    assert 1e-9 < truth.loss < 1e-5
    for true, got in zip(truth, ours, strict=True):
        assert (got - true).norm() <= 3e-5 * true.norm()


@pytest.mark.parametrize("side", ["row", "column"])
def test_distant_row_or_column_does_not_underflow(side: str) -> None:
    """A row or column 150 nats below the rest of its panel: a maximum shared by the panel would lose it."""
    x, y = features("low", 40, 64)
    distant = x if side == "row" else y
    distant[3] *= -1
    truth = evaluate(reference.softmax_contrastive_loss, x, y, 100.0, torch.float64)
    ours = evaluate(panels.softmax_contrastive_loss, x, y, 100.0)
    for true, got in zip(truth, ours, strict=True):
        torch.testing.assert_close(got, true.float(), rtol=1e-5, atol=1e-5 * true.abs().max().item())


def test_definition_is_cross_entropy() -> None:
    x, y = features("random", 50, 16)
    logits = 14.3 * x.double() @ y.double().T
    cross_entropy, labels = torch.nn.functional.cross_entropy, torch.arange(50)
    expected = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    got = reference.softmax_contrastive_loss(x.double(), y.double(), torch.tensor(14.3, dtype=torch.float64))
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)


def test_definition_of_duplicates_by_hand() -> None:
    """Three pairs, the first two the same: every term written out."""
    x, y = (t.double() for t in features("random", 3, 8))
    scale, ids = torch.tensor(5.0, dtype=torch.float64), torch.tensor([4, 4, 9])
    row_terms, column_terms = (5 * x @ y.T).exp(), (5 * y @ x.T).exp()
    expected = dict.fromkeys(("ignore", "positive"), torch.zeros((), dtype=torch.float64))
    for e in (row_terms, column_terms):
        prob = e / e.sum(dim=1, keepdim=True)
        positive = [
            (prob[0, 0].log() + prob[0, 1].log()) / 2,
            (prob[1, 0].log() + prob[1, 1].log()) / 2,
            prob[2, 2].log(),
        ]
        expected["positive"] = expected["positive"] - sum(positive) / 6
        ignore = [e[0, 0] / (e[0, 0] + e[0, 2]), e[1, 1] / (e[1, 1] + e[1, 2]), e[2, 2] / e[2].sum()]
        expected["ignore"] = expected["ignore"] - sum(p.log() for p in ignore) / 6
    for duplicates, value in expected.items():
        got = reference.softmax_contrastive_loss(x, y, scale, ids_N=ids, duplicates=duplicates)
        torch.testing.assert_close(got, value, rtol=1e-14, atol=0)


@pytest.mark.parametrize("duplicates", ["negative", "ignore", "positive"])
def test_reference_gradcheck(duplicates: str) -> None:
    x, y = (t.double().requires_grad_() for t in features("random", 6, 4))
    logit_scale = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    ids, valid = torch.tensor([0, 1, 0, 2, 2, 0]), torch.tensor([True, True, True, False, True, True])

    def loss(x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
        options = {"valid": valid, "ids": ids, "duplicates": duplicates, "backend": "reference"}
        return softmax_contrastive_loss(x, y, logit_scale, **options)

    assert torch.autograd.gradcheck(loss, (x, y, logit_scale))


@pytest.mark.parametrize("backend", ["panels", "reference"])
@pytest.mark.parametrize("duplicates", ["negative", "ignore", "positive"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_invalid_pairs_are_as_if_absent(poison: float, duplicates: str, backend: str) -> None:
    x, y = features("gap", 60, 32)
    ids, valid = torch.arange(60) % 25, torch.arange(60) % 4 != 1
    options = {"duplicates": duplicates, "backend": backend}
    expected = evaluate(softmax_contrastive_loss, x[valid], y[valid], 100.0, ids=ids[valid], **options)
    x[~valid], y[~valid] = poison, poison
    got = evaluate(softmax_contrastive_loss, x, y, 100.0, ids=ids, valid=valid, **options)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got.loss, expected.loss, **close)
    torch.testing.assert_close(got.logit_scale, expected.logit_scale, **close)
    for grad, expected_grad in ((got.x, expected.x), (got.y, expected.y)):
        torch.testing.assert_close(grad[valid], expected_grad, **close)
        assert (grad[~valid] == 0).all()


@pytest.mark.parametrize("backend", ["panels", "reference"])
@pytest.mark.parametrize("duplicates", ["negative", "ignore", "positive"])
@pytest.mark.parametrize(("num_pairs", "num_valid"), [(0, 0), (9, 0), (9, 1)])
def test_nothing_to_contrast_gives_zero(num_pairs: int, num_valid: int, duplicates: str, backend: str) -> None:
    x, y = features("random", num_pairs, 16)
    valid, ids = torch.arange(num_pairs) < num_valid, torch.zeros(num_pairs, dtype=torch.int64)
    x[~valid] = float("nan")
    options = {"valid": valid, "ids": ids, "duplicates": duplicates, "backend": backend}
    for value in evaluate(softmax_contrastive_loss, x, y, 14.3, **options):
        assert (value == 0).all()


def test_nan_in_a_valid_row_is_not_hidden() -> None:
    x, y = features("random", 20, 16)
    x[4, 3] = float("nan")
    assert softmax_contrastive_loss(x, y, torch.tensor(14.3)).isnan()


def test_ids_play_no_part_when_duplicates_are_negative() -> None:
    x, y = features("random", 40, 16)
    with_ids = evaluate(softmax_contrastive_loss, x, y, 14.3, ids=torch.zeros(40, dtype=torch.int64))
    for got, expected in zip(with_ids, evaluate(softmax_contrastive_loss, x, y, 14.3), strict=True):
        assert torch.equal(got, expected)


def test_non_contiguous_inputs() -> None:
    x, y = features("random", 100, 64)
    ids, valid = torch.arange(200) % 30, torch.arange(200) % 11 != 0
    expected = evaluate(
        softmax_contrastive_loss, x, y, 14.3, ids=ids[::2].clone(), valid=valid[::2].clone(), duplicates="ignore"
    )
    wide = torch.cat([x, y], dim=1).requires_grad_()
    transposed = y.T.contiguous().requires_grad_()
    loss = softmax_contrastive_loss(
        wide[:, :64], transposed.T, torch.tensor([14.3]), ids=ids[::2], valid=valid[::2], duplicates="ignore"
    )
    loss.backward()
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(wide.grad, torch.cat([expected.x, torch.zeros_like(y)], dim=1), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(transposed.grad.T, expected.y, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("wanted", ["x", "y", "logit_scale"])
def test_partial_gradients(wanted: str) -> None:
    x, y = features("random", 50, 16)
    expected = evaluate(panels.softmax_contrastive_loss, x, y, 14.3)
    inputs = {"x": x.clone(), "y": y.clone(), "logit_scale": torch.tensor(14.3)}
    inputs[wanted].requires_grad_()
    softmax_contrastive_loss(*inputs.values()).backward()
    for name, tensor in inputs.items():
        assert (tensor.grad is not None) == (name == wanted)
    torch.testing.assert_close(inputs[wanted].grad, getattr(expected, wanted))


def test_upstream_gradient_and_zero_scale() -> None:
    x, y = features("random", 50, 16)
    expected = evaluate(reference.softmax_contrastive_loss, x, y, 0.0)
    x.requires_grad_()
    logit_scale = torch.tensor([0.0], requires_grad=True)
    (3 * softmax_contrastive_loss(x, y, logit_scale)).backward()
    torch.testing.assert_close(x.grad, 3 * expected.x)
    torch.testing.assert_close(logit_scale.grad, 3 * expected.logit_scale.reshape(1))
    assert logit_scale.grad != 0


@pytest.mark.parametrize("backend", ["panels", "reference"])
def test_autocast_does_not_round_the_logits(backend: str) -> None:
    """Autocast would turn the fp32 matmuls of forward and backward into bf16 ones."""
    x, y = features("random", 50, 16)
    expected = evaluate(softmax_contrastive_loss, x, y, 100.0, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = evaluate(softmax_contrastive_loss, x, y, 100.0, backend=backend)
    assert got.loss == expected.loss
    if backend == "panels":  # autograd's own backward of the reference follows the caller's autocast
        assert torch.equal(got.x, expected.x)


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of every storage that an operator makes, from its birth to its death."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes: dict[int, int] = {}
        self.peak_bytes = self.largest_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is None or storage._cdata in before or storage._cdata in self.live_bytes:
                continue
            self.live_bytes[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.live_bytes.pop, storage._cdata)
            self.largest_bytes = max(self.largest_bytes, storage.nbytes())
            self.peak_bytes = max(self.peak_bytes, sum(self.live_bytes.values()))
        return out


def test_memory_is_far_below_the_logits() -> None:
    """Peak of all live storages made by forward and backward, and the largest single one."""
    num_pairs, dim = 4096, 16
    x, y = (t.requires_grad_() for t in features("random", num_pairs, dim))
    logit_scale = torch.tensor(14.3, requires_grad=True)
    ids, valid = torch.arange(num_pairs) // 2, torch.ones(num_pairs, dtype=torch.bool)
    logits_bytes = 4 * num_pairs**2
    options = {"valid_N": valid, "ids_N": ids, "duplicates": "positive"}
    with StorageTracker() as tracker:
        panels.softmax_contrastive_loss(x, y, logit_scale, **options, panel_rows=512, panel_columns=512).backward()
    assert 4 * 512 * 512 <= tracker.largest_bytes < logits_bytes / 32
    assert tracker.peak_bytes < logits_bytes / 8
    with StorageTracker() as tracker:  # the tracker does see what a dense implementation stores
        reference.softmax_contrastive_loss(x, y, logit_scale, **options).backward()
    assert tracker.largest_bytes >= logits_bytes
    assert tracker.peak_bytes >= 2 * logits_bytes


GOOD = {"x_ND": torch.zeros(4, 8), "y_ND": torch.zeros(4, 8), "logit_scale": torch.tensor(1.0)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "triton"}, r"backend='triton' cannot run.*choose one of.*'panels'"),
        ({"duplicates": "drop"}, r"duplicates='drop' is not one of"),
        ({"duplicates": "ignore"}, r"duplicates='ignore' needs ids"),
        ({"y_ND": torch.zeros(5, 8)}, r"both be \(N, D\), got \(4, 8\) and \(5, 8\)"),
        ({"y_ND": torch.zeros(4, 8).bfloat16()}, r"share a floating-point dtype, got torch.float32 and torch.bfloat16"),
        (
            {"x_ND": torch.zeros(4, 8).long(), "y_ND": torch.zeros(4, 8).long()},
            r"floating-point dtype, got torch.int64",
        ),
        ({"x_ND": torch.zeros(4, 8).double(), "y_ND": torch.zeros(4, 8).double()}, r"backend='auto' computes in fp32"),
        ({"logit_scale": torch.ones(2)}, r"logit_scale must have shape \(\) or \(1,\), got \(2,\)"),
        ({"logit_scale": torch.tensor(1.0).bfloat16()}, r"logit_scale must be fp32, got torch.bfloat16"),
        ({"valid": torch.ones(4)}, r"valid must be torch.bool of shape \(4,\), got torch.float32"),
        ({"valid": torch.ones(3, dtype=torch.bool)}, r"valid must be torch.bool of shape \(4,\), got .* \(3,\)"),
        ({"ids": torch.zeros(4, dtype=torch.int32)}, r"ids must be torch.int64 of shape \(4,\), got torch.int32"),
        ({"y_ND": torch.zeros(4, 8, device="meta")}, r"y is on meta and x on cpu"),
    ],
)
def test_user_faults_are_named(change: dict[str, object], message: str) -> None:
    assert softmax_contrastive_loss(**GOOD).isfinite()
    with pytest.raises(ValueError, match=message):
        softmax_contrastive_loss(**(GOOD | change))
