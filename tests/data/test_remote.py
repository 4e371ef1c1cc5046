"""Training batches from an object store that fails: a real S3 protocol server behind a proxy with faults."""

import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from object_store import ObjectStore, object_store
from scaleclip.config_io import load_config
from scaleclip.data import cache as cache_module
from scaleclip.data.batches import TrainBatches
from scaleclip.data.cache import ShardCache
from scaleclip.data.loader import Batch, TrainDataset
from scaleclip.data.source import open_sources
from scaleclip.data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("demo", 32)
NAMES = tuple(f"{number:05d}.tar" for number in range(4))


@pytest.fixture
def store(shards: Path, monkeypatch: pytest.MonkeyPatch):
    """The test's shards in a bucket."""
    monkeypatch.setattr(cache_module, "_PAUSE_S", 0.01)
    with object_store() as store:
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        for path in sorted(shards.iterdir()):
            store.put(path.name, path.read_bytes())
        store.clear()
        # filesystems of another test's store
        if "s3fs" in sys.modules:
            sys.modules["s3fs"].S3FileSystem.clear_instance_cache()
        yield store


def open_dataset(path: Path, *overrides: str) -> tuple[TrainDataset, object]:
    config = load_config(path, overrides)
    cache = ShardCache(config.data.cache)
    return TrainDataset(config, open_sources(config.data.sources, cache), cache, TOKENIZER, 0, 1), config.data


def read(path: Path, *overrides: str, last: int = 8) -> tuple[list[Batch], Counter[str]]:
    """Two epochs, and what was done in the cache for them."""
    dataset, config = open_dataset(path, *overrides)
    batches = TrainBatches(dataset, 0, last, config)
    found = list(batches)
    batches.close()
    return found, sum((Counter(batch.cache) for batch in found), dataset.cache.take_counts())


def remote(timeout_s: float = 30) -> list[str]:
    shards = "data.sources.tiny.shards=s3://shards/{00000..00003}.tar"
    return [shards, f"data.cache.timeout_s={timeout_s}", "data.cache.attempts=3"]


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    for mine, other in zip(left, right, strict=True):
        assert mine.keys == other.keys
        assert torch.equal(mine.pixels_BCHW, other.pixels_BCHW)
        assert all(torch.equal(a, b) for a, b in zip(mine.tokens_BT, other.tokens_BT, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_a_bucket_are_those_of_the_disk(tiny_config, store: ObjectStore, workers):
    local, _ = read(tiny_config)
    found, counts = read(tiny_config, *remote(), f"data.workers={workers}")
    assert_same(found, local)
    assert all(not batch.faults for batch in found)
    assert [len(store.downloads(name)) for name in NAMES] == [1] * 4, "once, by whichever process"
    assert counts["downloads"] == 4
    assert counts["downloaded_bytes"] == sum(request.sent for name in NAMES for request in store.downloads(name))
    assert not counts["retries"]


def test_no_thread_fetches_while_processes_are_forked(tiny_config, store: ObjectStore, monkeypatch: pytest.MonkeyPatch):
    """A thread may hold the lock of an import or of a shard, and a process forked meanwhile would wait for it for ever."""
    forked_beside: list[list[str]] = []
    start_workers = TrainBatches._start_workers

    def note(self):
        forked_beside.append([thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")])
        return start_workers(self)

    monkeypatch.setattr(TrainBatches, "_start_workers", note)
    dataset, config = open_dataset(tiny_config, *remote(), "data.workers=2")
    batches = TrainBatches(dataset, 0, 8, config)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")], "but afterwards they do"
    for worker in batches._batches._workers:
        os.kill(worker.pid, signal.SIGKILL)
    assert len(list(batches)) == 8
    batches.close()
    assert forked_beside == [[]] * (1 + batches.lost_workers)
    assert batches.lost_workers >= 1


def test_globs_of_a_bucket(tiny_config, store: ObjectStore):
    local, _ = read(tiny_config, last=2)
    found, _ = read(tiny_config, *remote(), "data.sources.tiny.shards=s3://shards/*.tar", last=2)
    assert_same(found, local)


FAULTS = {
    "500": lambda store: store.fail(NAMES[2], 500, 2),
    "throttled": lambda store: store.fail(NAMES[2], 503, 2),
    "cut bodies": lambda store: store.cut(NAMES[2], 5000, 2),
    "silent before the first byte": lambda store: store.stall(NAMES[2], -1),
    "silent in the middle": lambda store: store.stall(NAMES[2], 5000),
}
LONG = ("silent in the middle", "throttled")


@pytest.mark.parametrize("fault", [pytest.param(fault, marks=pytest.mark.slow) if fault in LONG else fault for fault in FAULTS])
def test_what_passes_is_tried_again_and_nothing_is_lost(tiny_config, store: ObjectStore, fault):
    local, _ = read(tiny_config)
    FAULTS[fault](store)
    silent = fault.startswith("silent")
    found, counts = read(tiny_config, *remote(timeout_s=3 if silent else 30))
    assert_same(found, local)
    assert all(not batch.faults for batch in found)
    if silent:  # for so long that a busy machine may find others silent, too
        assert len(store.downloads(NAMES[2])) >= 2
        assert counts["retries"] >= 1
    else:
        assert [len(store.downloads(name)) for name in NAMES] == [1, 1, 3, 1]
        assert counts["retries"] == 2
    assert counts["downloads"] == 4


@pytest.mark.parametrize(
    ("status", "times", "cause", "tries"),
    [(404, 9, "missing_shard", 1), (403, 9, "forbidden_shard", 1), (500, 9, "unreachable_shard", 3)],
)
def test_what_stays_bad_is_invalid_in_its_place_and_counted(tiny_config, store: ObjectStore, status, times, cause, tries):
    local, _ = read(tiny_config)
    store.fail(NAMES[1], status, times)
    found, _ = read(tiny_config, *remote())
    lost = {f"{number:09d}" for number in range(9, 13)}
    for mine, other in zip(found, local, strict=True):
        assert mine.keys == tuple("" if key in lost else key for key in other.keys)
        for slot, key in enumerate(other.keys):
            assert mine.valid_B[slot] == (key not in lost)
            assert key in lost or torch.equal(mine.pixels_BCHW[slot], other.pixels_BCHW[slot])
    faults = Counter((fault.source, fault.shard, fault.cause) for batch in found for fault in batch.faults)
    assert faults == {("tiny", f"s3://shards/{NAMES[1]}", cause): 8}, "four samples, two epochs"
    # asked for by the prefetcher and by the reader, and then no more
    assert tries <= len(store.downloads(NAMES[1])) <= 2 * tries


def test_a_cache_smaller_than_the_data_set_reads_it_again(tiny_config, store: ObjectStore, shards):
    local, _ = read(tiny_config, last=16)
    largest = max(path.stat().st_size for path in shards.glob("*.tar"))
    limit = f"data.cache.limit_gib={1.5 * largest / 2**30}"
    found, counts = read(tiny_config, *remote(), limit, last=16)
    assert_same(found, local)
    assert counts["evictions"] > 0
    copies = list((tiny_config.parent / "cache" / "copies").iterdir())
    assert sum(path.stat().st_size for path in copies) <= 1.5 * largest
