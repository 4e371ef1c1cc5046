"""The order of a source's samples, as a pure function of (seed, stream, position).

An epoch permutes the shards, lays their samples end to end and cuts the line into C contiguous ranges of equal length, the
canonical streams. A stream shuffles its range in blocks of a few shards. Global batch b takes global_batch / C samples from
every stream, in stream order; a rank reads a contiguous slice of that, so it touches only its own streams' shards. A stream
runs on into its next epoch, so nothing is dropped and every epoch holds every sample once.

Nothing depends on the number of ranks or workers, and any position costs the same: a permutation is a keyed bijection of
integers, evaluated only where it is asked for, without generator state and without a library's random numbers.
All of this is a contract with the runs that exist: a change here makes their resume wrong (tests/data/test_order.py pins it).
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scaleclip.errors import ConfigError

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

GOLDEN = 0x9E3779B97F4A7C15
_ROUND_WORDS = [np.uint64(number * GOLDEN % 2**64) for number in range(1, 7)]
_SHARDS, _SAMPLES = 0, 1  # what a key is for


class Positions(NamedTuple):
    """Where some samples lie."""

    epoch_N: Ints
    """How often the sample's stream has wrapped."""
    shard_N: Ints
    """Shard's number in the manifest."""
    index_N: Ints
    """Sample's number inside its shard, of those that the manifest counts."""


class SampleOrder:
    """The order over one source's shards with `counts` samples each.

    Args:
        counts: samples of every shard, in manifest order.
        seed: another seed is another order.
        streams: ranges that an epoch is cut into.
        shuffle_shards: average shards' worth of samples that are shuffled together.
        name: the source's, for errors.

    Raises:
        ConfigError: there are fewer samples than streams.
    """

    def __init__(self, counts: Ints, *, seed: int, streams: int, shuffle_shards: int, name: str) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.num_samples = int(self.counts.sum())
        self.seed = seed
        if self.num_samples < streams:
            raise ConfigError(
                f"data.canonical_streams={streams} is more than the {self.num_samples} samples of data.sources.{name}: lower it"
            )
        bounds = np.arange(streams + 1, dtype=np.int64) * self.num_samples // streams
        self._starts, self._lengths = bounds[:-1], np.diff(bounds)
        num_blocks = self._lengths * len(self.counts) // (shuffle_shards * self.num_samples)
        self._num_blocks = np.maximum(num_blocks, 1)
        self._epoch_line = lru_cache(maxsize=4)(self._lay_epoch)

    def positions(self, stream: Ints, offset: Ints) -> Positions:
        """The `offset`-th samples [N] that the streams [N] read, counted from the start of the run."""
        length, num_blocks = self._lengths[stream], self._num_blocks[stream]
        epoch, offset = np.divmod(offset, length)
        # block k covers floor(k * length / num_blocks) up to the next block's start
        block = ((offset + 1) * num_blocks - 1) // length
        first, last = block * length // num_blocks, (block + 1) * length // num_blocks
        key = hash64(self.seed, _SAMPLES, epoch, stream, block)
        place = self._starts[stream] + first + permute(offset - first, last - first, key)
        shard, index = np.empty_like(place), np.empty_like(place)
        for e in np.unique(epoch):
            here = epoch == e
            order, ends = self._epoch_line(int(e))
            at = np.searchsorted(ends, place[here], side="right")
            shard[here] = order[at]
            index[here] = place[here] - ends[at] + self.counts[order[at]]
        return Positions(epoch, shard, index)

    def _lay_epoch(self, epoch: int) -> tuple[Ints, Ints]:
        """Shards in the epoch's order, and where each ends on the line of all samples."""
        number = np.arange(len(self.counts), dtype=np.int64)
        order = permute(number, np.array([len(number)]), hash64(self.seed, _SHARDS, epoch))
        return order, np.cumsum(self.counts[order])


def permute(index: Ints, size: Ints, key: Words) -> Ints:
    """Where a keyed permutation of 0..size-1 takes `index` [N]; `size` and `key` are [N] or [1].

    Rounds of odd multiplication, addition and xor-shift permute the next power of two; a value that leaves 0..size-1 is
    sent through again until it comes back (cycle walking), which keeps it a permutation of the smaller range.
    """
    limit = size.astype(np.uint64)
    bits = np.maximum(np.frexp((size - 1).astype(np.float64))[1], 2).astype(np.uint64)
    mask, shift = (np.uint64(1) << bits) - np.uint64(1), (bits + np.uint64(1)) // np.uint64(2)
    value, out, todo = index.astype(np.uint64), np.empty(index.shape, np.int64), np.arange(index.size)
    while len(todo):
        for round_word in _ROUND_WORDS:
            word = _mix(key + round_word)
            value = (value * (word | np.uint64(1)) + (word >> np.uint64(32))) & mask
            value ^= value >> shift
        out[todo] = value
        away = np.flatnonzero(value >= limit)
        todo, value = todo[away], value[away]
        key, limit, mask, shift = (a if a.size == 1 else a[away] for a in (key, limit, mask, shift))
    return out


def hash64(*parts: int | Ints) -> Words:
    """64 well-mixed bits of some integers; the parts broadcast. At least one dimension, so that overflow wraps silently."""
    word = np.zeros(1, np.uint64)
    for part in parts:
        word = _mix((word ^ _mix(np.atleast_1d(np.asarray(part)).astype(np.uint64) + _ROUND_WORDS[0])) + _ROUND_WORDS[0])
    return word


def _mix(word: Words) -> Words:
    # the finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))
