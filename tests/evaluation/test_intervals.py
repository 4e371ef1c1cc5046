"""Bootstrap intervals against resampling by hand and against theory."""

import math

import pytest
import torch

from scaleclip.evaluation import intervals
from scaleclip.evaluation.intervals import bootstrap_interval


def by_hand(values, groups=None, draws=4000):
    """Quantiles of means of indices drawn with replacement, within groups."""
    random = torch.Generator().manual_seed(1)
    parts = [values] if groups is None else [values[groups == group] for group in groups.unique()]
    means = torch.stack(
        [part[torch.randint(len(part), (draws, len(part)), generator=random)].double().mean(dim=1) for part in parts]
    ).mean(dim=0)
    return means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def test_it_is_that_of_a_binomial():
    values = torch.arange(1000) < 300
    low, high = bootstrap_interval(values, draws=20_000)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert (low, high) == (pytest.approx(0.3 - half, abs=2e-3), pytest.approx(0.3 + half, abs=2e-3))


@pytest.mark.parametrize("values", [torch.rand(60, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 4])
def test_it_is_that_of_resampling(values):
    found = bootstrap_interval(values, draws=4000)
    assert found == pytest.approx(by_hand(values), abs=0.04 * float(values.max()))


def test_groups_count_alike_and_are_resampled_within():
    groups = torch.tensor([0] * 90 + [7] * 10)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    values = torch.where(groups == 0, torch.arange(100) % 2, (torch.arange(100) % 5 > 0).long())
    low, high = bootstrap_interval(values, groups_N=groups, draws=4000)
    assert (low, high) == (pytest.approx(by_hand(values, groups), abs=0.03))
    class_means = [float(values[groups == group].double().mean()) for group in (0, 7)]
    assert low < sum(class_means) / 2 < high
    # the plain mean is another
    assert low > float(values.double().mean())


def test_a_group_without_spread_has_none():
    groups = torch.tensor([0, 0, 1, 1])
    assert bootstrap_interval(torch.tensor([1, 1, 0, 0]), groups_N=groups) == (0.5, 0.5)


def test_the_seed_decides_and_the_block_does_not(monkeypatch):
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    found = bootstrap_interval(values)
    assert bootstrap_interval(values) == found
    assert bootstrap_interval(values, seed=1) != found
    monkeypatch.setattr(intervals, "_BLOCK", 170)  # three draws at once
    assert bootstrap_interval(values) == pytest.approx(found, abs=1e-12)


def test_memory_is_a_block(monkeypatch):
    sizes = []
    original = intervals.np.random.default_rng

    class Counting:
        def __init__(self, seed):
            self.random = original(seed)

        def multinomial(self, n, shares, size):
            sizes.append(size * len(shares))
            return self.random.multinomial(n, shares, size=size)

    monkeypatch.setattr(intervals.np.random, "default_rng", Counting)
    monkeypatch.setattr(intervals, "_BLOCK", 1000)
    bootstrap_interval(torch.rand(300), draws=100)
    assert max(sizes) <= 1000
    assert sum(sizes) == 100 * 300


def test_no_values_have_no_interval():
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval(torch.zeros(0))
