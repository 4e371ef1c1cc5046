"""What keeps a run from wasting its time: stopping on purpose, steps that fail, steps that never end.

A signal only sets a flag, and a step that is not finite is skipped on the device: the training loop acts on both at its log
steps. Only a hang ends a process from outside the loop.
"""

import contextlib
import faulthandler
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from scaleclip.distributed import gather_objects
from scaleclip.errors import HANG


class StopSignal:
    """Remembers the first SIGUSR2 (SLURM's warning, which may come while a run starts) that this process got, and once the run
    can save also SIGINT and SIGTERM, which end a start at once; a second SIGINT kills."""

    def __init__(self) -> None:
        self.received: int = 0
        """Number of the signal, 0 while there is none."""
        signal.signal(signal.SIGUSR2, self._remember)

    def can_save(self) -> None:
        """From now on the run acts on signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number


class _Step(NamedTuple):
    step: int
    bad: Tensor
    keys: tuple[str, ...]


class BadStep(NamedTuple):
    """A row of bad_steps.jsonl; a step that a stopped run takes again may have two."""

    step: int
    """Number of the step, from 1 on as in metrics.jsonl."""
    keys: list[str]
    """Keys of its samples, of all ranks; empty for those that were invalid."""


class BadSteps:
    """Steps whose loss or gradients were not finite. All ranks call each method alike.

    Args:
        most: bad steps in a row that are borne.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._noted: list[_Step] = []
        self.in_a_row = 0
        """Bad steps up to the last one read."""

    def note(self, step: int, bad: Tensor, keys: Sequence[str]) -> None:
        """Remember a step, its flag (bool, on the device) and the keys of its samples; nothing is read from the device."""
        self._noted.append(_Step(step, bad, tuple(keys)))

    def read(self) -> list[BadStep]:
        """The bad ones of the steps since the last call."""
        flags = torch.stack([noted.bad for noted in self._noted]).tolist()
        bad = [noted for noted, flag in zip(self._noted, flags, strict=True) if flag]
        for flag in flags:
            self.in_a_row = self.in_a_row + 1 if flag else 0
        self._noted.clear()
        if not bad:
            return []
        ranks = gather_objects([noted.keys for noted in bad])
        return [BadStep(noted.step, [key for keys in ranks for key in keys[number]]) for number, noted in enumerate(bad)]

    @property
    def too_many(self) -> bool:
        """Whether as many were bad in a row, up to the last one read, as are borne."""
        return self.in_a_row >= self._most

    def forgive(self) -> None:
        """Count afresh, after going back."""
        self.in_a_row = 0


class Watchdog:
    """Ends this process where it does not take a step in time, and writes down what each of its threads was doing.

    Every rank has one, and ranks that wait for a hanging one hang too: all leave their stacks.

    Args:
        timeout_s: seconds that a step may take.
        path: where the stacks go.
    """

    def __init__(self, timeout_s: float, path: Path) -> None:
        self._timeout_s, self._path = timeout_s, path
        self._last_s = time.monotonic()
        self._file = path.open("a")
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if self._path.stat().st_size == 0:
            self._path.unlink()

    def beat(self) -> None:
        """A step was taken."""
        self._last_s = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no step and may take longer."""
        self._last_s = math.inf
        yield
        self.beat()

    def _watch(self) -> None:
        while not self._end.wait(self._timeout_s / 10):
            # for a hang that holds the interpreter's lock: then this thread does not run, and a timer in C does
            faulthandler.dump_traceback_later(2 * self._timeout_s, file=self._file, exit=True)
            silent_s = time.monotonic() - self._last_s
            if silent_s > self._timeout_s * 0.9:
                faulthandler.dump_traceback(file=self._file)
                message = f"no step for {silent_s:.0f} s, and guard.hang_timeout_s={self._timeout_s:g}: this process ends; "
                print(f"{message}the stacks of its threads are in {self._path}", file=sys.stderr, flush=True)
                os._exit(HANG)


def record_bad_steps(folder: Path, bad: Sequence[BadStep]) -> None:
    """Append to bad_steps.jsonl of a run's folder. Rank 0 only."""
    with (folder / "bad_steps.jsonl").open("a") as file:
        file.writelines(json.dumps(step._asdict()) + "\n" for step in bad)
