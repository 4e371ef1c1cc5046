"""Compilations in processes of their own: a compiler that gives up, or takes its process with it, costs one result."""

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
_LONGEST = 160


@dataclass(frozen=True)
class Failure:
    """In the place of a result."""

    reason: str


def work_on(
    work: Callable[[Task], Result], tasks: Sequence[Task], jobs: int, on_result: Callable[[], object]
) -> list[Result | Failure]:
    """Results in the order of the tasks.

    Args:
        on_result: called after each.
    """
    results: list[Result | Failure] = []
    with ProcessPoolExecutor(jobs) as pool:
        futures = [pool.submit(_attempt, work, task) for task in tasks]
        for task, future in zip(tasks, futures, strict=True):
            try:
                results.append(future.result())
            except BrokenProcessPool:
                results.append(_attempt_alone(work, task))
            on_result()
    return results


def _attempt_alone(work: Callable[[Task], Result], task: Task) -> Result | Failure:
    """A process that dies takes the results of the others with it, so each of them is made once more."""
    with ProcessPoolExecutor(1) as pool:
        try:
            return pool.submit(_attempt, work, task).result()
        except BrokenProcessPool:
            return Failure("the compiler ended its process")


def _attempt(work: Callable[[Task], Result], task: Task) -> Result | Failure:
    with _collected_stderr() as said:
        try:
            return work(task)
        except Exception as error:
            said.seek(0)
            return Failure(reason(error, said.read()))


def reason(error: BaseException, said: str) -> str:
    """One line: what the compiler said of its first error, or the first exception of those that led to this one."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in f"{said}\n{error}".splitlines() if line.strip()]
    first = next((number for number, line in enumerate(lines) if re.search("error|fatal", line, re.IGNORECASE)), len(lines) - 1)
    shown = " ".join(lines[first : first + 2]) or type(error).__name__
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]} ..."


@contextmanager
def _collected_stderr() -> Iterator[IO[str]]:
    """What compiled code writes there as well."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            os.dup2(kept, 2)
            os.close(kept)
