"""Encoding what is too much for one rank on all of them."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from scaleclip.distributed import all_or_none, gather_objects

Result = TypeVar("Result")


def encode_over_ranks(num_items: int, batch: int, encode: Callable[[int, int], Result]) -> list[Result]:
    """`encode(start, stop)` for every batch of `num_items` items, in order, on every rank; a batch is one rank's work.

    Raises:
        Exception: what `encode` raised on this rank, or RunError where it failed on another.
    """
    starts = range(0, num_items, batch)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    with all_or_none():
        mine = [encode(start, min(start + batch, num_items)) for start in starts[rank::world_size]]
    everyone = gather_objects(mine)
    return [everyone[number % world_size][number // world_size] for number in range(len(starts))]
