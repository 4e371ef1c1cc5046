"""Fetching shards ahead of the reader."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from object_store import object_store
from scaleclip.config import CacheConfig
from scaleclip.data.cache import ShardCache
from scaleclip.data.prefetch import Prefetcher
from scaleclip.data.remote import Cancelled
from scaleclip.data.sample import SampleError

_WAIT_S = 60.0


class Shelf(ShardCache):
    """A cache that gives a local file of `size` bytes for every shard, and knows which were asked for, in order."""

    def __init__(self, folder: Path, size: int = 10) -> None:
        super().__init__(CacheConfig(folder=str(folder)))
        self._file = folder / "shard.tar"
        self._file.write_bytes(bytes(size))
        self.asked: list[str] = []
        self.broken: set[str] = set()
        self.slow: dict[str, threading.Event] = {}

    def path(self, url: str, stop: threading.Event | None = None) -> str:
        self.asked.append(url)
        while url in self.slow and not self.slow[url].wait(0.01):
            if stop and stop.is_set():
                raise Cancelled
        if url in self.broken:
            raise SampleError("missing_shard", url)
        return str(self._file)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


class Needs:
    """Two shards a block of batches, and how often each batch was looked at."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.looked: list[int] = []

    def __call__(self, batch: int) -> list[str]:
        self.looked.append(batch)
        return self.of(batch // self.block)

    def of(self, block: int) -> list[str]:
        """Shards of a block."""
        return [f"s3://b/{block}-{number}.tar" for number in range(2)]


@pytest.fixture
def prefetch() -> Iterator[Callable[..., Prefetcher]]:
    """Makes prefetchers that are closed at the end."""
    made = []

    def make(needs: Callable[[int], list[str]], cache: ShardCache, shards: int = 100, num_bytes: int = 10**9) -> Prefetcher:
        made.append(Prefetcher(needs, cache, most_shards=shards, most_bytes=num_bytes))
        return made[-1]

    yield make
    for prefetcher in made:
        prefetcher.close()


def until(ready: Callable[[], Any]) -> None:
    """Wait for what threads will do."""
    deadline = time.monotonic() + _WAIT_S
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def settled(shelf: Shelf) -> list[str]:
    """What was asked for, once nothing more comes."""
    asked = -1
    while len(shelf.asked) != asked:
        asked = len(shelf.asked)
        time.sleep(0.15)
    return shelf.asked


def test_a_window_of_shards_is_fetched_ahead_and_moves_with_the_reader(
    shelf: Shelf, prefetch: Callable[..., Prefetcher]
) -> None:
    needs = Needs(block=100)
    prefetcher = prefetch(needs, shelf, shards=2)
    prefetcher.start(0, 10_000)
    # what the first batch needs is not ahead of it
    assert set(settled(shelf)) == {*needs.of(0), *needs.of(1)}
    prefetcher.at(50)
    assert set(settled(shelf)) == {*needs.of(0), *needs.of(1)}
    prefetcher.at(100)
    assert set(settled(shelf)) == {*needs.of(0), *needs.of(1), *needs.of(2)}
    assert len(shelf.asked) == 6


def test_shards_are_fetched_in_the_order_of_need_and_once(shelf: Shelf, prefetch: Callable[..., Prefetcher]) -> None:
    needs = Needs(block=3)
    prefetcher = prefetch(needs, shelf, shards=8)
    shelf.slow = {url: threading.Event() for block in range(200) for url in needs.of(block)}
    prefetcher.start(6, 10_000)
    until(lambda: len(shelf.asked) == 4)
    assert set(shelf.asked) == {*needs.of(2), *needs.of(3)}
    for event in shelf.slow.values():
        event.set()
    for batch in range(6, 300):
        prefetcher.at(batch)
        until(lambda batch=batch: set(needs.of(batch // 3)) <= set(shelf.asked))
    assert len(set(settled(shelf))) == len(shelf.asked)
    assert len(set(needs.looked)) == len(needs.looked)
    blocks = [int(url.split("/")[-1].split("-")[0]) for url in shelf.asked]
    # four threads take them in order
    assert all(later >= max(blocks[: place + 1]) - 2 for place, later in enumerate(blocks))


def test_few_batches_are_looked_at_where_shards_stay_long(shelf: Shelf, prefetch: Callable[..., Prefetcher]) -> None:
    needs = Needs(block=300)
    prefetcher = prefetch(needs, shelf, shards=6)
    prefetcher.start(0, 10_000)
    assert set(settled(shelf)) == {url for block in range(4) for url in needs.of(block)}
    assert max(needs.looked) >= 900
    assert len(needs.looked) < 200


def test_looking_ends_where_all_shards_are_known_and_at_the_last_batch(
    shelf: Shelf, prefetch: Callable[..., Prefetcher]
) -> None:
    always = Needs(block=10**9)
    prefetch(always, shelf, shards=6).start(0, 10**9)
    settled(shelf)
    assert max(always.looked) < 1100
    short = Needs(block=2)
    prefetch(short, shelf, shards=100).start(0, 5)
    assert set(settled(shelf)) == {url for block in range(3) for url in short.of(block)}


def test_no_batch_is_looked_at_while_the_window_is_full(shelf: Shelf, prefetch: Callable[..., Prefetcher]) -> None:
    needs = Needs(block=1)
    prefetcher = prefetch(needs, shelf, shards=10)
    prefetcher.start(0, 10_000)
    settled(shelf)
    assert needs.looked == [0, 1, 2, 3, 4, 5]


def test_a_shard_per_batch_is_not_stepped_over(shelf: Shelf, prefetch: Callable[..., Prefetcher]) -> None:
    # long the same, then new ones with every batch
    def needs(batch: int) -> list[str]:
        return [f"s3://b/{max(batch - 100, 0)}.tar"]

    prefetcher = prefetch(needs, shelf, shards=40)
    prefetcher.start(0, 10_000)
    assert settled(shelf)[:41] == [f"s3://b/{number}.tar" for number in range(41)]


def test_no_download_begins_beyond_the_bytes_ahead(tmp_path: Path, prefetch: Callable[..., Prefetcher]) -> None:
    shelf, needs = Shelf(tmp_path, size=1000), Needs(block=10)
    prefetcher = prefetch(needs, shelf, num_bytes=3000)
    prefetcher.start(0, 10_000)
    # block 0 is not ahead; when the third shard ahead is there, three more may be on their way
    before = len(settled(shelf))
    assert 2 + 3 <= before <= 2 + 3 + 3
    prefetcher.at(20)
    assert len(settled(shelf)) > before


def test_a_reader_that_overtakes_leaves_what_is_behind_unfetched(shelf: Shelf, prefetch: Callable[..., Prefetcher]) -> None:
    needs = Needs(block=1)
    shelf.slow = {url: threading.Event() for block in range(2) for url in needs.of(block)}
    prefetcher = prefetch(needs, shelf, shards=20)
    prefetcher.start(0, 10_000)
    until(lambda: len(shelf.asked) == 4)
    prefetcher.at(1000)
    for event in shelf.slow.values():
        event.set()
    asked = settled(shelf)
    assert set(asked[4:6]) == set(needs.of(1000))
    assert not {*needs.of(5), *needs.of(999)} & set(asked)


def test_a_shard_that_fails_is_logged_once_and_left_to_the_reader(
    shelf: Shelf, prefetch: Callable[..., Prefetcher], caplog: pytest.LogCaptureFixture
) -> None:
    # the same shards come back in every epoch
    def needs(batch: int) -> list[str]:
        return [f"s3://b/{batch // 40 % 3}.tar"]

    shelf.broken = {"s3://b/1.tar"}
    prefetcher = prefetch(needs, shelf, shards=1)
    prefetcher.start(0, 10_000)
    for batch in range(0, 400, 40):
        prefetcher.at(batch)
        settled(shelf)
    assert shelf.asked.count("s3://b/1.tar") >= 3
    assert shelf.asked.count("s3://b/2.tar") >= 3
    assert [record.message for record in caplog.records if record.name == "scaleclip.data.prefetch"] == [
        "s3://b/1.tar could not be fetched ahead: missing_shard: s3://b/1.tar"
    ]


def test_an_order_that_fails_is_logged(
    shelf: Shelf, prefetch: Callable[..., Prefetcher], caplog: pytest.LogCaptureFixture
) -> None:
    def needs(batch: int) -> list[str]:
        if batch == 3:
            raise RuntimeError("no such batch")
        return [f"s3://b/{batch}.tar"]

    prefetcher = prefetch(needs, shelf)
    prefetcher.start(0, 10_000)
    until(lambda: "no such batch" in caplog.text)  # caplog keeps a record before it has formatted it
    assert settled(shelf) == [f"s3://b/{batch}.tar" for batch in range(3)]


def test_closing_ends_all_threads_in_the_middle_of_downloads(shelf: Shelf) -> None:
    needs = Needs(block=1)
    shelf.slow = {url: threading.Event() for block in range(2) for url in needs.of(block)}
    prefetcher = Prefetcher(needs, shelf, most_shards=10, most_bytes=10**9)
    prefetcher.start(0, 10_000)
    until(lambda: len(shelf.asked) == 4)
    prefetcher.close()
    prefetcher.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_shards_of_a_real_store_are_at_hand_before_the_reader_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefetch: Callable[..., Prefetcher]
) -> None:
    with object_store() as store:
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        urls = [store.put(f"{number}.tar", bytes([number]) * 1000) for number in range(6)]
        cache = ShardCache(CacheConfig(folder=str(tmp_path / "cache")))
        prefetcher = prefetch(lambda batch: [urls[min(batch // 10, 5)]], cache, shards=2)
        prefetcher.start(0, 10_000)
        until(lambda: len(store.downloads("0.tar")) + len(store.downloads("1.tar")) + len(store.downloads("2.tar")) == 3)
        fault = store.stall("3.tar", 500)
        prefetcher.at(15)
        assert fault.reached.wait(_WAIT_S)
        # a loader process forked meanwhile reads on its own
        child = os.fork()
        if child == 0:
            os._exit(0 if Path(cache.path(urls[4])).read_bytes() == bytes([4]) * 1000 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        fault.go.set()
        prefetcher.at(50)
        until(lambda: store.downloads("5.tar"))
        for number, url in enumerate(urls):
            assert Path(cache.path(url)).read_bytes() == bytes([number]) * 1000
        assert [len(store.downloads(f"{number}.tar")) for number in range(6)] == [1] * 6
        prefetcher.close()
