"""Local copies of remote shards, shared by all processes of a node.

In the cache's folder: `copies/` holds whole shards under a digest of their URL, `derived/` small files made from shards,
`partial/` what is being written, `locks/` one lock for all shards of a digest's first three digits. The time of access says
when a file was used last; eviction goes by it.
"""

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
from typing import NamedTuple

from filelock import FileLock, Timeout

from scaleclip.config import CacheConfig
from scaleclip.data.remote import POLL_S, Cancelled, Progress, stream, verdict
from scaleclip.data.sample import SampleError
from scaleclip.data.shards import is_remote

_PAUSE_S, _MOST_PAUSE_S = 0.5, 30.0  # before the second try, and at most
_HOLD_S, _MOST_HOLD_S = 60.0, 3600.0  # how long a failed shard is not asked for again
_DEAD_AFTER_S = 600.0  # beyond the time-out: nobody writes a partial file any more
_EVICT_EVERY = 256
_OURS = re.compile(r"[0-9a-f]{16}-")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_log = logging.getLogger(__name__)


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
            progress = Progress(url, self._most_bytes, self._config)
            try:
                stream(url, partial, progress, self._config.timeout_s, stop)
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
                failure = verdict(url, error, tried, self._config.attempts)
                if failure:
                    raise failure from error
                self._count("retries")
            else:
                self._make_room()
                _publish(partial, copy)
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
            _publish(partial, target)
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
            lock.acquire(timeout=-1 if stop is None else POLL_S, poll_interval=POLL_S)
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


def _publish(partial: Path, target: Path) -> None:
    # used when it is whole: its download may have begun before others were used last
    _touch(partial)
    os.replace(partial, target)


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
