"""Parts of the panel backend: which logits a panel covers and strikes out, the sum of softplus, indices beyond 32 bits.

Shapes: a block of n rows and m columns, R x C logits a panel, D feature dims.
"""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from loss_cases import set_panels
from scaleclip_kernels import panels, softmax_contrastive_loss
from scaleclip_kernels.blocks import Block, Matched, Side, row_chunks


def block_of(
    num_rows: int,
    num_columns: int,
    matched: Matched,
    *,
    row_invalid: Tensor | None = None,
    column_invalid: Tensor | None = None,
    ids: tuple[Tensor | None, Tensor | None] = (None, None),
    positive: bool = False,
    device: str = "cpu",
) -> Block:
    x, y = (torch.zeros(n, 1, device=device) for n in (num_rows, num_columns))
    return Block(Side(x, row_invalid, ids[0]), Side(y, column_invalid, ids[1]), matched, positive)


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("panel_sizes", [(1, 1), (7, 5), (16, 64), (1024, 1024)])
@pytest.mark.parametrize(
    "matched",
    [Matched(0, 0, 40), Matched(0, 0, 0), Matched(3, 0, 30), Matched(0, 23, 40), Matched(11, 7, 29), Matched(39, 62, 1)],
)
def test_what_is_struck_out(
    matched: Matched, panel_sizes: tuple[int, int], with_masks: bool, positive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All panels of a block together, against the mask of the whole block, wherever its matched pairs begin."""
    set_panels(monkeypatch, *panel_sizes)
    n, m = 40, 63
    row_invalid, column_invalid = torch.arange(n) % 9 == 4, torch.arange(m) % 10 == 7
    row_ids, column_ids = torch.arange(n) % 6, torch.arange(m) * 5 % 8
    expected = torch.zeros(n, m, dtype=torch.bool)
    for k in range(matched.length):
        expected[matched.row + k, matched.column + k] = True
    block = block_of(n, m, matched)
    duplicate = torch.zeros(n, m, dtype=torch.bool)
    if with_masks:
        expected |= row_invalid.unsqueeze(1) | column_invalid
        duplicate = (row_ids.unsqueeze(1) == column_ids) & ~expected
        masks = {"row_invalid": row_invalid, "column_invalid": column_invalid, "ids": (row_ids, column_ids)}
        block = block_of(n, m, matched, **masks, positive=positive)

    struck, found = torch.zeros(2, n, m, dtype=torch.bool)
    visits = torch.zeros(n, m, dtype=torch.int64)
    for panel in panels._panels(block, torch.ones((), dtype=torch.float64)):
        logits = torch.zeros(len(panel.x_RD), len(panel.y_CD))
        positives = panel.strike(logits)
        assert (positives is not None) == (with_masks and positive)
        struck[panel.rows, panel.columns] = logits == -torch.inf
        if positives is not None:
            found[panel.rows, panel.columns] = positives
        visits[panel.rows, panel.columns] += 1
    assert (visits == 1).all()
    assert torch.equal(struck, expected if positive else expected | duplicate)
    assert torch.equal(found, duplicate if positive else torch.zeros_like(duplicate))


def test_panels_of_three_million_rows_and_columns_cover_all_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """9 * 10^12 logits, visited without values."""
    size, panel = 3_000_000, 1 << 15
    set_panels(monkeypatch, panel, panel)
    block = block_of(size, size, Matched(0, 0, size), device="meta")
    corners = [(p.rows, p.columns) for p in panels._panels(block, torch.ones((), dtype=torch.float64, device="meta"))]
    starts = range(0, size, panel)
    slices = [slice(start, min(start + panel, size)) for start in starts]
    assert corners == list(itertools.product(slices, slices))
    assert corners[-1][0].stop == size


@pytest.mark.parametrize(("device", "most"), [("cpu", 1 << 21), ("meta", 1 << 24)])
@pytest.mark.parametrize(("num_rows", "row_elements"), [(0, 8), (1, 8), (10, 0), (7, 1 << 25), (3_000_000, 8), (300_000, 1152)])
def test_row_chunks_cover_all_once(num_rows: int, row_elements: int, device: str, most: int) -> None:
    chunks = list(row_chunks(torch.empty(1, device=device).expand(num_rows, row_elements)))
    assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks[:-1])][: len(chunks)]
    assert (chunks[-1].stop if chunks else 0) == num_rows
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    assert all(size * row_elements <= most or size == 1 for size in sizes)
    # as few as there can be
    assert all(size + 1 > most // max(row_elements, 1) for size in sizes[:-1])


@pytest.mark.slow
def test_logits_beyond_32_bits() -> None:
    """1,000 x 3,000,000 logits, whose flat index needs more than 31 bits; columns repeat, so the truth is small."""
    num_pairs, num_kinds, copies, scale = 1000, 3000, 1000, 14.3
    generator = torch.Generator().manual_seed(0)
    x, kinds = (normalize(torch.randn(n, 8, generator=generator)) for n in (num_pairs, num_kinds))
    y = kinds.repeat(copies, 1)
    assert num_pairs * len(y) > 2**31
    leaves = [t.clone().requires_grad_() for t in (x, y)]
    loss = softmax_contrastive_loss(*leaves, torch.tensor(scale), weights=(1.0, 0.0), backend="panels")
    loss.backward()

    x64, kinds64 = (t.double().requires_grad_() for t in (x, kinds))
    logits = scale * x64 @ kinds64.T
    log_sum_exp = torch.tensor(float(copies)).double().log() + logits.logsumexp(dim=1)
    expected = (log_sum_exp - logits.diagonal()).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected.float(), rtol=1e-6, atol=0)
    by_kind = leaves[1].grad.double().view(copies, num_kinds, 8)
    for got, true in ((leaves[0].grad.double(), x64.grad), (by_kind.sum(dim=0), kinds64.grad)):
        # fp32 sums of three million terms
        torch.testing.assert_close(got, true, rtol=0, atol=1e-4 * true.abs().max().item())
    # every copy but the first, which holds the matched columns, has the same gradient
    assert torch.equal(by_kind[1], by_kind[-1])


@pytest.mark.parametrize("num_terms", [0, 1, 2, 3, 63, 64, 65, 127, 1000, 4097])
@pytest.mark.parametrize(("low", "high"), [(-100, 100), (-100, -80), (-30, -10), (-1, 1), (0, 0), (80, 100)])
def test_sum_of_softplus(num_terms: int, low: float, high: float) -> None:
    """64 terms share a log1p, and none is lost: neither the odd one out nor one of e^-80 among others."""
    generator = torch.Generator().manual_seed(num_terms)
    terms = low + (high - low) * torch.rand(1, num_terms, generator=generator)
    truth = torch.nn.functional.softplus(terms.double(), threshold=1000).sum()
    got = panels._softplus_sum(terms)
    assert got.dtype == torch.float64
    fp32 = torch.finfo(torch.float32)
    # exp(s) is off by the rounding of s; what lies below the smallest normal number may be taken for 0
    torch.testing.assert_close(got, truth, rtol=fp32.eps * (4 + max(-low, high)), atol=num_terms * fp32.tiny)


def test_sum_of_softplus_of_struck_logits() -> None:
    """-inf adds nothing, inf is not hidden, and NaN neither."""
    assert panels._softplus_sum(torch.full((3, 50), -torch.inf)) == 0
    assert panels._softplus_sum(torch.tensor([[1.0, torch.inf, -3.0]])) == torch.inf
    assert panels._softplus_sum(torch.tensor([[1.0, torch.nan, -3.0]])).isnan()
