"""softmax_contrastive_loss: its definition, and the panels' values and gradients against fp64.

Error budget: see tests/loss_cases.py. What both losses promise alike is in test_both_losses.py.

Shapes: N pairs, V views, M columns, D feature dims.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from loss_cases import (
    DUPLICATES,
    REGIMES,
    TINY_PANELS,
    WEIGHTS,
    Inputs,
    assert_within_budget,
    check_random_cases,
    evaluate,
    features,
    set_panels,
)
from scaleclip_kernels import softmax_contrastive_loss

SCALES = (1.0, 14.3, 50.0, 100.0)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("num_pairs", "dim"), [(1, 64), (7, 100), (100, 640), (257, 100)])
def test_error_budget(num_pairs: int, dim: int, scale: float, regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_panels(monkeypatch, *TINY_PANELS)
    assert_within_budget(Inputs("softmax", regime, num_pairs, dim, scale))


def test_error_budget_of_whole_panels() -> None:
    """A modality gap and a few matched pairs at scale 100, where one exponential a panel gives infinite gradients."""
    assert_within_budget(Inputs("softmax", "gap", 1100, 512, 100.0))


@pytest.mark.parametrize("panel_sizes", [(1, 1), (1, 25), (25, 1), (5, 10), (24, 26), (1024, 1024)])
@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_error_budget_at_panel_borders(duplicates: str, panel_sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    set_panels(monkeypatch, *panel_sizes)
    ids, valid = torch.arange(25) % 10, torch.arange(25) % 7 != 3
    assert_within_budget(Inputs("softmax", "random", 25, 64, 14.3), ids=ids, valid=valid, duplicates=duplicates)


@pytest.mark.parametrize("with_valid", [False, True])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_error_budget_with_duplicates(
    duplicates: str, scale: float, regime: str, with_valid: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_panels(monkeypatch, *TINY_PANELS)
    ids = torch.randint(50, (133,), generator=torch.Generator().manual_seed(1))
    valid = torch.arange(133) % 5 != 2 if with_valid else None
    assert_within_budget(Inputs("softmax", regime, 133, 64, scale), valid=valid, ids=ids, duplicates=duplicates)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_error_budget_in_low_precision(scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    set_panels(monkeypatch, *TINY_PANELS)
    assert_within_budget(Inputs("softmax", "gap", 100, 64, scale, dtype=dtype))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_error_budget_of_unequal_anchors(scale: float, weights: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions and views of different weight: a weight inside the exponent costs digits of every probability."""
    set_panels(monkeypatch, *TINY_PANELS)
    column_valid = torch.arange(3 * 60) % 60 < torch.tensor([60, 41, 7]).repeat_interleave(60)
    for regime in REGIMES:
        assert_within_budget(Inputs("softmax", regime, 60, 64, scale, views=3), weights=weights, column_valid=column_valid)


@pytest.mark.slow
def test_error_budget_of_random_options(monkeypatch: pytest.MonkeyPatch) -> None:
    check_random_cases("softmax", range(40), monkeypatch)


@pytest.mark.slow
def test_error_budget_of_many_random_options(monkeypatch: pytest.MonkeyPatch) -> None:
    check_random_cases("softmax", range(40, 560), monkeypatch)


