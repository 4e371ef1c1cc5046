"""The interpreter and the profiler while a run trains."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch

_SKIPPED, _WARM_UP, _TRACED = 3, 1, 3


class Trace(Protocol):
    """What is told of every step."""

    def step(self) -> None:
        """A step was taken."""


@contextlib.contextmanager
def collected_at_log_steps() -> Iterator[Callable[[], object]]:
    """Garbage is collected when the given function is called, and not in the middle of a step.

    A collection stops this rank, and all others wait for it at their next collective; at a log step the host waits for the
    device anyway.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.enable()
        gc.unfreeze()


def give_back_memory(device: torch.device) -> None:
    """Free what nobody refers to any more, also where an allocator keeps it: another process's view of the device, and this
    one's of what is free, see it then."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()
        torch.cuda.reset_peak_memory_stats(device)


@contextlib.contextmanager
def fixed_order_kernels(wanted: bool) -> Iterator[None]:
    """Where wanted, operations inside add in a fixed order, or raise a RuntimeError that names the one that cannot.

    To be entered before anything is multiplied on a GPU: cuBLAS reads its setting, which stays in the environment, once.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@contextlib.contextmanager
def traced(path: Path | None) -> Iterator[Trace]:
    """Write a trace of a few steps, after the first ones, to `path`, for chrome://tracing or Perfetto; no path, no trace."""
    if path is None:
        yield _NoTrace()
        return

    def write(profiler: torch.profiler.profile) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))

    schedule = torch.profiler.schedule(wait=_SKIPPED, warmup=_WARM_UP, active=_TRACED, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profiler:
        yield profiler


class _NoTrace:
    def step(self) -> None:
        pass
