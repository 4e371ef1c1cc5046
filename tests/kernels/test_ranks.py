"""Ring and gather over gloo ranks: parameter gradients averaged over ranks equal those of one process."""

import pytest
import torch

from loss_rank_jobs import Case, passes_in_any_order, ring_events, ring_peak_bytes, run_cases, step
from scaleclip.local_ranks import run_ranks

# the cases of all tests run once, and not once in every process of pytest's
pytestmark = pytest.mark.xdist_group("loss over ranks")
ALL_LABELS = ("valid", "column_valid", "ids", "column_ids")
WORLD_SIZE = 4
POSITIVE = {"duplicates": "positive"}
CASES = {
    "plain": Case(),
    "validity": Case(labels=("valid",)),
    "last_rank_invalid": Case(labels=("valid", "ids"), last_rank_invalid=True, options={"duplicates": "ignore"}),
    "positive": Case(labels=("ids",), options=POSITIVE),
    "views": Case(views=3, labels=ALL_LABELS, options=POSITIVE),
    "extras": Case(extras=4, labels=ALL_LABELS, options={"duplicates": "ignore"}),
    "empty": Case(num_pairs=0, labels=("valid",)),
    "unequal": Case(unequal=True),
    "unequal_views": Case(unequal=True, views=2, labels=ALL_LABELS, options=POSITIVE),
    "unequal_extras": Case(unequal=True, extras=3, labels=ALL_LABELS, options=POSITIVE),
    "rows_only": Case(options={"weights": (1.0, 0.0)}),
    "columns_only": Case(options={"weights": (0.0, 2.0)}),
    "frozen_image": Case(frozen=("image",)),
    "frozen_text": Case(frozen=("text",)),
    "frozen_towers": Case(frozen=("image", "text")),
    "bf16": Case(dtype=torch.bfloat16, labels=("valid",)),
    "compute_bf16": Case(options={"compute_dtype": torch.bfloat16}),
    "triton": Case(labels=ALL_LABELS, options={"backend": "triton", "duplicates": "positive"}),
    "triton_bf16": Case(dtype=torch.bfloat16, unequal=True, options={"backend": "triton"}),
    "sigmoid": Case("sigmoid"),
    "sigmoid_triton": Case("sigmoid", views=2, labels=ALL_LABELS, options={"backend": "triton", "duplicates": "ignore"}),
    "sigmoid_empty": Case("sigmoid", num_pairs=0),
    "sigmoid_views": Case("sigmoid", views=2, labels=ALL_LABELS, options=POSITIVE),
    "sigmoid_extras": Case("sigmoid", extras=4, labels=ALL_LABELS, options={"duplicates": "ignore"}),
    "sigmoid_unequal": Case("sigmoid", unequal=True, labels=("valid",)),
    "sigmoid_frozen_image": Case("sigmoid", frozen=("image",)),
    "sigmoid_frozen_towers": Case("sigmoid", frozen=("image", "text")),
}


@pytest.fixture(scope="module")
def results() -> list[dict]:
    """Every rank's results of all cases, from one start of the ranks."""
    return run_ranks(run_cases, WORLD_SIZE, CASES)


@pytest.mark.parametrize("schedule", ["ring", "gather"])
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_mean_over_ranks_is_one_process(results: list[dict], name: str, num_ranks: int, schedule: str) -> None:
    case = CASES[name]
    ranks = [result[num_ranks, schedule, name] for result in results[-num_ranks:][::-1]]
    expected = step(case, case.sizes(num_ranks), None, None)
    assert all(torch.equal(rank["loss"], ranks[0]["loss"]) for rank in ranks)
    assert all(rank.keys() == expected.keys() for rank in ranks)
    for key, true in expected.items():
        mean = torch.stack([rank[key] for rank in ranks]).mean(dim=0)
        # In bf16, W times a feature's gradient is rounded once more unless W is a power of two.
        unit = 2**-7 if case.dtype == torch.bfloat16 else 2**-20
        torch.testing.assert_close(mean, true, rtol=0, atol=unit * max(true.abs().max().item(), 1e-3))


def test_backward_passes_in_another_order_and_twice() -> None:
    (expected,) = passes_in_any_order(ranks=False).values()
    every_rank = run_ranks(passes_in_any_order, 3, True)
    for schedule in ("ring", "gather"):
        for order, gradients in expected.items():
            parts = [rank[schedule][order] for rank in every_rank]
            for number, true in enumerate(gradients):
                # a feature's gradient is W times its share of the mean
                whole = torch.cat([part[number] for part in parts]) / 3
                torch.testing.assert_close(whole, true, rtol=0, atol=2**-20 * true.abs().max().item())


@pytest.mark.slow
def test_memory_of_a_ring_does_not_grow_with_its_ranks() -> None:
    """At most: both gradients, two foreign blocks and two of their gradients, and change."""
    num_pairs, dim = 256, 128
    block_bytes = 4 * num_pairs * dim
    for peaks in run_ranks(ring_peak_bytes, WORLD_SIZE, num_pairs, dim):
        assert all(peak == pytest.approx(peaks[min(peaks)], rel=0.02) for peak in peaks.values())
        assert 5 * block_bytes < max(peaks.values()) < 7.5 * block_bytes


def test_transfers_of_a_ring_overlap_its_work() -> None:
    """The next block leaves before this one is worked on.

    Half of its sums leave when half is done, and are waited for after the first panel's product, half a block later.
    """
    first = ["data leave", *["panel", "panel", "sums leave"] * 2, "data awaited"]
    half = ["panel", "sums awaited", "panel", "sums leave"]
    for events in run_ranks(ring_events, 3):
        assert events == [*first, "data leave", *half * 2, "data awaited", *half * 2, "sums awaited", "sums awaited"]
