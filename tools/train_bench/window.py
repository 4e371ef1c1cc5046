"""The steps of a trainer's run that count: after the warm-up, and before the last one, which ends with saves."""

from collections.abc import Iterator
from typing import Any, TypeVar

import psutil
import torch

from train_bench.laps import Stopwatch
from train_bench.points import DATA, PeerJob, Seconds

T = TypeVar("T")


class Window:
    """Watches a run through its loader: a step begins where the trainer asks for a batch."""

    def __init__(self, job: PeerJob) -> None:
        self.watch = Stopwatch()
        self._begin, self._end = job.warm_up, job.warm_up + job.steps
        self._is_cuda = job.device == "cuda"
        self._cpu_s: dict[int, float] = {}
        self.peak_bytes = 0
        """Allocated on a GPU at once in the steps that count."""

    def watched(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; waiting for one is the part DATA."""
        while True:
            number = len(self.watch.steps)
            if number in (self._begin, self._end):
                self._mark(number)
            self.watch.next_step()
            with self.watch.part(DATA):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _mark(self, number: int) -> None:
        """A GPU's work of the steps before is waited for, so that the steps that count take all of theirs and no other."""
        if self._is_cuda:
            torch.cuda.synchronize()
            if number == self._begin:
                torch.cuda.reset_peak_memory_stats()
            self.peak_bytes = torch.cuda.max_memory_allocated()
        self._cpu_s[number] = _cpu_s()

    @property
    def steps(self) -> list[Seconds]:
        """That count."""
        return self.watch.steps[self._begin : self._end]

    @property
    def cpu_s(self) -> float:
        """Processor time of the steps that count, loader processes included."""
        return self._cpu_s[self._end] - self._cpu_s[self._begin]


def _cpu_s() -> float:
    """Of this process and its loader processes so far."""
    process: Any = psutil.Process()
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return float(sum(time.user + time.system for time in times))
