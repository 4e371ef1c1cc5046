"""Encoding what is too much for one rank on all of them."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from scaleclip.distributed import all_or_none, gather_objects

Item = TypeVar("Item")
Result = TypeVar("Result")


def encode_over_ranks(
    num_items: int, batch: int, read: Callable[[int, int], Item], encode: Callable[[Item], Result]
) -> list[Result]:
    """`encode(read(start, stop))` for every batch of `num_items` items, in order, on every rank; a batch is one rank's work.

    All ranks call `encode` equally often, some of them in vain: a forward pass under ZeRO-3 gathers parameters from all.

    Raises:
        Exception: what `read` raised on this rank, or RunError where it failed on another.
    """
    starts = range(0, num_items, batch)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = []
    for first in range(0, len(starts), world_size):
        start = starts[min(first + rank, len(starts) - 1)]
        with all_or_none():
            item = read(start, min(start + batch, num_items))
        mine.append(encode(item))
    everyone = gather_objects(mine)
    return [everyone[number % world_size][number // world_size] for number in range(len(starts))]
