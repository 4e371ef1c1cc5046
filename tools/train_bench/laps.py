"""Wall time by step and part, taken by wrapping what a training loop calls."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from train_bench.points import OUTSIDE, Seconds


class Stopwatch:
    """Seconds by part, step by step. Parts may lie inside each other: time counts for the innermost one."""

    def __init__(self) -> None:
        self.steps: list[Seconds] = []
        """Finished ones and the present one."""
        self._open: list[str] = []
        self._since = time.perf_counter()

    @property
    def is_outside(self) -> bool:
        """Whether no part is open."""
        return not self._open

    def next_step(self) -> None:
        """What follows belongs to another step."""
        self._charge()
        self.steps.append({})

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is inside belongs to a part."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def timed(self, function: Callable[..., Any], name: str | Callable[[], str]) -> Callable[..., Any]:
        """`function` as a part, of which `name` may be asked at every call."""

        def timed_function(*args: Any, **kwargs: Any) -> Any:
            with self.part(name if isinstance(name, str) else name()):
                return function(*args, **kwargs)

        return timed_function

    def _charge(self) -> None:
        now = time.perf_counter()
        if self.steps:
            part = self._open[-1] if self._open else OUTSIDE
            self.steps[-1][part] = self.steps[-1].get(part, 0.0) + now - self._since
        self._since = now


class TimedCall:
    """An object whose calls are a part; all else is the object's own."""

    def __init__(self, target: Any, watch: Stopwatch, name: str) -> None:
        self._target, self._call = target, watch.timed(target, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)
