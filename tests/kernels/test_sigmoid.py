"""sigmoid_contrastive_loss: its definition, and the panels' values and gradients against fp64.

Error budget: see tests/loss_cases.py. What both losses promise alike is in test_both_losses.py.

Shapes: N pairs, V views, M columns, D feature dims.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from loss_cases import (
    DUPLICATES,
    REGIMES,
    TINY_PANELS,
    Inputs,
    assert_within_budget,
    check_random_cases,
    evaluate,
    features,
    set_panels,
)
from scaleclip_kernels import sigmoid_contrastive_loss

BIASES = (0.0, -10.0)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize(("num_pairs", "dim"), [(1, 64), (7, 100), (100, 640), (257, 100)])
def test_error_budget(
    num_pairs: int, dim: int, scale: float, bias: float, regime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_panels(monkeypatch, *TINY_PANELS)
    assert_within_budget(Inputs("sigmoid", regime, num_pairs, dim, scale, bias))


def test_error_budget_of_whole_panels() -> None:
    assert_within_budget(Inputs("sigmoid", "gap", 1100, 512, 100.0, -10.0))


@pytest.mark.parametrize("panel_sizes", [(1, 1), (1, 25), (25, 1), (5, 10), (24, 26), (1024, 1024)])
@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_error_budget_at_panel_borders(duplicates: str, panel_sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    set_panels(monkeypatch, *panel_sizes)
    ids, valid = torch.arange(25) % 10, torch.arange(25) % 7 != 3
    inputs = Inputs("sigmoid", "random", 25, 64, 14.3, -2.0)
    assert_within_budget(inputs, ids=ids, valid=valid, duplicates=duplicates)


@pytest.mark.parametrize("with_valid", [False, True])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_error_budget_with_duplicates(duplicates: str, regime: str, with_valid: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    set_panels(monkeypatch, *TINY_PANELS)
    ids = torch.randint(50, (133,), generator=torch.Generator().manual_seed(1))
    valid = torch.arange(133) % 5 != 2 if with_valid else None
    inputs = Inputs("sigmoid", regime, 133, 64, 50.0, -10.0)
    assert_within_budget(inputs, valid=valid, ids=ids, duplicates=duplicates)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_error_budget_in_low_precision(scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    set_panels(monkeypatch, *TINY_PANELS)
    assert_within_budget(Inputs("sigmoid", "gap", 100, 64, scale, -10.0, dtype=dtype))


@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_error_budget_of_unequal_views(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each view is divided by its own number of pairs."""
    set_panels(monkeypatch, *TINY_PANELS)
    column_valid = torch.arange(3 * 60) % 60 < torch.tensor([60, 41, 7]).repeat_interleave(60)
    for regime in REGIMES:
        assert_within_budget(Inputs("sigmoid", regime, 60, 64, scale, -10.0, views=3), column_valid=column_valid)


def test_error_budget_of_random_options(monkeypatch: pytest.MonkeyPatch) -> None:
    check_random_cases("sigmoid", range(24), monkeypatch)


@pytest.mark.slow
def test_error_budget_of_many_random_options(monkeypatch: pytest.MonkeyPatch) -> None:
    check_random_cases("sigmoid", range(24, 560), monkeypatch)


def test_low_loss_keeps_relative_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pair is solved by 40 nats or more: log1p of something below fp32's rounding of 1."""
    set_panels(monkeypatch, *TINY_PANELS)
    x, y = torch.eye(64), 2 * torch.eye(64)
    arguments = (50.0, -45.0)  # matched logits of 55, others of -45
    truth = evaluate(sigmoid_contrastive_loss, x.double(), y.double(), *arguments, backend="reference")
    ours = evaluate(sigmoid_contrastive_loss, x, y, *arguments, backend="panels")
    assert 0 < truth.loss < 1e-17
    for true, got in zip(truth, ours, strict=True):
        assert (got - true).norm() <= 3e-5 * true.norm()


def test_logits_of_thousands_are_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    set_panels(monkeypatch, *TINY_PANELS)
    for regime in REGIMES:
        x, y = (t * 6 for t in features(regime, 70, 64))
        truth = evaluate(sigmoid_contrastive_loss, x.double(), y.double(), 100.0, -10.0, backend="reference")
        ours = evaluate(sigmoid_contrastive_loss, x, y, 100.0, -10.0, backend="panels")
        for true, got in zip(truth, ours, strict=True):
            # the logits themselves are rounded to 3e-4
            torch.testing.assert_close(got, true.float(), rtol=2e-3, atol=2e-3 * true.abs().max().item() + 1e-30)


