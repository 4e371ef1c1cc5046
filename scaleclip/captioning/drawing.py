"""A sample of what passes by: the same one in whatever order it comes, and a smaller one is part of a larger one."""

import hashlib
import heapq
from typing import Generic, TypeVar

T = TypeVar("T")


class Drawn(Generic[T]):
    """The items whose names a seeded hash puts first.

    Args:
        most: items kept.
        seed: of the hash.
    """

    def __init__(self, most: int, seed: int) -> None:
        self._most, self._seed = most, seed
        self._heap: list[tuple[int, str, T]] = []

    def offer(self, name: str, item: T) -> None:
        """Keep an item, or not; no two have one name."""
        digest = hashlib.blake2b(f"{self._seed}/{name}".encode(errors="surrogatepass"), digest_size=8).digest()
        # a heap's first is its least: the one to go
        entry = (-int.from_bytes(digest), name, item)
        if len(self._heap) < self._most:
            heapq.heappush(self._heap, entry)
        elif self._heap and entry[0] > self._heap[0][0]:
            heapq.heapreplace(self._heap, entry)

    def items(self) -> list[T]:
        """Those kept, the first of the draw first."""
        return [item for *_, item in sorted(self._heap, key=lambda entry: (-entry[0], entry[1]))]