def test_low_loss_keeps_relative_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss of 1e-6 is below the rounding of log-sum-exp minus the matched logit; negatives alone keep its digits."""
    set_panels(monkeypatch, *TINY_PANELS)
    x, y = features("low", 100, 64)
    truth = evaluate(softmax_contrastive_loss, x.double(), y.double(), 100.0, backend="reference")
    ours = evaluate(softmax_contrastive_loss, x, y, 100.0, backend="panels")
    assert 1e-9 < truth.loss < 1e-5
    for true, got in zip(truth, ours, strict=True):
        assert (got - true).norm() <= 3e-5 * true.norm()


@pytest.mark.parametrize("side", ["row", "column"])
def test_distant_row_or_column_does_not_underflow(side: str) -> None:
    """A row or column 150 nats below the rest of its panel: a maximum shared by the panel would lose it."""
    x, y = features("low", 40, 64)
    distant = x if side == "row" else y
    distant[3] *= -1
    truth = evaluate(softmax_contrastive_loss, x.double(), y.double(), 100.0, backend="reference")
    ours = evaluate(softmax_contrastive_loss, x, y, 100.0, backend="panels")
    for true, got in zip(truth, ours, strict=True):
        torch.testing.assert_close(got, true.float(), rtol=1e-5, atol=1e-5 * true.abs().max().item())


def test_logits_of_thousands_are_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """exp of 3000 is beyond any float; features need not have unit length."""
    set_panels(monkeypatch, *TINY_PANELS)
    for regime in REGIMES:
        x, y = (t * 6 for t in features(regime, 70, 64))
        truth = evaluate(softmax_contrastive_loss, x.double(), y.double(), 100.0, backend="reference")
        ours = evaluate(softmax_contrastive_loss, x, y, 100.0, backend="panels")
        for true, got in zip(truth, ours, strict=True):
            # the logits themselves are rounded to 3e-4
            torch.testing.assert_close(got, true.float(), rtol=2e-3, atol=2e-3 * true.abs().max().item() + 1e-30)


def assert_is_definition(by_hand: Callable[..., Tensor], x: Tensor, y: Tensor, scale: float, **options: Any) -> None:
    """The reference equals `by_hand` in fp64, the panels in fp32; every gradient too."""
    expected = evaluate(by_hand, x.double(), y.double(), scale)
    reference = evaluate(softmax_contrastive_loss, x.double(), y.double(), scale, backend="reference", **options)
    ours = evaluate(softmax_contrastive_loss, x, y, scale, backend="panels", **options)
    for true, exact, got in zip(expected, reference, ours, strict=True):
        torch.testing.assert_close(exact, true, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(got, true.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_definition_is_cross_entropy(weights: tuple[float, float]) -> None:
    x, y = features("random", 50, 16)

    def by_hand(x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
        logits, labels = logit_scale * x @ y.T, torch.arange(50)
        return weights[0] * cross_entropy(logits, labels) + weights[1] * cross_entropy(logits.T, labels)

    assert_is_definition(by_hand, x, y, 14.3, weights=weights)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_extra_columns_are_negatives_of_rows_only(weights: tuple[float, float]) -> None:
    x, y = features("random", 20, 16, extras=13)

    def by_hand(x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
        logits, labels = logit_scale * x @ y.T, torch.arange(20)
        return weights[0] * cross_entropy(logits, labels) + weights[1] * cross_entropy(logits[:, :20].T, labels)

    assert_is_definition(by_hand, x, y, 14.3, weights=weights)


def test_views_are_separate_losses() -> None:
    """The mean of one call a view, on either backend."""
    x, y = features("random", 30, 16, views=3)
    valid, column_valid = torch.arange(30) % 7 != 1, torch.arange(90) % 5 != 2
    ids, column_ids = torch.arange(30) % 11, torch.arange(90) % 13
    for backend in ("reference", "panels"):

        def separately(x: Tensor, y: Tensor, logit_scale: Tensor, backend: str = backend) -> Tensor:
            losses = [
                softmax_contrastive_loss(
                    x,
                    y[view],
                    logit_scale,
                    valid=valid,
                    column_valid=column_valid[view],
                    ids=ids,
                    column_ids=column_ids[view],
                    duplicates="positive",
                    backend=backend,
                )
                for view in (slice(0, 30), slice(30, 60), slice(60, 90))
            ]
            return torch.stack(losses).mean()

        together = evaluate(
            softmax_contrastive_loss,
            x,
            y,
            14.3,
            views=3,
            valid=valid,
            column_valid=column_valid,
            ids=ids,
            column_ids=column_ids,
            duplicates="positive",
            backend=backend,
        )
        for got, expected in zip(together, evaluate(separately, x, y, 14.3), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def by_loops(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    *,
    row_valid: list[bool],
    column_valid: list[bool],
    row_ids: list[int],
    column_ids: list[int],
    duplicates: str,
    views: int = 1,
    weights: tuple[float, float] = (0.5, 0.5),
) -> Tensor:
    """The docstring of softmax_contrastive_loss, one pair and one candidate at a time."""
    num_pairs, num_columns = len(x), len(y)
    view_losses = []
    for view in range(views):
        columns = range(view * num_pairs, (view + 1) * num_pairs if views > 1 else num_columns)
        anchors = []
        for row in range(num_pairs):
            match = columns[row]
            if not (row_valid[row] and column_valid[match]):
                continue
            pair_loss = torch.zeros((), dtype=x.dtype)
            directions = (
                [(row, column) for column in columns if column_valid[column]],
                [(other, match) for other in range(num_pairs) if row_valid[other]],
            )
            for weight, candidates in zip(weights, directions, strict=True):
                denominator, log_numerators = torch.zeros((), dtype=x.dtype), []
                for i, j in candidates:
                    logit = logit_scale * (x[i] @ y[j])
                    is_match, same = (i, j) == (row, match), row_ids[i] == column_ids[j]
                    is_pair = j - view * num_pairs == i
                    if is_match or (duplicates == "positive" and same):
                        log_numerators.append(logit)
                    if is_pair or not (duplicates == "ignore" and same):
                        denominator = denominator + logit.exp()
                pair_loss = pair_loss + weight * (denominator.log() - sum(log_numerators) / len(log_numerators))
            anchors.append(pair_loss)
        view_losses.append(sum(anchors) / len(anchors) if anchors else 0 * x.sum() * logit_scale + 0 * y.sum())
    return sum(view_losses) / views


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, 0.0), (0.3, 0.9)])
@pytest.mark.parametrize(("views", "extras"), [(1, 0), (2, 0), (1, 4)])
@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_definition_pair_by_pair(duplicates: str, views: int, extras: int, weights: tuple[float, float]) -> None:
    """Rows and columns valid and labelled independently, so that a row and its column differ in their positives."""
    num_pairs, num_columns = 7, 7 * views + extras
    x, y = features("random", num_pairs, 8, views=views, extras=extras)
    labels = {
        "valid": torch.tensor([True, True, False, True, True, True, True]),
        "column_valid": torch.arange(num_columns) % 5 != 3,
        "ids": torch.tensor([0, 1, 0, 2, 2, 0, 3]),
        "column_ids": torch.arange(num_columns) * 5 % 4,
    }
    same = (labels["ids"].unsqueeze(1) == labels["column_ids"]) & labels["valid"].unsqueeze(1) & labels["column_valid"]
    assert set(same.sum(dim=1).tolist()) != set(same.sum(dim=0).tolist())

    def by_hand(x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
        names = ("row_valid", "column_valid", "row_ids", "column_ids")
        lists = dict(zip(names, (label.tolist() for label in labels.values()), strict=True))
        return by_loops(x, y, logit_scale, **lists, duplicates=duplicates, views=views, weights=weights)

    assert_is_definition(by_hand, x, y, 5.0, **labels, duplicates=duplicates, views=views, weights=weights)


@pytest.mark.parametrize(("views", "extras"), [(1, 0), (2, 0), (1, 4)])
@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_columns_take_their_labels_from_their_pairs(duplicates: str, views: int, extras: int) -> None:
    """Without column_valid and column_ids; extra columns are valid."""
    x, y = features("random", 6, 8, views=views, extras=extras)
    valid, ids = [True, True, False, True, True, True], [0, 1, 0, 2, 2, 0]
    column_valid, column_ids = valid * views + [True] * extras, ids * views + list(range(9, 9 + extras))

    def by_hand(x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
        lists = {"row_valid": valid, "column_valid": column_valid, "row_ids": ids, "column_ids": column_ids}
        return by_loops(x, y, logit_scale, **lists, duplicates=duplicates, views=views)

    labels = {"valid": torch.tensor(valid), "ids": torch.tensor(ids)}
    if extras:
        labels["column_ids"] = torch.tensor(column_ids)
    assert_is_definition(by_hand, x, y, 5.0, **labels, duplicates=duplicates, views=views)


def test_definition_of_duplicates_by_hand() -> None:
    """Three pairs, the first two the same: every term written out (L_out of SupCon)."""
    x, y = (t.double() for t in features("random", 3, 8))
    ids = torch.tensor([4, 4, 9])
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
        got = evaluate(softmax_contrastive_loss, x, y, 5.0, ids=ids, duplicates=duplicates, backend="reference").loss
        torch.testing.assert_close(got, value, rtol=1e-14, atol=0)


@pytest.mark.parametrize("backend", ["panels", "reference"])
@pytest.mark.parametrize("duplicates", DUPLICATES)
@pytest.mark.parametrize(("num_pairs", "num_valid", "extras"), [(0, 0, 0), (0, 0, 5), (9, 0, 0), (9, 1, 0), (9, 0, 5)])
def test_nothing_to_contrast_gives_zero(num_pairs: int, num_valid: int, extras: int, duplicates: str, backend: str) -> None:
    x, y = features("random", num_pairs, 16, extras=extras)
    valid, ids = torch.arange(num_pairs) < num_valid, torch.zeros(num_pairs, dtype=torch.int64)
    x[~valid] = float("nan")
    options = {"valid": valid, "ids": ids, "duplicates": duplicates, "backend": backend}
    column_ids = torch.zeros(num_pairs + extras, dtype=torch.int64)
    for value in evaluate(softmax_contrastive_loss, x, y, 14.3, column_ids=column_ids, **options):
        assert (value == 0).all()


@pytest.mark.parametrize("backend", ["panels", "reference"])
def test_valid_columns_of_invalid_rows_remain_negatives(backend: str) -> None:
    """Pair 2 has no loss of its own, but its column stays in the rows' denominators."""
    x, y = features("random", 3, 8)
    x[2] = float("nan")
    row_valid, column_valid = torch.tensor([True, True, False]), torch.ones(3, dtype=torch.bool)
    got = evaluate(softmax_contrastive_loss, x, y, 5.0, valid=row_valid, column_valid=column_valid, backend=backend)
    logits = 5 * x[:2].double() @ y.double().T
    expected = (cross_entropy(logits, torch.arange(2)) + cross_entropy(logits[:, :2].T, torch.arange(2))) / 2
    torch.testing.assert_close(got.loss, expected.float())
    assert (got.x[2] == 0).all()
    assert (got.y[2] != 0).any()
