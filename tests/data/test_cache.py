"""The local cache of remote shards, against a real S3 server whose downloads fail in every way."""

import errno
import gc
import io
import multiprocessing
import multiprocessing.synchronize
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec import AbstractFileSystem

from object_store import ObjectStore, object_store
from scaleclip.config import CacheConfig
from scaleclip.data import cache as cache_module
from scaleclip.data.cache import ShardCache
from scaleclip.data.remote import Cancelled
from scaleclip.data.sample import SampleError

_WAIT_S = 60.0
_SIZE = 300_000
_PROTOCOLS = ("s3", "gs", "http")


@pytest.fixture(scope="module")
def _store() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture
def store(_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """The module's store, which forgets faults and requests; pauses between tries are short."""
    for name, value in _store.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cache_module, "_PAUSE_S", 0.001)
    _store.clear()
    yield _store
    _store.clear()


def content(number: int, size: int = _SIZE) -> bytes:
    """Bytes of a shard."""
    return np.random.default_rng(number).bytes(size)


def make_cache(folder: Path, **values: Any) -> ShardCache:
    """A cache in `folder/cache`; sizes in bytes."""
    if "limit" in values:
        values["limit_gib"] = values.pop("limit") / 2**30
    return ShardCache(CacheConfig(folder=str(folder / "cache"), **{"timeout_s": 20.0, "attempts": 3} | values))


def copies(folder: Path) -> list[str]:
    """Names of the copies in the cache, without their digests."""
    return sorted(path.name[17:] for path in (folder / "cache" / "copies").iterdir())


def partials(folder: Path) -> list[str]:
    """Files that are being written."""
    return [path.name for path in (folder / "cache" / "partial").iterdir()]


def start(method: str, job: Any, *args: Any) -> BaseProcess:
    """A process that runs a function."""
    process = multiprocessing.get_context(method).Process(target=job, args=args)  # type: ignore[attr-defined]
    process.start()
    return process


def finish(*processes: BaseProcess) -> None:
    """Wait for processes, which must end well."""
    for process in processes:
        process.join(_WAIT_S)
        assert process.exitcode == 0


