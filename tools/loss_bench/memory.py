"""How much memory a step adds at its peak to what the process held before."""

import ctypes
import gc
import resource
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def added_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Run `step`; the peak of its memory above what was held when it began.

    On a CPU the peak of the resident set (VmHWM), so what libraries allocate is seen too. What earlier work freed is given
    back to the system first: malloc would serve the step from it, and hide it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not _STATUS.exists():
        # no peak of a part of the run: right as long as nothing before it took more
        before = _most_ever()
        step()
        return _most_ever() - before
    _give_back_freed()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = _resident("VmRSS")
    step()
    return max(_resident("VmHWM") - before, 0)


def _give_back_freed() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) << 10


def _most_ever() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
