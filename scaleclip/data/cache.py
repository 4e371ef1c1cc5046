"""Local copies of remote shards, shared by all processes of a node.

In the cache's folder: `copies/` holds whole shards under a digest of their URL, `derived/` small files made from shards,
`partial/` what is being written, `locks/` one lock for all shards of a digest's first three digits. The time of access says
when a file was used last; eviction goes by it.
"""

import asyncio
import concurrent.futures
import contextlib
import errno
import hashlib
import json
import logging
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import fsspec.asyn
import fsspec.config
from aiohttp import ClientResponse, ClientTimeout
from filelock import FileLock, Timeout
from fsspec.callbacks import Callback

from scaleclip.config import CacheConfig
from scaleclip.data.sample import SampleError
from scaleclip.data.shards import is_remote

_PAUSE_S, _MOST_PAUSE_S = 0.5, 30.0  # before the second try, and at most
_HOLD_S, _MOST_HOLD_S = 60.0, 3600.0  # how long a failed shard is not asked for again
_DEAD_AFTER_S = 600.0  # beyond the time-out: nobody writes a partial file any more
_POLL_S = 0.1
_EVICT_EVERY = 256
_OURS = re.compile(r"[0-9a-f]{16}-")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# which of botocore's errors say that the store was not even asked; botocore is imported for s3:// alone
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")
_log = logging.getLogger(__name__)

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


