"""Several sources in one global batch, each with a fixed quota, so that every position stays closed-form.

A stream gives global_batch / C slots to a batch; they are shared out to the sources by largest remainder of their weights,
the same in every stream and batch. A node therefore reads its own streams of every source, and nothing else.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from scaleclip.data.order import GOLDEN, Ints, SampleOrder
from scaleclip.errors import ConfigError


class Slots(NamedTuple):
    """Where the samples of some slots lie; a slot past the end of the global batch has source -1."""

    source_N: Ints
    """Source's number, or -1."""
    epoch_N: Ints
    """How often the slot's stream of that source has wrapped."""
    shard_N: Ints
    """Shard's number in the source's manifest."""
    index_N: Ints
    """Sample's number inside its shard, of those that the manifest counts."""


class BatchOrder:
    """Which samples make up a global batch.

    Args:
        counts: samples of every shard, by source, in the order of `data.sources`.
        weights: share of each source in a batch; none: its number of samples.
        seed: another seed is another order.
        global_batch: samples a batch; a multiple of `canonical_streams`.
        canonical_streams: ranges that an epoch of each source is cut into.
        shuffle_shards: average shards' worth of samples that a stream shuffles together.

    Raises:
        ConfigError: a source has fewer samples than streams or its quota is nothing.
    """

    def __init__(
        self,
        counts: Mapping[str, Ints],
        weights: Mapping[str, float | None],
        *,
        seed: int,
        global_batch: int,
        canonical_streams: int,
        shuffle_shards: int,
    ) -> None:
        assert global_batch % canonical_streams == 0
        self.global_batch, self.canonical_streams = global_batch, canonical_streams
        self._per_stream = global_batch // canonical_streams
        # a source's order is its own, and the first one's that of a run without a mixture
        self.sources = [
            SampleOrder(
                each, seed=seed ^ (number * GOLDEN % 2**63), streams=canonical_streams, shuffle_shards=shuffle_shards, name=name
            )
            for number, (name, each) in enumerate(counts.items())
        ]
        sizes = {name: float(source.num_samples) for name, source in zip(counts, self.sources, strict=True)}
        shares = {name: weights[name] or sizes[name] for name in counts}
        self.quotas = quotas_of(shares, self._per_stream)
        for name, quota in self.quotas.items():
            if not quota:
                raise ConfigError(
                    f"data.sources.{name} with weight {shares[name]:g} of {sum(shares.values()):g} gets none of the "
                    f"{self._per_stream} slots that a stream gives to a batch: raise its weight or train.global_batch, or "
                    f"lower data.canonical_streams={canonical_streams}"
                )
        self._ends = np.cumsum(list(self.quotas.values()))

    def slots(self, batch: int, start: int, stop: int) -> Slots:
        """Slots `start` to `stop` of global batch `batch`."""
        slot = np.arange(start, stop, dtype=np.int64)
        stream, lane = np.divmod(slot, self._per_stream)
        number = np.searchsorted(self._ends, lane, side="right")
        number[slot >= self.global_batch] = -1
        epoch, shard, index = np.zeros_like(slot), np.zeros_like(slot), np.zeros_like(slot)
        for source, (order, quota, end) in enumerate(zip(self.sources, self.quotas.values(), self._ends, strict=True)):
            here = number == source
            offset = batch * quota + lane[here] - (end - quota)
            epoch[here], shard[here], index[here] = order.positions(stream[here], offset)
        return Slots(number, epoch, shard, index)


def rank_slots(global_batch: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and last + 1 slot of a rank: equal shares for all, the last ones running past the batch's end if need be."""
    share = -(-global_batch // world_size)
    return rank * share, (rank + 1) * share


def quotas_of(weights: Mapping[str, float], seats: int) -> dict[str, int]:
    """`seats` shared out by weight and largest remainder (Hare's quota; ties to the earlier one)."""
    total = sum(weights.values())
    exact = {name: weight / total * seats for name, weight in weights.items()}
    quotas = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: quotas[name] - exact[name])
    for name in by_remainder[: seats - sum(quotas.values())]:
        quotas[name] += 1
    return quotas
