"""Samples of shards, read and prepared ahead of a model by loader processes, a piece of a shard at a time."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch._C import _error_if_any_worker_fails
from torch.utils.data import DataLoader, Dataset

from scaleclip.data.manifest import Manifest
from scaleclip.data.open_shards import allow_open_files
from scaleclip.data.sample import Sample, SampleError
from scaleclip.data.source import Reader
from scaleclip.errors import RunError
from scaleclip.parent_death import end_with_parent

Item = TypeVar("Item")
Content = TypeVar("Content")

# of a shard and not of a sample; another start may find it
_OF_A_SHARD = ("missing_shard", "forbidden_shard", "unreachable_shard", "unreadable_shard", "cache_full", "unwritable_cache")
_AHEAD = 4  # pieces a loader process
_WORKER_DIED = "DataLoader worker"  # as torch.utils.data begins to say it


class Piece(NamedTuple):
    """Samples `start` to `stop` of a shard, of those that the manifest counts."""

    shard: int
    start: int
    stop: int


class BadSample(NamedTuple):
    """A sample that cannot be used."""

    key: str
    """Empty where even that is unknown."""
    shard: str
    sample: int
    """Its number in the shard, of all that it holds."""
    cause: str
    """What it is counted as."""
    detail: str
    """What was wrong, for people."""


class Chunk(NamedTuple, Generic[Content]):
    """What was read of a piece, in its order."""

    piece: Piece
    keys: tuple[str, ...]
    """Of the samples that can be used."""
    ordinals: tuple[int, ...]
    """Their numbers in the shard, of all that it holds."""
    content: Content | None
    """Made of them; None without any."""
    bad: tuple[BadSample, ...]
    error: str
    """Why the shard cannot be had, or empty; the rest is then void."""


class ReadAhead(Generic[Item, Content]):
    """Reads pieces of shards.

    Args:
        manifest: the shards.
        reader: reads them.
        prepare: (sample, shard, ordinal) -> what is wanted of it; raises SampleError for one that cannot be used.
        collate: what is made of the items of a piece, one at least. Both run in loader processes, if there are any.
        workers: loader processes.
    """

    def __init__(
        self,
        manifest: Manifest,
        reader: Reader,
        prepare: Callable[[Sample, int, int], Item],
        collate: Callable[[Sequence[Item]], Content],
        workers: int,
    ) -> None:
        self._manifest, self._reader = manifest, reader
        self._prepare, self._collate, self._workers = prepare, collate, workers

    def chunks(self, pieces: Sequence[Piece], *, pin_memory: bool) -> Iterator[Chunk[Content]]:
        """Those of some pieces, in their order. Loader processes are started at once: they share what is open, locks too.

        Raises:
            RunError: while it is gone through, where a loader process died.
        """
        if not pieces:
            return iter(())
        allow_open_files()
        # torch raises a loader process's death wherever this process happens to be: only while a chunk is waited for, here
        before = signal.getsignal(signal.SIGCHLD)
        try:
            chunks = iter(
                DataLoader(
                    _Pieces(self, pieces),
                    batch_size=None,
                    sampler=range(len(pieces)),
                    collate_fn=_as_is,
                    num_workers=self._workers,
                    prefetch_factor=_AHEAD if self._workers else None,
                    worker_init_fn=partial(_start_worker, os.getpid()),
                    pin_memory=pin_memory,
                    multiprocessing_context="fork" if self._workers else None,
                )
            )
            raises = signal.getsignal(signal.SIGCHLD)
        finally:
            signal.signal(signal.SIGCHLD, before)
        return self._watched(chunks, raises)

    def _watched(self, chunks: Iterator[Chunk[Content]], raises: Any) -> Iterator[Chunk[Content]]:
        while True:
            before = signal.signal(signal.SIGCHLD, raises)
            try:
                # of one that died in the meantime; it may have left half a chunk, which would be waited for without end
                _error_if_any_worker_fails()
                chunk = next(chunks, None)
            except RuntimeError as error:
                if _WORKER_DIED not in str(error):
                    raise
                raise RunError(
                    "a loader process died: look for an out-of-memory kill in dmesg, or take fewer --workers; what is written "
                    "is safe: start the same command again"
                ) from error
            finally:
                signal.signal(signal.SIGCHLD, before)
            if chunk is None:
                return
            yield chunk

    def read(self, piece: Piece) -> Chunk[Content]:
        """A piece, in this process."""
        keys, ordinals, items, bad = list[str](), list[int](), list[Item](), list[BadSample]()
        shard = piece.shard
        try:
            self._reader.fetch(shard)
            for index in range(piece.start, piece.stop):
                ordinal, key = self._manifest.ordinal(shard, index), ""
                try:
                    sample = self._reader(shard, ordinal)
                    key = sample.key
                    items.append(self._prepare(sample, shard, ordinal))
                except SampleError as fault:
                    if fault.cause in _OF_A_SHARD:
                        raise
                    bad.append(BadSample(key, self._manifest.names[shard], ordinal, fault.cause, fault.detail))
                    continue
                keys.append(key)
                ordinals.append(ordinal)
        except SampleError as fault:
            return Chunk(piece, (), (), None, (), str(fault))
        return Chunk(piece, tuple(keys), tuple(ordinals), self._collate(items) if items else None, tuple(bad), "")


class _Pieces(Dataset[Chunk[Any]]):
    def __init__(self, ahead: ReadAhead[Any, Any], pieces: Sequence[Piece]) -> None:
        self._ahead, self._pieces = ahead, pieces

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, item: int) -> Chunk[Any]:
        return self._ahead.read(self._pieces[item])


def cut(shard: int, num_samples: int, size: int) -> list[Piece]:
    """A shard in pieces of `size` samples; one without samples is one piece, too."""
    return [Piece(shard, start, min(start + size, num_samples)) for start in range(0, max(num_samples, 1), size)]


def _as_is(chunk: Any) -> Any:
    return chunk


def default_workers(local_ranks: int) -> int:
    """Loader processes of a rank: its share of the processors that it may use."""
    # srun binds each rank to its own, torchrun's share theirs
    allowed = len(os.sched_getaffinity(0)) // (local_ranks if "TORCHELASTIC_RUN_ID" in os.environ else 1)
    return max(1, min(allowed, (os.cpu_count() or 1) // local_ranks))


def _start_worker(parent: int, worker: int) -> None:
    # torch's own watch over the parent ends in a queue that nobody empties, with locks that the next start asks for
    end_with_parent(parent)
    # a terminal sends it to the main process too, which ends the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
