"""The shards that a process has open: a bounded number, opened again where that may help."""

import errno
import resource
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from scaleclip.data.cache import ShardCache
from scaleclip.data.sample import SampleError
from scaleclip.data.shards import is_remote

_MOST = 1024
_TOUCH_S = 60.0
T = TypeVar("T")
R = TypeVar("R")


class OpenShards(Generic[T]):
    """What is open of shards, by number; the least recently used is let go first.

    An open shard counts as used in the cache, and one that the cache let go stays readable while it is open. A handle that has
    gone stale (NFS), a copy that was evicted before it was opened and a lack of file descriptors are tried again once.

    Args:
        urls: path or URL of every shard.
        cache: local copies of remote shards.
        open_shard: from a shard's number to what is kept; raises OSError or SampleError.
    """

    def __init__(self, urls: Sequence[str], cache: ShardCache, open_shard: Callable[[int], T]) -> None:
        self._urls, self._cache, self._open_shard = urls, cache, open_shard
        self._open: OrderedDict[int, tuple[T, float]] = OrderedDict()
        self.most = _MOST
        """How many are kept open."""

    def __call__(self, shard: int) -> T:
        """Raises SampleError when the shard cannot be had."""
        if shard not in self._open:
            return self._add(shard)
        self._open.move_to_end(shard)
        opened, used = self._open[shard]
        now = time.monotonic()
        if now - used > _TOUCH_S:
            self._cache.touch(self._urls[shard])
            self._open[shard] = opened, now
        return opened

    def read(self, shard: int, read: Callable[[T], R]) -> R:
        """What `read` makes of an open shard. Raises SampleError when it cannot be had or read."""
        try:
            return read(self(shard))
        except OSError:
            self._open.pop(shard, None)
        try:
            return read(self(shard))
        except OSError as error:
            raise SampleError("unreadable_shard", f"{self._urls[shard]}: {error.strerror or error}") from error

    def _add(self, shard: int) -> T:
        opened = self._try_twice(shard)
        self._open[shard] = opened, time.monotonic()
        while len(self._open) > self.most:
            self._open.popitem(last=False)
        return opened

    def _try_twice(self, shard: int) -> T:
        url = self._urls[shard]
        try:
            return self._open_shard(shard)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self.most = max(1, len(self._open) // 2)
                self._open.clear()
        except SampleError as error:
            if error.cause != "missing_shard" or not is_remote(url):
                raise
        try:
            return self._open_shard(shard)
        except OSError as error:
            cause = "missing_shard" if isinstance(error, FileNotFoundError) else "unreadable_shard"
            raise SampleError(cause, f"{url}: {error.strerror or error}") from error


def allow_open_files() -> None:
    """Let this process and its children have as many files open as the system permits; usual limits are 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
