"""Encoding what is too much for one rank on all of them."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from scaleclip.distributed import all_or_none, gather_objects

Result = TypeVar("Result")


def encode_over_ranks(num_items: int, batch: int, encode: Callable[[int, int], Result]) -> list[Result]:
    """`encode(start, stop)` for every batch of `num_items` items, in order, on every rank; a batch is one rank's work.

    Batches lie alike for any number of ranks, so their results are the same. A rank's follow each other: it reads its own
    shards, one after the other.

    Raises:
        Exception: what `encode` raised on this rank, or RunError where it failed on another.
    """
    starts = range(0, num_items, batch)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    first, last = (len(starts) * number // world_size for number in (rank, rank + 1))
    with all_or_none():
        mine = [encode(start, min(start + batch, num_items)) for start in starts[first:last]]
    return [result for results in gather_objects(mine) for result in results]
