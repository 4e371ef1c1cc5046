"""Batches in order, prepared ahead by loader processes; one that dies or hangs is replaced."""

import contextlib
import gc
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.synchronize import Semaphore
from typing import Any

import torch
from torch.utils.data import DataLoader

from scaleclip.config import DataConfig
from scaleclip.data.loader import Batch, TrainDataset
from scaleclip.data.open_shards import allow_open_files
from scaleclip.data.prefetch import Prefetcher
from scaleclip.data.shards import is_remote
from scaleclip.errors import RunError

_GRACE_S = 60
_START_S = 30.0
_LOCK_S = 1.0
_MOST_DEATHS = 5
_REAP_S = 1.0
_WORKER_DIED = "exited unexpectedly"  # as torch.utils.data says it
_log = logging.getLogger(__name__)


class TrainBatches(Iterator[Batch]):
    """Items `first` to `last` - 1 of a dataset in order, prepared ahead by `data.workers` processes.

    A loader process that dies (a crash in a decoder, the kernel's out-of-memory killer) or hangs as it starts is replaced;
    nothing is lost or read twice, since a batch depends on its number alone.

    Args:
        dataset: what a batch is.
        first: the first item.
        last: the last item + 1.
        config: the section `data`.
        pin_memory: put tensors into page-locked memory, for copies to a GPU.
        local_ranks: ranks of this node, which share its cache.

    Raises:
        RunError: loader processes die again and again at one item.
    """

    def __init__(
        self,
        dataset: TrainDataset,
        first: int,
        last: int,
        config: DataConfig,
        *,
        pin_memory: bool = False,
        local_ranks: int = 1,
    ) -> None:
        self._dataset, self._next, self._last = dataset, first, last
        self._config, self._pin_memory = config, pin_memory
        self.lost_workers = 0
        """Times that loader processes died or did not start, and all were replaced."""
        self._lost_in_a_row = 0
        self._local_ranks = local_ranks
        self._batches: Iterator[Batch] = iter(())
        self._prefetcher: Prefetcher | None = None
        allow_open_files()
        self._start()

    def __next__(self) -> Batch:
        while True:
            try:
                batch = next(self._batches)
            except (RuntimeError, OSError, EOFError) as error:
                if not self._is_death(error):
                    raise
                _kill(self._batches)
                self._count_lost_workers(repr(error))
                self.close()
                self._start()
                continue
            except StopIteration:
                self.close()
                raise
            self._lost_in_a_row = 0
            self._next += 1
            if self._prefetcher:
                self._prefetcher.at(self._next)
            return batch

    def restart(self, first: int, last: int) -> None:
        """Go on with items `first` to `last` - 1 instead."""
        self.close()
        self._next, self._last = first, last
        self._start()

    def close(self) -> None:
        """End the processes and threads."""
        _shut_down(self._batches)
        self._batches = iter(())
        if self._prefetcher:
            self._prefetcher.close()

    def _start(self) -> None:
        # processes first: a fork must not copy what the prefetcher's threads hold, the locks of imports among it
        self._batches = self._start_workers()
        self._prefetcher = _prefetcher(self._dataset, self._config, self._local_ranks)
        if self._prefetcher:
            self._prefetcher.start(self._next, self._last)

    def _start_workers(self) -> Iterator[Batch]:
        while True:
            started = multiprocessing.get_context("fork").Semaphore(0)
            batches = self._fork_workers(started)
            if all(started.acquire(timeout=_START_S) for _ in range(self._config.workers)):
                return batches
            # a fork may copy a lock of the interpreter's that another thread holds just then, and wait for it for ever
            _kill(batches)
            _shut_down(batches)
            self._count_lost_workers(f"a loader process did not start within {_START_S:.0f} s")

    def _fork_workers(self, started: Semaphore) -> Iterator[Batch]:
        workers = self._config.workers
        # torch raises a worker's death wherever the training process happens to be; here it is noticed at the next batch
        handler = signal.getsignal(signal.SIGCHLD)
        batches = iter(
            DataLoader(
                self._dataset,
                batch_size=None,
                sampler=range(self._next, self._last),
                collate_fn=_as_is,
                num_workers=workers,
                prefetch_factor=self._config.prefetch_batches if workers else None,
                worker_init_fn=partial(_start_worker, started),
                pin_memory=self._pin_memory,
                # whatever the process's own way is: open shards and indexes are shared, not pickled
                multiprocessing_context="fork" if workers else None,
            )
        )
        signal.signal(signal.SIGCHLD, handler)
        if workers:
            vars(batches)["_workers_done_event"] = _DoneEvent(vars(batches)["_workers_done_event"])
        return batches

    def _is_death(self, error: Exception) -> bool:
        """Whether a loader process died, and not something in it failed."""
        if isinstance(error, RuntimeError):
            return _WORKER_DIED in str(error)
        # the tensors of a batch are fetched from the process that made it, which may be gone by then
        workers = getattr(self._batches, "_workers", [])
        return bool(wait([worker.sentinel for worker in workers], timeout=_REAP_S))

    def _count_lost_workers(self, reason: str) -> None:
        self.lost_workers += 1
        self._lost_in_a_row += 1
        if self._lost_in_a_row > _MOST_DEATHS:
            raise RunError(
                f"loader processes were lost {self._lost_in_a_row} times at batch {self._next} ({reason}): look for an "
                f"out-of-memory kill in dmesg, lower data.workers or data.max_pixels, or set data.workers=0 to see where it "
                f"dies"
            )
        _log.warning(f"batch {self._next}: {reason}; new loader processes go on from there")


def _prefetcher(dataset: TrainDataset, config: DataConfig, local_ranks: int) -> Prefetcher | None:
    if not any(is_remote(shard) for source in dataset.sources for shard in source.manifest.shards):
        return None
    # a stream's next block while it reads the present one
    most_shards = dataset.num_streams * config.shuffle_shards * len(dataset.sources)
    most_bytes = int(config.cache.limit_gib * 2**30 / 2 / local_ranks)
    return Prefetcher(dataset.remote_shards, dataset.cache, most_shards=most_shards, most_bytes=most_bytes)


def _as_is(batch: Any) -> Any:
    return batch


class _DoneEvent:
    """torch's event that tells loader processes to end, as the training process sees it: a process that is killed while it
    looks at the event keeps its lock, and torch would wait for that."""

    def __init__(self, event: Any) -> None:
        self._event, self._is_set = event, False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        if self._event._cond.acquire(True, _LOCK_S):
            self._event._cond.release()
            self._event.set()


def _kill(batches: Iterator[Batch]) -> None:
    for worker in getattr(batches, "_workers", []):
        worker.kill()


def _shut_down(batches: Iterator[Batch]) -> None:
    # torch ends the processes at the end of the iterator, which the frames of an exception may keep. Its handler of signals,
    # where another loader of this process left it, tells of those that were killed
    with contextlib.suppress(RuntimeError):
        getattr(batches, "_shutdown_workers", int)()


def _start_worker(started: Semaphore, worker: int) -> None:
    # Signals that stop a run are for the training process; srun and a terminal send them to its children too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    # time for the training process to save; then the alarm ends a worker that nobody needs any more
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_GRACE_S))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.enable()  # which the training process leaves to its log steps
    torch.set_num_threads(1)
    started.release()
