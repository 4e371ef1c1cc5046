"""Work in a thread that does not keep the process alive."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def begin(work: Callable[[], T]) -> "Future[T]":
    """Start `work` in a thread of its own; the future has its result or what it raised."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def failure(work: "Future[T]") -> Exception | None:
    """What work that is done has raised."""
    error = work.exception()
    assert error is None or isinstance(error, Exception)
    return error


def finished(result: T) -> "Future[T]":
    """A future without work, for the ranks that have none."""
    future: Future[T] = Future()
    future.set_result(result)
    return future
