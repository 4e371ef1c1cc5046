"""The order of samples, of one source and of several: a contract with every run that exists."""

import numpy as np
import pytest

from scaleclip.data.mixture import BatchOrder, rank_slots
from scaleclip.data.order import hash64, permute
from scaleclip.errors import ConfigError

COUNTS = np.array([13, 0, 40, 7, 29, 1, 31, 22, 18, 36])
TOTAL = int(COUNTS.sum())


def make_order(*, counts=COUNTS, seed=3, global_batch=24, canonical_streams=6, shuffle_shards=2, weights=None):
    """Of one source, or of several given as counts by name."""
    counts = counts if isinstance(counts, dict) else {"only": counts}
    return BatchOrder(
        counts,
        weights or dict.fromkeys(counts),
        seed=seed,
        global_batch=global_batch,
        canonical_streams=canonical_streams,
        shuffle_shards=shuffle_shards,
    )


def rows_of(order, batch, start, stop):
    """(epoch, shard, index) of slots, [stop - start, 3]."""
    return np.stack(order.slots(batch, start, stop)[1:], axis=1)


def samples(order, num_batches):
    """(epoch, shard, index) of every slot of the first batches, [num_batches, global_batch, 3]."""
    return np.stack([rows_of(order, b, 0, order.global_batch) for b in range(num_batches)])


def test_every_epoch_holds_every_sample_once():
    rows = samples(make_order(), 3 * TOTAL // 24 + 6).reshape(-1, 3)
    everything = {(shard, index) for shard, count in enumerate(COUNTS) for index in range(count)}
    for epoch in range(3):
        seen = [tuple(row[1:]) for row in rows if row[0] == epoch]
        assert len(seen) == TOTAL
        assert set(seen) == everything


def test_streams_are_contiguous_in_the_epochs_shard_order():
    """A slot's stream reads at most the shards of its own range: with whole-shard ranges, exactly its own."""
    order = make_order(counts=np.full(12, 10), global_batch=12, canonical_streams=6)
    first_epoch = samples(order, 10).reshape(10, 6, 2, 3)
    assert (first_epoch[..., 0] == 0).all()
    shards_of_stream = [set(first_epoch[:, stream, :, 1].ravel()) for stream in range(6)]
    assert all(len(shards) == 4 or len(shards) == 2 for shards in shards_of_stream)
    # 20 samples a stream are two whole shards, so streams share none
    assert sum(len(shards) for shards in shards_of_stream) == 12


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7, 24])
def test_ranks_share_the_same_global_batches(world_size):
    order = make_order()
    whole = samples(order, 4)
    for batch in range(4):
        parts = [order.slots(batch, *rank_slots(24, rank, world_size)) for rank in range(world_size)]
        assert len({len(part.shard_N) for part in parts}) == 1, "every rank has as many slots"
        joined = np.concatenate([np.stack(part, axis=1) for part in parts])
        valid = joined[:, 0] >= 0
        np.testing.assert_array_equal(joined[valid][:, 1:], whole[batch])
        assert valid[:24].all()
        assert not valid[24:].any(), "slots past the end of the batch are invalid"


def test_a_position_does_not_depend_on_what_was_asked_before():
    order, fresh = make_order(), make_order()
    samples(order, 30)
    for batch in (29, 0, 17):
        np.testing.assert_array_equal(order.slots(batch, 5, 11), fresh.slots(batch, 5, 11))


@pytest.mark.parametrize("change", [{"seed": 4}, {"canonical_streams": 4}, {"shuffle_shards": 1}])
def test_what_decides_the_order(change):
    base = {"canonical_streams": 2}
    assert (samples(make_order(**base), 3) != samples(make_order(**base | change), 3)).any()


def test_epochs_differ():
    rows = samples(make_order(global_batch=6), 2 * TOTAL // 6 + 1).reshape(-1, 3)
    first, second = (rows[rows[:, 0] == epoch][:, 1:] for epoch in (0, 1))
    assert (first[:TOTAL] != second[:TOTAL]).any()


def test_the_order_is_pinned():
    """These numbers may never change: runs that exist resume by them."""
    np.testing.assert_array_equal(rows_of(make_order(), 11, 2, 8), PINNED)
    assert hash64(1, 2, 3)[0] == PINNED_HASH


def test_a_large_data_set_is_shuffled_within_a_few_shards_only():
    counts = np.full(64, 100)
    order = make_order(counts=counts, seed=0, global_batch=4, canonical_streams=4, shuffle_shards=2)
    stream = np.stack([rows_of(order, b, 0, 1)[0] for b in range(1600)])
    for block in range(8):
        rows = stream[block * 200 : (block + 1) * 200]
        assert len(set(rows[:, 1])) == 2, "a block is two shards"
        assert np.abs(np.diff(rows[:, 1] * 100 + rows[:, 2])).mean() > 60, "and is shuffled"


def test_too_many_streams_are_refused():
    with pytest.raises(ConfigError, match=r"data\.canonical_streams=512 .* 197 samples of data\.sources\.only"):
        make_order(global_batch=512, canonical_streams=512)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 100, 1023, 1025])