def assert_is_definition(by_hand: Callable[..., Tensor], x: Tensor, y: Tensor, **options: Any) -> None:
    """The reference equals `by_hand` in fp64, the panels in fp32; every gradient too."""
    scalars = (5.0, -2.0)
    expected = evaluate(by_hand, x.double(), y.double(), *scalars)
    reference = evaluate(sigmoid_contrastive_loss, x.double(), y.double(), *scalars, backend="reference", **options)
    ours = evaluate(sigmoid_contrastive_loss, x, y, *scalars, backend="panels", **options)
    for true, exact, got in zip(expected, reference, ours, strict=True):
        torch.testing.assert_close(exact, true, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(got, true.float(), rtol=1e-5, atol=1e-6)


def test_definition_is_siglip() -> None:
    """The formula of arXiv 2303.15343 (algorithm 1): labels 2 I - 1, sum over columns, mean over rows."""
    x, y = features("random", 50, 16)

    def by_hand(x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        labels = 2 * torch.eye(50, dtype=x.dtype) - 1
        return -logsigmoid(labels * (x @ y.T * logit_scale + logit_bias)).sum() / 50

    assert_is_definition(by_hand, x, y)


def test_no_bias_is_a_bias_of_zero() -> None:
    x, y = features("random", 50, 16)
    for backend in ("panels", "reference"):
        without = evaluate(sigmoid_contrastive_loss, x, y, 5.0, backend=backend)
        with_zero = evaluate(sigmoid_contrastive_loss, x, y, 5.0, 0.0, backend=backend)
        for got, expected in zip(without[:4], with_zero[:4], strict=True):
            assert torch.equal(got, expected)


def by_loops(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    row_valid: list[bool],
    column_valid: list[bool],
    row_ids: list[int],
    column_ids: list[int],
    duplicates: str,
    views: int,
) -> Tensor:
    """The docstring of sigmoid_contrastive_loss, one row and one column at a time."""
    num_pairs = len(x)
    total = torch.zeros((), dtype=x.dtype)
    for view in range(views):
        view_total, view_pairs = torch.zeros((), dtype=x.dtype), 0
        for column in range(view * num_pairs, (view + 1) * num_pairs if views > 1 else len(y)):
            for row in range(num_pairs):
                if not (row_valid[row] and column_valid[column]):
                    continue
                is_pair, same = column - view * num_pairs == row, row_ids[row] == column_ids[column]
                view_pairs += is_pair
                if duplicates == "ignore" and same and not is_pair:
                    continue
                label = 1 if is_pair or (duplicates == "positive" and same) else -1
                logit = logit_scale * (x[row] @ y[column]) + logit_bias
                view_total = view_total - logsigmoid(label * logit)
        total = total + view_total / max(view_pairs, 1)
    return total / views


@pytest.mark.parametrize(("views", "extras"), [(1, 0), (3, 0), (1, 4)])
@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_definition_pair_by_pair(duplicates: str, views: int, extras: int) -> None:
    """Rows and columns valid and labelled independently; of the last view no pair is valid."""
    num_pairs, num_columns = 7, 7 * views + extras
    x, y = features("random", num_pairs, 8, views=views, extras=extras)
    labels = {
        "valid": torch.tensor([True, True, False, True, True, True, True]),
        "column_valid": torch.arange(num_columns) % 5 != 3,
        "ids": torch.tensor([0, 1, 0, 2, 2, 0, 3]),
        "column_ids": torch.arange(num_columns) * 5 % 4,
    }
    if views > 1:
        labels["column_valid"][-7:] = torch.arange(7) == 2

    def by_hand(x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        names = ("row_valid", "column_valid", "row_ids", "column_ids")
        lists = dict(zip(names, (label.tolist() for label in labels.values()), strict=True))
        return by_loops(x, y, logit_scale, logit_bias, **lists, duplicates=duplicates, views=views)

    assert_is_definition(by_hand, x, y, **labels, duplicates=duplicates, views=views)


@pytest.mark.parametrize(("views", "extras"), [(1, 0), (2, 0), (1, 4)])
@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_columns_take_their_labels_from_their_pairs(duplicates: str, views: int, extras: int) -> None:
    """Without column_valid and column_ids; extra columns are valid."""
    x, y = features("random", 6, 8, views=views, extras=extras)
    valid, ids = [True, True, False, True, True, True], [0, 1, 0, 2, 2, 0]
    column_valid, column_ids = valid * views + [True] * extras, ids * views + list(range(9, 9 + extras))

    def by_hand(x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        lists = {"row_valid": valid, "column_valid": column_valid, "row_ids": ids, "column_ids": column_ids}
        return by_loops(x, y, logit_scale, logit_bias, **lists, duplicates=duplicates, views=views)

    labels = {"valid": torch.tensor(valid), "ids": torch.tensor(ids)}
    if extras:
        labels["column_ids"] = torch.tensor(column_ids)
    assert_is_definition(by_hand, x, y, **labels, duplicates=duplicates, views=views)


@pytest.mark.parametrize("backend", ["panels", "reference"])
@pytest.mark.parametrize("duplicates", DUPLICATES)
@pytest.mark.parametrize(("num_pairs", "extras"), [(0, 0), (0, 5), (9, 0), (9, 5)])
def test_nothing_valid_gives_zero(num_pairs: int, extras: int, duplicates: str, backend: str) -> None:
    x, y = features("random", num_pairs, 16, extras=extras)
    ids, column_ids = (torch.zeros(n, dtype=torch.int64) for n in (num_pairs, num_pairs + extras))
    valid = torch.zeros(num_pairs, dtype=torch.bool)
    x[:] = float("nan")
    options = {"valid": valid, "ids": ids, "column_ids": column_ids, "duplicates": duplicates, "backend": backend}
    for value in evaluate(sigmoid_contrastive_loss, x, y, 14.3, -10.0, **options):
        assert (value == 0).all()


@pytest.mark.parametrize("backend", ["panels", "reference"])
def test_negatives_without_any_valid_pair(backend: str) -> None:
    """Rows 0, 1 and columns 2, 3 are valid: four negatives, divided by 1."""
    x, y = features("random", 4, 8)
    valid = torch.arange(4) < 2
    got = evaluate(sigmoid_contrastive_loss, x, y, 5.0, -2.0, valid=valid, column_valid=~valid, backend=backend)
    logits = 5 * x[:2].double() @ y[2:].double().T - 2
    torch.testing.assert_close(got.loss, -logsigmoid(-logits).sum().float())
    torch.testing.assert_close(got.logit_bias, logits.sigmoid().sum().float())
    assert (got.x[2:] == 0).all()
    assert (got.y[:2] == 0).all()
