"""What is too much for one rank, on all of them; what is read from a disk, while the batch before is encoded."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch.distributed as dist

from scaleclip.distributed import all_or_none, gather_objects

Read = TypeVar("Read")
Result = TypeVar("Result")
Span = tuple[int, int]


def encode_over_ranks(num_items: int, batch: int, encode: Callable[[int, int], Result]) -> list[Result]:
    """`encode(start, stop)` for every batch of `num_items` items, in order, on every rank; a batch is one rank's work.

    Batches lie alike for any number of ranks, so their results are the same. A rank's follow each other: it reads its own
    shards, one after the other.

    Raises:
        Exception: what `encode` raised on this rank, or RunError where it failed on another.
    """
    with all_or_none():
        mine = [encode(start, stop) for start, stop in _own_spans(num_items, batch)]
    return [result for results in gather_objects(mine) for result in results]


def read_and_encode_over_ranks(
    num_items: int, batch: int, read: Callable[[int, int], Read], encode: Callable[[Read], Result]
) -> list[Result]:
    """As `encode_over_ranks`, of `encode(read(start, stop))`; a batch is read while the one before is encoded (see `ahead`)."""
    with all_or_none():
        mine = [encode(each) for each in ahead(read, _own_spans(num_items, batch))]
    return [result for results in gather_objects(mine) for result in results]


def ahead(read: Callable[[int, int], Read], spans: Iterable[Span]) -> Iterator[Read]:
    """`read(start, stop)` of each span, in order and by one thread, which is a span ahead of what was taken."""
    with ThreadPoolExecutor(1, "read-ahead") as thread:
        waiting = deque[Future[Read]]()
        for span in spans:
            waiting.append(thread.submit(read, *span))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _own_spans(num_items: int, batch: int) -> list[Span]:
    starts = range(0, num_items, batch)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    first, last = (len(starts) * number // world_size for number in (rank, rank + 1))
    return [(start, min(start + batch, num_items)) for start in starts[first:last]]
