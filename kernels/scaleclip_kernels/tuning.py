"""How each kernel is launched on each architecture: a table that `tools/tune_kernels.py` measures anew on hardware.

No entry was timed yet: they were chosen from machine code compiled ahead of time (`tools/inspect_kernels.py`), for full use of
the matrix units without spills. Nothing is tuned at run time: the same launch in every run is what bit-equal resume needs.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import torch

Kernel = Literal["softmax_sums", "softmax_gradients", "sigmoid"]
KERNELS: tuple[Kernel, ...] = ("softmax_sums", "softmax_gradients", "sigmoid")


@dataclass(frozen=True)
class Launch:
    """A tile of logits and the resources of the block that computes it."""

    block_rows: int
    block_columns: int
    block_dim: int
    """Feature dims a step of the main loop."""
    num_warps: int
    num_stages: int
    """Steps of the main loop whose features are on their way or in shared memory."""
    tma: bool = False
    """Features come through the tensor memory accelerator, where their rows are aligned to 16 bytes."""
    group: int = 8
    """Row tiles that meet one column tile before the next one is taken."""


# The interpreter needs about a millisecond an operation whatever its size, so tiles are not small; they divide no test's shapes.
INTERPRETER = Launch(32, 64, 32, num_warps=4, num_stages=1)
# Any GPU that is not in the table: small tiles fit 99 KiB of shared memory (sm86, sm89, sm120) and 64 KiB (AMD).
FALL_BACK = {2: Launch(64, 64, 32, num_warps=4, num_stages=2), 4: Launch(64, 64, 32, num_warps=4, num_stages=1)}

TABLE: dict[str, dict[tuple[Kernel, int], Launch]] = {}
"""Architecture -> (kernel, bytes of a feature) -> launch."""


def launch_for(kernel: Kernel, dtype: torch.dtype, device: torch.device) -> Launch:
    """The entry for features of `dtype`; a CPU is Triton's interpreter."""
    if device.type == "cpu":
        return INTERPRETER
    return TABLE.get(architecture(device), {}).get((kernel, dtype.itemsize), FALL_BACK[dtype.itemsize])


@functools.cache
def architecture(device: torch.device) -> str:
    """Such as sm90 or gfx942."""
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"