class ShardCache:
    """Gives local paths for shards; safe to use from threads, forked and spawned processes, and to pickle.

    A download is at most once a node, however many processes ask for it. The copies stay under `data.cache.limit_gib`, the
    least recently used go first; a file that someone has open stays readable when it goes. A shard that failed for good is
    not asked for again by the process for a minute, after each further failure twice as long, up to an hour.
    """

    def __init__(self, config: CacheConfig) -> None:
        self._config = config
        self._folder = Path(config.folder).expanduser()
        self._most_bytes = int(config.limit_gib * 2**30)
        self._process = _Process()

    def __reduce__(self) -> tuple[type["ShardCache"], tuple[CacheConfig]]:
        return ShardCache, (self._config,)

    def path(self, url: str, stop: threading.Event | None = None) -> str:
        """Local path of a shard: of its copy if it is remote, which is fetched first where it is missing.

        Args:
            url: what `is_remote` says yes to; anything else is returned as it is.
            stop: when set by another thread, waiting and fetching end within a fraction of a second.

        Raises:
            SampleError: `missing_shard`, `forbidden_shard`, `unreachable_shard` (after `data.cache.attempts` tries), or
                `cache_full`, `unwritable_cache` where this machine is at fault.
            Cancelled: `stop` was set.
        """
        if not is_remote(url):
            return url
        digest = _digest(url)
        copy = self._copy(url)
        if _touch(copy):
            return str(copy)
        self._here.failures.check(url)
        asked_at = time.time()
        try:
            self._make_folders()
            with _locked(self._folder / "locks" / f"{digest[:3]}.lock", stop):
                if not _touch(copy):
                    self._fetch_once(url, copy, asked_at, stop)
        except OSError as error:
            problem = SampleError("unwritable_cache", f"data.cache.folder={self._folder}: {error}: it must be writable")
            self._here.failures.add(url, problem)
            raise problem from error
        return str(copy)

    def derived(self, path: str, kind: str, compute: Callable[[str], bytes]) -> bytes:
        """`compute(path)` of a local file, kept in the cache's folder for all processes until the file changes.

        Processes that ask at once may each compute. Where the folder cannot be written, each call computes.

        Args:
            path: a local file.
            kind: name of what is computed, for files' names; a change of `compute`'s result needs another.
            compute: from the file's path to bytes.

        Raises:
            SampleError: `missing_shard` or `unreadable_shard`, where `compute` or the look at the file raises OSError.
        """
        with _reading(path):
            stored = self._derived_file(path, kind)
            with contextlib.suppress(OSError):
                content = stored.read_bytes()
                _touch(stored)
                return content
            content = compute(path)
        try:
            self._store(stored, content)
        except OSError as error:
            if not self._here.warned:
                self._here.warned = True
                _log.warning(f"data.cache.folder={self._folder} cannot keep what is made from shards; it is made anew: {error}")
        return content

    def derived_path(self, path: str, kind: str, compute: Callable[[str], bytes]) -> str:
        """As `derived`, for a result that is too large for memory: path of the file with it, which one process a node computes.

        Raises:
            SampleError: as `derived` does, and `unwritable_cache` where the folder cannot keep the result.
        """
        with _reading(path):
            stored = self._derived_file(path, kind)
        self._here.failures.check(stored.name)
        try:
            (self._folder / "locks").mkdir(parents=True, exist_ok=True)
            if _touch(stored):
                return str(stored)
            with _locked(self._folder / "locks" / f"{stored.name[:3]}.lock"):
                if not _touch(stored):
                    with _reading(path):
                        content = compute(path)
                    self._make_room()
                    self._store(stored, content)
        except OSError as error:
            problem = SampleError("unwritable_cache", f"data.cache.folder={self._folder}: {error}: it must be writable")
            # not made again for each of its samples
            self._here.failures.add(stored.name, problem)
            raise problem from error
        return str(stored)

    def touch(self, url: str) -> None:
        """A remote shard is in use: it is not the next to go."""
        if is_remote(url):
            _touch(self._copy(url))

    def drop_derived(self, path: str, kind: str) -> None:
        """Forget what `derived` keeps of a file, which turned out to be damaged."""
        with _reading(path):
            self._derived_file(path, kind).unlink(missing_ok=True)

    def drop(self, url: str) -> None:
        """Forget the copy of a remote shard, which turned out to be damaged; the next `path` fetches it again."""
        self._copy(url).unlink(missing_ok=True)

    def take_counts(self) -> Counter[str]:
        """What this instance did in this process since the last call.

        `downloads`: whole shards; `downloaded_bytes`: those of failed tries included; `retries`; `evictions`: files.
        """
        here = self._here
        with here.lock:
            taken, here.counts = here.counts, Counter()
        return taken

    def _copy(self, url: str) -> Path:
        return self._folder / "copies" / f"{_digest(url)}-{_base_name(url)}"

    def _derived_file(self, path: str, kind: str) -> Path:
        stat = os.stat(path)
        name = _digest(f"{os.path.abspath(path)}\0{stat.st_size}\0{stat.st_mtime_ns}\0{kind}") + f"-{kind}"
        return self._folder / "derived" / name

    @property
    def _here(self) -> "_Process":
        # locks, counts and failures of the parent are not a forked process's own
        if self._process.pid != os.getpid():
            self._process = _Process()
        return self._process

    def _fetch_once(self, url: str, copy: Path, asked_at: float, stop: threading.Event | None) -> None:
        """With the shard's lock held: fetch, or fail as the process did that held the lock meanwhile."""
        record = self._folder / "locks" / f"{copy.name[:3]}.failed"
        failure = _failed_since(record, url, asked_at)
        if failure is None:
            try:
                self._fetch(url, copy, stop)
                self._here.failures.forget(url)
                return
            except SampleError as error:
                failure = error
                content = {"url": url, "time": time.time(), "cause": error.cause, "detail": error.detail}
                with contextlib.suppress(OSError):
                    record.write_text(json.dumps(content))
        self._here.failures.add(url, failure)
        raise failure

    def _fetch(self, url: str, copy: Path, stop: threading.Event | None) -> None:
        """Fetch a shard, again where that may help. Raises SampleError, and OSError where the folder is at fault."""
        # whoever wrote them is dead: the lock is ours
        for leftover in (self._folder / "partial").glob(f"{copy.name[:17]}*"):
            leftover.unlink(missing_ok=True)
        tried, made_room = 0, False
        while True:
            partial = self._partial(copy.name)
            partial.touch()
            progress = _Progress(url, self._most_bytes, self._config)
            try:
                _stream(url, partial, progress, self._config.timeout_s, stop)
                # a crash of the machine must not leave a hole in a file that has its final name
                _sync(partial)
            except (SampleError, Cancelled):
                partial.unlink(missing_ok=True)
                raise
            except Exception as error:
                partial.unlink(missing_ok=True)
                if isinstance(error, OSError) and error.errno in _DISK_FULL:
                    if made_room:
                        raise self._disk_full(url) from error
                    self._make_room(progress.size or progress.value)
                    made_room = True
                    continue
                if isinstance(error, OSError) and error.filename == str(partial):
                    raise
                tried += 1
                failure = _final(url, error, tried, self._config.attempts)
                if failure:
                    raise failure from error
                self._count("retries")
            else:
                self._make_room()
                os.replace(partial, copy)
                self._count("downloads")
                return
            finally:
                self._count("downloaded_bytes", progress.value)
            _pause(tried, stop)

    def _disk_full(self, url: str) -> SampleError:
        return SampleError(
            "cache_full",
            f"{url} does not fit on the disk of data.cache.folder={self._folder}: make room there, lower "
            f"data.cache.limit_gib={self._config.limit_gib:g}, or set another folder",
        )

    def _store(self, target: Path, content: bytes) -> None:
        self._make_folders()
        partial = self._partial(target.name)
        try:
            partial.write_bytes(content)
            # a crash of the machine must not leave a hole in a file that has its final name
            _sync(partial)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        here = self._here
        with here.lock:
            here.stored += 1
            is_due = here.stored % _EVICT_EVERY == 0
        if is_due:
            self._make_room()

    def _make_room(self, free: int = 0) -> None:
        """Delete the least recently used files until the limit holds and at least `free` bytes went, if there are as many."""
        with _locked(self._folder / "locks" / "evict.lock"):
            files = sorted(self._files("copies") + self._files("derived"))
            partials = self._files("partial")
            for file in partials:
                if time.time() - file.changed > self._config.timeout_s + _DEAD_AFTER_S:
                    file.path.unlink(missing_ok=True)
            total = sum(file.size for file in files)
            budget = min(self._most_bytes - sum(file.size for file in partials), total - free)
            for file in files:
                if total <= budget:
                    break
                file.path.unlink(missing_ok=True)
                total -= file.size
                self._count("evictions")

    def _files(self, name: str) -> list["_File"]:
        found = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self._folder / name) as entries:
            for entry in entries:
                if _OURS.match(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        stat = entry.stat()
                        found.append(_File(stat.st_atime_ns, stat.st_size, stat.st_mtime, Path(entry.path)))
        return found

    def _make_folders(self) -> None:
        for name in ("copies", "derived", "partial", "locks"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)

    def _partial(self, name: str) -> Path:
        return self._folder / "partial" / f"{name}.{os.getpid()}.{threading.get_ident()}.{random.getrandbits(32):08x}"

    def _count(self, name: str, number: int = 1) -> None:
        here = self._here
        with here.lock:
            here.counts[name] += number


class _File(NamedTuple):
    used_ns: int
    size: int
    changed: float
    path: Path


class _Failures:
    """Shards that failed for good, and until when nobody asks for them again."""

    def __init__(self) -> None:
        self._by_url: dict[str, tuple[SampleError, int, float]] = {}

    def check(self, url: str) -> None:
        error, _, until = self._by_url.get(url, (None, 0, 0.0))
        if error and time.monotonic() < until:
            raise SampleError(error.cause, error.detail)

    def add(self, url: str, error: SampleError) -> None:
        times = self._by_url[url][1] + 1 if url in self._by_url else 1
        hold_s = min(_HOLD_S * 2.0 ** min(times - 1, 20), _MOST_HOLD_S)
        self._by_url[url] = (error, times, time.monotonic() + hold_s)

    def forget(self, url: str) -> None:
        self._by_url.pop(url, None)


class _Process:
    """What an instance holds in one process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.failures = _Failures()
        self.stored = 0
        self.warned = False


class _Progress(Callback):  # type: ignore[misc]
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


def _stream(url: str, target: Path, progress: _Progress, timeout_s: float, stop: threading.Event | None) -> None:
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
    future: "concurrent.futures.Future[None]", progress: _Progress, timeout_s: float, stop: threading.Event | None
) -> None:
    """Wait for a download as long as it moves."""
    try:
        while True:
            left_s = max(progress.moved_at + timeout_s - time.monotonic(), 0.0)
            concurrent.futures.wait([future], min(left_s, _POLL_S) if stop else left_s)
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


def _final(url: str, error: Exception, tried: int, attempts: int) -> SampleError | None:
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


def _pause(tried: int, stop: threading.Event | None) -> None:
    pause_s = min(_PAUSE_S * 2.0 ** (tried - 1), _MOST_PAUSE_S) * random.uniform(0.5, 1.5)
    if stop is None:
        time.sleep(pause_s)
    elif stop.wait(pause_s):
        raise Cancelled


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """What the system says of a local file as SampleError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # no fault of the file: the caller has too many open
        cause = "missing_shard" if isinstance(error, FileNotFoundError) else "unreadable_shard"
        raise SampleError(cause, f"{path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _locked(path: Path, stop: threading.Event | None = None) -> Iterator[None]:
    """Hold a lock that a killed process gives up. Raises Cancelled."""
    lock = FileLock(path)
    while True:
        try:
            lock.acquire(timeout=-1 if stop is None else _POLL_S, poll_interval=_POLL_S)
            break
        except Timeout:
            if stop and stop.is_set():
                raise Cancelled from None
    try:
        yield
    finally:
        lock.release()


def _failed_since(record: Path, url: str, since: float) -> SampleError | None:
    try:
        said = json.loads(record.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return SampleError(said["cause"], said["detail"]) if said["url"] == url and said["time"] > since else None


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _touch(path: Path) -> bool:
    """Mark a file as used now, if it is there."""
    try:
        os.utime(path, ns=(time.time_ns(), os.stat(path).st_mtime_ns))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass  # another user's copy, or one on a disk that became read-only, can be read all the same
    return True


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()


def _base_name(url: str) -> str:
    # what follows a question mark may be a signature, and names have 255 bytes
    return url.partition("?")[0].rstrip("/").rpartition("/")[2][-100:]
