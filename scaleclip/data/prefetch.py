"""Fetches remote shards into the node's cache before the reader asks for them."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from scaleclip.data.cache import ShardCache
from scaleclip.data.remote import Cancelled

_NUM_FETCHERS = 4
_MOST_STRIDE = 16
_MOST_BATCHES = 1024  # looked at ahead of the reader, where its shards suffice for long
_log = logging.getLogger(__name__)


@dataclass
class _Shard:
    first: int
    """First batch that was seen to need it."""
    last: int
    """Last one."""
    num_bytes: int = 0
    """Of its copy, once that is there."""


class Prefetcher:
    """Threads that keep the shards of coming batches in the cache, in the order in which they are needed.

    A shard is ahead while the first batch that needs it is later than the reader's. Batches are looked at in strides, since
    shards change every some hundred batches and `needs` is not cheap; a stride shrinks where more than half of a batch's
    shards are new. A shard that cannot be had is left to the reader, which will meet the same fault and count it.

    Args:
        needs: from a batch's number to the URLs it reads.
        cache: where they go.
        most_shards: shards that may be ahead of the reader.
        most_bytes: bytes that they may have together; reached, no further download begins.
    """

    def __init__(self, needs: Callable[[int], list[str]], cache: ShardCache, *, most_shards: int, most_bytes: int) -> None:
        self._needs, self._cache = needs, cache
        self._most_shards, self._most_bytes = most_shards, most_bytes
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._reader = self._last = 0
        self._shards: dict[str, _Shard] = {}
        self._queue: deque[str] = deque()
        self._logged: set[str] = set()
        self._threads: list[threading.Thread] = []

    def start(self, first: int, last: int) -> None:
        """Begin with the shards of batch `first`, and end with those of batch `last` - 1."""
        self._reader, self._last = first, last - 1
        jobs = [self._scout] + [self._fetch] * _NUM_FETCHERS
        self._threads = [threading.Thread(target=job, name=f"prefetch{i}", daemon=True) for i, job in enumerate(jobs)]
        for thread in self._threads:
            thread.start()

    def at(self, batch: int) -> None:
        """The reader is at a batch: its shards and earlier ones are not ahead any more."""
        with self._changed:
            self._reader = batch
            behind = [url for url, shard in self._shards.items() if shard.last + _MOST_STRIDE < batch]
            for url in behind:
                del self._shards[url]
            self._changed.notify_all()

    def close(self) -> None:
        """End the threads; downloads that run are given up."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _scout(self) -> None:
        """Look at batches and queue the shards that are new, until enough are ahead."""
        try:
            looked: dict[int, list[str]] = {}
            batch, stride, known = self._reader - 1, 1, set[str]()
            while batch < self._last and self._wait(partial(self._may_look, batch)):
                batch = max(batch, self._reader - 1)
                there = min(batch + stride, self._last)
                if there not in looked:
                    looked[there] = self._needs(there)
                needed = looked[there]
                num_new = len(set(needed) - known)
                if stride > 1 and num_new > len(needed) / 2:
                    stride //= 2
                    continue
                self._plan(needed, batch + 1, there)
                stride = stride if num_new else min(2 * stride, _MOST_STRIDE)
                batch, known = there, set(needed)
                looked = {later: urls for later, urls in looked.items() if later > batch}
        except Exception:
            # the reader computes the same and raises where someone sees it
            _log.warning(f"shards are not fetched ahead after batch {batch}", exc_info=True)

    def _plan(self, needed: list[str], first: int, last: int) -> None:
        with self._changed:
            for url in needed:
                if url in self._shards:
                    self._shards[url].last = last
                else:
                    self._shards[url] = _Shard(first, last)
                    self._queue.append(url)
            self._changed.notify_all()

    def _fetch(self) -> None:
        while url := self._take():
            try:
                num_bytes = Path(self._cache.path(url, self._stop)).stat().st_size
            except Cancelled:
                return
            except Exception as error:
                num_bytes = 0
                if url not in self._logged:
                    self._logged.add(url)
                    _log.warning(f"{url} could not be fetched ahead: {error}")
            with self._changed:
                if url in self._shards:
                    self._shards[url].num_bytes = num_bytes
                self._changed.notify_all()

    def _take(self) -> str | None:
        """The next shard to fetch, or None at the end."""
        with self._changed:
            while self._wait(lambda: bool(self._queue) and self._bytes_ahead() < self._most_bytes):
                url = self._queue.popleft()
                if url in self._shards:  # or else the reader is past it
                    return url
        return None

    def _wait(self, ready: Callable[[], bool]) -> bool:
        """Wait until something may be done; False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._stop.is_set() or ready())
        return not self._stop.is_set()

    def _may_look(self, batch: int) -> bool:
        num_ahead = sum(shard.first > self._reader for shard in self._shards.values())
        return num_ahead < self._most_shards and batch < self._reader + _MOST_BATCHES

    def _bytes_ahead(self) -> int:
        return sum(shard.num_bytes for shard in self._shards.values() if shard.first > self._reader)
