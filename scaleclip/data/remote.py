"""One try to fetch a remote shard through fsspec, with a time-out that holds, and what a failed try means."""

import asyncio
import concurrent.futures
import os
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import fsspec.asyn
import fsspec.config
from aiohttp import ClientResponse, ClientTimeout
from fsspec.callbacks import Callback

from scaleclip.config import CacheConfig
from scaleclip.data.sample import SampleError

POLL_S = 0.1
"""How often a wait looks whether it is wanted still."""

# which of botocore's errors say that the store was not even asked; botocore is imported for s3:// alone
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")

_inherited: list[fsspec.AbstractFileSystem] = []


def _after_fork() -> None:
    # fsspec's own hook misses the lock around its event loop's start, which another thread may hold at the fork
    fsspec.asyn.reset_lock()
    # fsspec lets go of the parent's file systems, which would then end the parent's connections
    for system in set(fsspec.registry.values()):
        _inherited.extend(system._cache.values())


os.register_at_fork(after_in_child=_after_fork)


class Cancelled(Exception):
    """The caller does not want the shard any more."""


class Progress(Callback):  # type: ignore[misc]
    """How far a download is; stops one that the cache has no room for."""

    def __init__(self, url: str, most_bytes: int, config: CacheConfig) -> None:
        super().__init__()
        self._url, self._most_bytes, self._config = url, most_bytes, config
        self.moved_at = time.monotonic()

    def call(self, hook_name: str | None = None, **kwargs: Any) -> None:
        self.moved_at = time.monotonic()
        size = max(self.size or 0, self.value)
        if size > self._most_bytes:
            raise SampleError(
                "cache_full",
                f"{self._url} has at least {size / 2**30:.3g} GiB, more than data.cache.limit_gib={self._config.limit_gib:g} "
                f"allows all copies together: raise it to some shards' size a loader process",
            )


def stream(url: str, target: Path, progress: Progress, timeout_s: float, stop: threading.Event | None) -> None:
    """Stream a URL into a file, once. Raises what fsspec raises, TimeoutError, Cancelled, or EOFError for a short body.

    Time-out and `stop` hold for stores that fsspec reads asynchronously: S3, GCS, HTTP, Azure.
    """
    system, inside = fsspec.core.url_to_fs(url, **_options(url, timeout_s))
    # s3fs goes on with a broken body by itself, up to so many times
    system.retries = 1
    if system.async_impl:
        task = system._get_file(inside, str(target), callback=progress)
        _wait(asyncio.run_coroutine_threadsafe(task, system.loop), progress, timeout_s, stop)
    else:
        system.get_file(inside, str(target), callback=progress)
    size = target.stat().st_size
    if progress.size is not None and size != progress.size:
        raise EOFError(f"{size:,} of {progress.size:,} bytes came")


def _wait(
    future: "concurrent.futures.Future[None]", progress: Progress, timeout_s: float, stop: threading.Event | None
) -> None:
    """Wait for a download as long as it moves."""
    try:
        while True:
            left_s = max(progress.moved_at + timeout_s - time.monotonic(), 0.0)
            concurrent.futures.wait([future], min(left_s, POLL_S) if stop else left_s)
            if future.done():
                return future.result()
            if stop and stop.is_set():
                raise Cancelled
            if time.monotonic() - progress.moved_at >= timeout_s:
                raise TimeoutError(f"no byte for {timeout_s:g} s (data.cache.timeout_s) after {progress.value:,} bytes")
    finally:
        future.cancel()


def _options(url: str, timeout_s: float) -> dict[str, Any]:
    """How fsspec opens a store so that time-outs and retries are ours; what a user set for fsspec stays."""
    protocol = url.partition("://")[0]
    timeout = ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
    options: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):
        retries = {"total_max_attempts": 1}
        options = {"config_kwargs": {"connect_timeout": timeout_s, "read_timeout": timeout_s, "retries": retries}}
    elif protocol in ("http", "https"):
        # a body that the server packs for the way has another length than it says
        options = {"client_kwargs": {"timeout": timeout}, "headers": {"Accept-Encoding": "identity"}}
    elif protocol in ("gs", "gcs"):
        options = {"requests_timeout": timeout, "session_kwargs": {"raise_for_status": _refuse}}
    said = fsspec.config.conf.get(protocol, {})
    return {key: {**said.get(key, {}), **value} if isinstance(value, dict) else value for key, value in options.items()}


class _Refusal(Exception):
    """A store's answer that is none."""

    def __init__(self, status: int, reason: str | None) -> None:
        super().__init__(f"{status} {reason}")
        self.status = status


async def _refuse(response: ClientResponse) -> None:
    # gcsfs tries again by itself, or trips over the answer's missing text
    if response.status >= 400:
        raise _Refusal(response.status, response.reason)


def verdict(url: str, error: Exception, tried: int, attempts: int) -> SampleError | None:
    """What a failed try means for good; None where another may help."""
    status = _status(error)
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return SampleError("missing_shard", f"{url}: the store has no such object ({said})")
    if isinstance(error, PermissionError) or type(error).__name__ in _NO_CREDENTIALS or status in (401, 403):
        return SampleError("forbidden_shard", f"{url}: check this machine's credentials ({said})")
    if _may_pass(error, status) and tried < attempts:
        return None
    return SampleError("unreachable_shard", f"{url}: {tried} of {attempts} tries failed, the last with {said}")


def _may_pass(error: Exception, status: int | None) -> bool:
    if status is None or isinstance(error, TimeoutError):  # S3 has a time-out of status 400
        return not isinstance(error, (ValueError, ImportError))
    return status >= 500 or status in (408, 429)


def _status(error: BaseException) -> int | None:
    """The store's HTTP status, as botocore, aiohttp and `_Refusal` carry it."""
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
    status = getattr(error, "status", None)
    return status if isinstance(status, int) else None