def test_a_local_shard_is_its_own_copy(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    assert cache.path("some/shard.tar") == "some/shard.tar"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("protocol", _PROTOCOLS)
def test_a_remote_shard_is_fetched_once_in_one_request(store: ObjectStore, tmp_path: Path, protocol: str) -> None:
    store.put("once/0.tar", content(0))
    for _ in range(2):
        cache = make_cache(tmp_path)
        assert Path(cache.path(store.url("once/0.tar", protocol))).read_bytes() == content(0)
        assert Path(cache.path(store.url("once/0.tar", protocol))).name.endswith("-0.tar")
    assert [(request.key, request.sent) for request in store.requests] == [("once/0.tar", _SIZE)]


def test_any_file_system_of_fsspec_is_read(tmp_path: Path) -> None:
    with fsspec.open("memory://cache-test/0.tar", "wb") as file:
        file.write(content(1))
    cache = make_cache(tmp_path)
    assert Path(cache.path("memory://cache-test/0.tar")).read_bytes() == content(1)
    with pytest.raises(SampleError, match="missing_shard"):
        cache.path("memory://cache-test/1.tar")


class ShortFile(io.BytesIO):
    """Says that it has 11 bytes."""

    size = 11


class ShortFileSystem(AbstractFileSystem):
    """Every file has 10 bytes."""

    protocol = "short"

    def isdir(self, path: str) -> bool:
        return False

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> io.BytesIO:
        return ShortFile(bytes(10))


def test_a_body_shorter_than_the_store_said_is_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_PAUSE_S", 0.001)
    fsspec.register_implementation("short", ShortFileSystem, clobber=True)
    with pytest.raises(SampleError, match="3 of 3 tries failed, the last with EOFError: 10 of 11 bytes came"):
        make_cache(tmp_path).path("short://0.tar")
    assert copies(tmp_path) == partials(tmp_path) == []


def test_shards_of_one_name_are_told_apart(store: ObjectStore, tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    paths = [cache.path(store.put(f"{folder}/0.tar", content(folder))) for folder in (1, 2)]
    assert [Path(path).read_bytes() for path in paths] == [content(1), content(2)]


@pytest.mark.parametrize("protocol", _PROTOCOLS)
@pytest.mark.parametrize("fault", ["500", "503", "429", "cut before", "cut within"])
def test_a_passing_fault_is_tried_again(store: ObjectStore, tmp_path: Path, protocol: str, fault: str) -> None:
    if protocol == "gs" and fault.startswith("cut"):
        pytest.skip("gcsfs goes on with a broken body by itself, after a second")
    store.put("fault.tar", content(3))
    if fault.isdigit():
        store.fail("fault.tar", int(fault))
    else:
        store.cut("fault.tar", 0 if fault == "cut before" else 100_000)
    cache = make_cache(tmp_path)
    assert Path(cache.path(store.url("fault.tar", protocol))).read_bytes() == content(3)
    lost = 100_000 if fault == "cut within" else 0
    counts = cache.take_counts()
    assert counts == {"downloads": 1, "downloaded_bytes": _SIZE + lost, "retries": 1}
    assert len(store.downloads("fault.tar")) == 2
    assert partials(tmp_path) == []


@pytest.mark.parametrize("protocol", _PROTOCOLS)
@pytest.mark.parametrize("after", [-1, 100_000])
def test_a_store_that_falls_silent_is_given_up_and_tried_again(
    store: ObjectStore, tmp_path: Path, protocol: str, after: int
) -> None:
    store.put("slow.tar", content(4))
    cache = make_cache(tmp_path, timeout_s=0.5, attempts=20)
    # the first request of a process takes long
    store.put("quick.tar", content(4))
    cache.path(store.url("quick.tar", protocol))
    cache.take_counts()
    fault = store.stall("slow.tar", after)
    assert Path(cache.path(store.url("slow.tar", protocol))).read_bytes() == content(4)
    assert fault.reached.is_set()
    assert not fault.go.is_set()
    assert cache.take_counts()["retries"] >= 1


@pytest.mark.parametrize("protocol", _PROTOCOLS)
@pytest.mark.parametrize("attempts", [1, 4])
def test_every_try_is_one_request_and_the_last_one_counts(
    store: ObjectStore, tmp_path: Path, protocol: str, attempts: int
) -> None:
    store.put("down.tar", content(5))
    store.fail("down.tar", 503, times=100)
    cache = make_cache(tmp_path, attempts=attempts)
    with pytest.raises(SampleError, match=f"{attempts} of {attempts} tries failed") as caught:
        cache.path(store.url("down.tar", protocol))
    assert caught.value.cause == "unreachable_shard"
    assert len(store.downloads("down.tar")) == attempts
    assert copies(tmp_path) == partials(tmp_path) == []


def test_a_store_that_nobody_runs_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="unreachable_shard"):
        make_cache(tmp_path, attempts=1).path("http://127.0.0.1:9/0.tar")


def test_a_half_shard_never_has_the_final_name(store: ObjectStore, tmp_path: Path) -> None:
    store.put("half.tar", content(6))
    store.cut("half.tar", _SIZE - 1, times=3)
    with pytest.raises(SampleError, match="unreachable_shard"):
        make_cache(tmp_path).path(store.url("half.tar"))
    assert copies(tmp_path) == partials(tmp_path) == []


@pytest.mark.parametrize("protocol", _PROTOCOLS)
@pytest.mark.parametrize(("status", "cause"), [(404, "missing_shard"), (403, "forbidden_shard"), (401, "forbidden_shard")])
def test_what_no_retry_helps_is_asked_once(store: ObjectStore, tmp_path: Path, protocol: str, status: int, cause: str) -> None:
    store.put("gone.tar", content(7))
    store.fail("gone.tar", status, times=5)
    with pytest.raises(SampleError, match=cause):
        make_cache(tmp_path).path(store.url("gone.tar", protocol))
    assert len(store.downloads("gone.tar")) == 1


def test_an_object_that_is_not_there_is_missing(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="missing_shard"):
        make_cache(tmp_path).path(store.url("never.tar"))


def test_a_failed_shard_is_not_asked_for_again_for_a_while(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(tmp_path)
    for _ in range(10):
        with pytest.raises(SampleError, match="missing_shard"):
            cache.path(store.url("late.tar"))
    assert len(store.downloads("late.tar")) == 1
    store.put("late.tar", content(8))
    now = time.monotonic()
    monkeypatch.setattr(cache_module.time, "monotonic", lambda: now + 61)
    assert Path(cache.path(store.url("late.tar"))).read_bytes() == content(8)


def test_each_failure_doubles_the_time_until_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(cache_module.time, "monotonic", lambda: now)
    failures, holds = cache_module._Failures(), []
    for _ in range(9):
        failures.add("s3://a/b.tar", SampleError("missing_shard", "gone"))
        begin = now
        while True:
            try:
                failures.check("s3://a/b.tar")
                break
            except SampleError:
                now += 60
        holds.append(now - begin)
    assert holds == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]


def _fetch(cache: ShardCache, url: str, expected: bytes, begun: multiprocessing.synchronize.Barrier) -> None:
    begun.wait(_WAIT_S)
    assert Path(cache.path(url)).read_bytes() == expected


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_processes_that_ask_at_once_download_once(store: ObjectStore, tmp_path: Path, method: str) -> None:
    store.put("shared.tar", content(9))
    fault = store.stall("shared.tar", 1000)
    begun = multiprocessing.get_context(method).Barrier(4)
    cache = make_cache(tmp_path)
    processes = [start(method, _fetch, cache, store.url("shared.tar"), content(9), begun) for _ in range(3)]
    begun.wait(_WAIT_S)
    assert fault.reached.wait(_WAIT_S)
    time.sleep(0.5)  # the other two wait, or would fetch
    fault.go.set()
    finish(*processes)
    assert [request.sent for request in store.downloads("shared.tar")] == [_SIZE]


def _fail(cache: ShardCache, url: str, cause: str, begun: multiprocessing.synchronize.Barrier | None = None) -> None:
    if begun:
        begun.wait(_WAIT_S)
    with pytest.raises(SampleError, match=cause):
        cache.path(url)


def test_processes_that_wait_for_a_shard_fail_with_it(store: ObjectStore, tmp_path: Path) -> None:
    fault = store.stall("none.tar", -1, status=403)
    cache, url = make_cache(tmp_path), store.url("none.tar")
    processes = [start("fork", _fail, cache, url, "forbidden_shard")]
    assert fault.reached.wait(_WAIT_S)
    begun = multiprocessing.get_context("fork").Barrier(3)
    processes += [start("fork", _fail, cache, url, "forbidden_shard", begun) for _ in range(2)]
    begun.wait(_WAIT_S)
    time.sleep(0.5)  # they are at the lock now
    fault.go.set()
    finish(*processes)
    assert len(store.downloads("none.tar")) == 1
    # one that comes later asks itself
    _fail(make_cache(tmp_path), url, "missing_shard")


def _path(cache: ShardCache, url: str) -> None:
    cache.path(url)


def test_another_process_gets_the_whole_shard_after_a_kill(store: ObjectStore, tmp_path: Path) -> None:
    store.put("killed.tar", content(10))
    fault = store.stall("killed.tar", 200_000)
    cache = make_cache(tmp_path)
    process = start("fork", _path, cache, store.url("killed.tar"))
    assert fault.reached.wait(_WAIT_S)
    assert copies(tmp_path) == []
    assert len(partials(tmp_path)) == 1
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert Path(cache.path(store.url("killed.tar"))).read_bytes() == content(10)
    assert partials(tmp_path) == []


def test_what_killed_downloads_left_goes_with_time(store: ObjectStore, tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    cache.path(store.put("first.tar", content(11)))
    leftovers = [tmp_path / "cache" / "partial" / f"{age:016x}-x.tar.1.2.3" for age in (0, 10_000)]
    for leftover, age in zip(leftovers, (0, 10_000), strict=True):
        leftover.write_bytes(b"half")
        os.utime(leftover, (time.time() - age,) * 2)
    cache.path(store.put("second.tar", content(11)))
    assert [leftover.exists() for leftover in leftovers] == [True, False]


def test_the_least_recently_used_shard_goes_first(store: ObjectStore, tmp_path: Path) -> None:
    cache = make_cache(tmp_path, limit=3.5 * _SIZE)
    for number in range(3):
        cache.path(store.put(f"lru/{number}.tar", content(number)))
    cache.path(store.url("lru/0.tar"))
    cache.path(store.put("lru/3.tar", content(3)))
    assert copies(tmp_path) == ["0.tar", "2.tar", "3.tar"]
    cache.path(store.put("lru/4.tar", content(4, 2 * _SIZE)))
    assert copies(tmp_path) == ["3.tar", "4.tar"]
    counts = cache.take_counts()
    assert counts == {"downloads": 5, "downloaded_bytes": 6 * _SIZE, "evictions": 3}
    assert cache.take_counts() == {}


def test_a_long_download_counts_as_used_when_it_ends(store: ObjectStore, tmp_path: Path) -> None:
    cache = make_cache(tmp_path, limit=2.5 * _SIZE)
    urls = [store.put(f"long/{number}.tar", content(number)) for number in range(3)]
    cache.path(urls[0])
    fault = store.stall("long/1.tar", 100_000)
    with ThreadPoolExecutor(1) as pool:
        fetched = pool.submit(cache.path, urls[1])
        assert fault.reached.wait(30)
        time.sleep(0.02)  # beyond the clock ticks of a file system
        cache.path(urls[0])
        fault.go.set()
        fetched.result()
    cache.path(urls[2])
    assert copies(tmp_path) == ["1.tar", "2.tar"]


def test_files_of_others_stay_whatever_the_limit(store: ObjectStore, tmp_path: Path) -> None:
    cache = make_cache(tmp_path, limit=1.5 * _SIZE)
    cache.path(store.put("others/0.tar", content(0)))
    mine = [tmp_path / "cache" / "mine.tar", tmp_path / "cache" / "copies" / "mine.tar"]
    for path in mine:
        path.write_bytes(content(1))
    cache.path(store.put("others/1.tar", content(2)))
    assert all(path.exists() for path in mine)


def test_an_open_shard_is_read_to_its_end_after_it_went(store: ObjectStore, tmp_path: Path) -> None:
    cache = make_cache(tmp_path, limit=1.5 * _SIZE)
    with open(cache.path(store.put("open/0.tar", content(0))), "rb") as file:
        cache.path(store.put("open/1.tar", content(1)))
        assert copies(tmp_path) == ["1.tar"]
        assert file.read() == content(0)


def _fetch_several(cache: ShardCache, urls: list[str]) -> None:
    for url in urls:
        cache.path(url)


def test_the_limit_holds_for_all_processes_together(store: ObjectStore, tmp_path: Path) -> None:
    urls = [store.put(f"many/{number}.tar", content(number, 50_000)) for number in range(12)]
    cache = make_cache(tmp_path, limit=3.5 * 50_000)
    finish(*(start("fork", _fetch_several, cache, urls[first::3]) for first in range(3)))
    assert 0 < len(copies(tmp_path)) <= 3


@pytest.mark.parametrize("protocol", _PROTOCOLS)
def test_a_shard_larger_than_the_cache_is_given_up_at_its_first_bytes(
    store: ObjectStore, tmp_path: Path, protocol: str
) -> None:
    store.put("large.tar", content(12))
    fault = store.stall("large.tar", 100_000)
    cache = make_cache(tmp_path, limit=_SIZE - 1)
    with pytest.raises(SampleError, match=r"data\.cache\.limit_gib") as caught:
        cache.path(store.url("large.tar", protocol))
    assert caught.value.cause == "cache_full"
    assert not fault.go.is_set()
    assert copies(tmp_path) == partials(tmp_path) == []


def _full_disk(cache: ShardCache, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Make the next files that are written lie on a device without room."""
    partial, left = cache._partial, [times]

    def full(name: str) -> Path:
        path = partial(name)
        left[0] -= 1
        if left[0] >= 0:
            path.symlink_to("/dev/full")
        return path

    monkeypatch.setattr(cache, "_partial", full)


def test_a_full_disk_costs_the_least_recently_used_shard(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(tmp_path, attempts=1)
    for number in range(3):
        cache.path(store.put(f"disk/{number}.tar", content(number)))
    store.put("disk/3.tar", content(3))
    _full_disk(cache, monkeypatch, times=1)
    assert Path(cache.path(store.url("disk/3.tar"))).read_bytes() == content(3)
    assert copies(tmp_path) == ["1.tar", "2.tar", "3.tar"]


def test_a_disk_that_stays_full_is_said(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(tmp_path)
    _full_disk(cache, monkeypatch, times=9)
    with pytest.raises(SampleError, match=r"data\.cache\.folder=.*make room") as caught:
        cache.path(store.put("disk/4.tar", content(4)))
    assert caught.value.cause == "cache_full"
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert partials(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_said(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(SampleError, match=r"unwritable_cache: data\.cache\.folder="):
        make_cache(tmp_path).path(store.put("folder.tar", content(0)))


def test_an_unknown_protocol_is_not_tried_twice(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=r"unreachable_shard: nonsense://a/b\.tar: 1 of 3 tries"):
        make_cache(tmp_path).path("nonsense://a/b.tar")


def _fetch_as_child(cache: ShardCache, urls: list[str]) -> None:
    assert cache.take_counts() == {}
    for url in urls:
        cache.path(url)
    # would end the parent's clients, which the child has no use for
    gc.collect()
    assert cache.take_counts()["downloads"] == len(urls)


@pytest.mark.parametrize("protocol", _PROTOCOLS)
def test_a_process_forked_in_the_middle_of_a_download_has_a_cache_of_its_own(
    store: ObjectStore, tmp_path: Path, protocol: str
) -> None:
    for number in range(5):
        store.put(f"fork/{number}.tar", content(number))
    urls = [store.url(f"fork/{number}.tar", protocol) for number in range(5)]
    cache = make_cache(tmp_path)
    cache.path(urls[0])
    fault = store.stall("fork/1.tar", 1000)
    thread = threading.Thread(target=cache.path, args=(urls[1],))
    thread.start()
    assert fault.reached.wait(_WAIT_S)
    # the state's lock is held at the fork, as another thread may hold it
    with cache._here.lock:
        process = start("fork", _fetch_as_child, cache, urls[2:4])
    finish(process)
    # the parent's connections are as they were, those in use and those that wait
    cache.path(urls[4])
    fault.go.set()
    thread.join(_WAIT_S)
    assert cache.take_counts() == {"downloads": 3, "downloaded_bytes": 3 * _SIZE}


def test_a_pickled_cache_knows_its_folder_and_no_counts(store: ObjectStore, tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    path = cache.path(store.put("pickle.tar", content(0)))
    other: ShardCache = pickle.loads(pickle.dumps(cache))
    assert other.take_counts() == {}
    assert other.path(store.url("pickle.tar")) == path
    assert len(store.downloads("pickle.tar")) == 1


@pytest.mark.parametrize("after", [-1, 1000])
def test_a_download_ends_when_nobody_wants_it(store: ObjectStore, tmp_path: Path, after: int) -> None:
    store.put("stop.tar", content(0))
    fault, stop = store.stall("stop.tar", after), threading.Event()
    threading.Thread(target=lambda: (fault.reached.wait(_WAIT_S), stop.set())).start()
    cache = make_cache(tmp_path, timeout_s=10 * _WAIT_S)
    with pytest.raises(Cancelled):
        cache.path(store.url("stop.tar"), stop)
    assert not fault.go.is_set()
    # and it is no failure
    assert Path(cache.path(store.url("stop.tar"))).read_bytes() == content(0)


def test_waiting_for_another_process_ends_when_nobody_wants_it(store: ObjectStore, tmp_path: Path) -> None:
    store.put("wait.tar", content(0))
    fault, stop = store.stall("wait.tar", 1000), threading.Event()
    cache = make_cache(tmp_path, timeout_s=10 * _WAIT_S)
    process = start("fork", _path, cache, store.url("wait.tar"))
    assert fault.reached.wait(_WAIT_S)
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(Cancelled):
        cache.path(store.url("wait.tar"), stop)
    fault.go.set()
    finish(process)


class Compute:
    """What `derived` computes; counts its calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, path: str) -> bytes:
        self.folder.mkdir(exist_ok=True)
        (self.folder / str(time.monotonic_ns())).touch()
        return Path(path).read_bytes()[::-1]

    @property
    def calls(self) -> int:
        return len(list(self.folder.iterdir())) if self.folder.exists() else 0


def test_what_is_made_from_a_file_is_kept_until_the_file_changes(tmp_path: Path) -> None:
    shard, compute = tmp_path / "0.tar", Compute(tmp_path / "calls")
    shard.write_bytes(b"abc")
    for _ in range(2):
        assert make_cache(tmp_path).derived(str(shard), "index", compute) == b"cba"
    assert compute.calls == 1
    assert make_cache(tmp_path).derived(str(shard), "other", compute) == b"cba"
    assert compute.calls == 2
    shard.write_bytes(b"abcd")
    assert make_cache(tmp_path).derived(str(shard), "index", compute) == b"dcba"
    os.utime(shard, ns=(0, 12345))
    make_cache(tmp_path).derived(str(shard), "index", compute)
    assert compute.calls == 4
    assert partials(tmp_path) == []


def _derive(cache: ShardCache, path: str, compute: Compute) -> None:
    for _ in range(20):
        assert cache.derived(path, "index", compute) == b"cba" * 10_000


def test_processes_share_what_is_made_from_a_file(tmp_path: Path) -> None:
    shard, compute = tmp_path / "0.tar", Compute(tmp_path / "calls")
    shard.write_bytes(b"abc" * 10_000)
    finish(*(start("fork", _derive, make_cache(tmp_path), str(shard), compute) for _ in range(3)))
    assert 1 <= compute.calls <= 3


def test_without_a_folder_each_call_computes_and_one_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file")
    shard, compute, cache = tmp_path / "0.tar", Compute(tmp_path / "calls"), make_cache(tmp_path)
    shard.write_bytes(b"abc")
    for _ in range(3):
        assert cache.derived(str(shard), "index", compute) == b"cba"
    assert compute.calls == 3
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_file_that_cannot_be_read_gives_nothing(tmp_path: Path) -> None:
    cache, compute = make_cache(tmp_path), Compute(tmp_path / "calls")
    with pytest.raises(SampleError, match="missing_shard"):
        cache.derived(str(tmp_path / "none.tar"), "index", compute)
    with pytest.raises(SampleError, match="unreadable_shard"):
        cache.derived(str(tmp_path), "index", compute)


def test_what_is_made_from_files_counts_to_the_limit(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, compute = make_cache(tmp_path, limit=1.5 * _SIZE), Compute(tmp_path / "calls")
    shards = [tmp_path / f"{number}.tar" for number in range(8)]
    for shard in shards:
        shard.write_bytes(content(0, _SIZE // 4))
    for shard in shards[:4]:
        cache.derived(str(shard), "index", compute)
    cache.path(store.put("derived.tar", content(1)))
    assert cache.take_counts()["evictions"] == 2
    # without downloads, too
    monkeypatch.setattr(cache_module, "_EVICT_EVERY", 2)
    for shard in shards[4:]:
        cache.derived(str(shard), "index", compute)
    total = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert total <= 1.5 * _SIZE