def test_permute_is_a_permutation(size):
    image = permute(np.arange(size), np.array([size]), hash64(5, size))
    assert sorted(image) == list(range(size))


@pytest.mark.parametrize("size", [3, 5, 12, 17])
def test_permute_is_uniform(size):
    """Over many keys an index goes everywhere equally often, and neighbours do not stay neighbours (chi-square, p ~ 1e-6)."""
    keys = hash64(7, np.arange(20_000))
    images = np.stack([permute(np.full(len(keys), i), np.array([size]), keys) for i in range(size)], axis=1)
    for i in range(size):
        assert chi_square(np.bincount(images[:, i], minlength=size)) < (size - 1) + 7 * np.sqrt(2 * (size - 1)) + 12
    steps = np.bincount(((images[:, 1:] - images[:, :-1]) % size).ravel(), minlength=size)[1:]
    assert chi_square(steps) < 3 * size + 30


def chi_square(counts):
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


SOURCES = {"web": COUNTS, "cc": np.array([30, 11, 25]), "art": np.array([24])}
WEIGHTS = {"web": 2.0, "cc": 1.0, "art": 1.0}


def make_mixture(**options):
    return make_order(counts=SOURCES, **{"weights": WEIGHTS, "global_batch": 24, "canonical_streams": 3} | options)


def test_every_batch_has_the_quota_of_every_source():
    order = make_mixture()
    assert order.quotas == {"web": 4, "cc": 2, "art": 2}
    for batch in (0, 7, 1000):
        source = order.slots(batch, 0, 24).source_N
        assert np.bincount(source).tolist() == [12, 6, 6]
        assert source.reshape(3, 8).tolist() == [[0, 0, 0, 0, 1, 1, 2, 2]] * 3, "in every stream alike"


def test_every_epoch_of_a_source_holds_its_every_sample_once():
    order = make_mixture()
    slots = [np.stack(order.slots(b, 0, 24), axis=1) for b in range(120)]
    rows = np.concatenate(slots)
    for number, counts in enumerate(SOURCES.values()):
        everything = sorted((shard, index) for shard, count in enumerate(counts) for index in range(count))
        here = rows[rows[:, 0] == number]
        for epoch in range(3):
            assert sorted(map(tuple, here[here[:, 1] == epoch][:, 2:].tolist())) == everything


def test_the_first_source_of_a_mixture_keeps_the_order_that_it_has_alone():
    mixed = make_mixture()
    alone = make_order(counts={"web": COUNTS}, global_batch=12, canonical_streams=3)
    for batch in (0, 5, 40):
        slots = mixed.slots(batch, 0, 24)
        np.testing.assert_array_equal(np.stack(slots[1:], axis=1)[slots.source_N == 0], rows_of(alone, batch, 0, 12))


def test_sources_of_equal_shards_have_orders_of_their_own():
    order = make_order(counts={"a": COUNTS, "b": COUNTS}, global_batch=24, canonical_streams=2)
    slots = order.slots(0, 0, 24)
    rows = np.stack(slots[1:], axis=1)
    assert (rows[slots.source_N == 0] != rows[slots.source_N == 1]).any()


@pytest.mark.parametrize(
    ("weights", "quotas"),
    [
        ({"web": 1.0, "cc": 1.0, "art": 1.0}, [3, 3, 2]),
        ({"web": 0.68, "cc": 0.22, "art": 0.1}, [5, 2, 1]),
        ({"web": None, "cc": None, "art": None}, [5, 2, 1]),
        ({"web": 100.0, "cc": 30.0, "art": 20.0}, [5, 2, 1]),
    ],
)
def test_quotas_are_shared_out_by_largest_remainder(weights, quotas):
    assert list(make_mixture(weights=weights).quotas.values()) == quotas


def test_a_source_that_would_never_be_read_is_refused():
    with pytest.raises(ConfigError, match=r"data\.sources\.art with weight 0\.01 of 2\.01 gets none of the 8 slots"):
        make_mixture(weights={"web": 1.0, "cc": 1.0, "art": 0.01})


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_the_batches_of_a_mixture(world_size):
    order = make_mixture()
    whole = np.stack(order.slots(4, 0, 24), axis=1)
    parts = [np.stack(order.slots(4, *rank_slots(24, rank, world_size)), axis=1) for rank in range(world_size)]
    joined = np.concatenate(parts)
    np.testing.assert_array_equal(joined[joined[:, 0] >= 0], whole)


PINNED = np.array([[1, 0, 4], [1, 7, 6], [1, 4, 25], [1, 4, 5], [1, 4, 23], [1, 4, 8]])
PINNED_HASH = 9812528628958509896
