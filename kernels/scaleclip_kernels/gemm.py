"""fp32 matrix products for the panels: the CPU library that is fast and still fp32, whatever torch's global flags say.

oneDNN's fp32 product can run at twice the rate of the one that PyTorch takes by default, but it is reached only through a flag
that permits bf16 arithmetic, and on some CPUs that is what it then does. So its error is checked before it is taken; its
speed is not, for a choice by timing would differ between runs and ranks and break bit-equal resume.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from scaleclip_kernels.blocks import row_chunks

CpuLibrary = Literal["onednn", "default"]
VARIABLE = "SCALECLIP_KERNELS_CPU_GEMM"

_lock = threading.Lock()
_inside: dict[int, list[str]] = {}
_onednn: Any = torch.backends.mkldnn
# of the default library's error against fp64; bf16 arithmetic is several thousand times off
_ALLOWED_ERROR = 3.0
_PROBE_ROWS, _PROBE_CHECKED = 1024, 32
# summed before they are added to the rest
_TERMS = 128


def fp32_library(device: torch.device, dim: int) -> str:
    """Name of the library behind `fp32_products`, for a run's record."""
    return cpu_library(dim) if device.type == "cpu" else device.type


def cpu_library(dim: int) -> CpuLibrary:
    """The library that fp32 products of panels with `dim` feature dims run on; the same in every process on a machine.

    SCALECLIP_KERNELS_CPU_GEMM=default|onednn overrules the check.

    Raises:
        ValueError: the variable holds anything else, or asks for oneDNN where PyTorch was built without it.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in ("auto", "default", "onednn"):
        raise ValueError(f"{VARIABLE}={wanted} is not one of default, onednn, auto")
    if wanted == "onednn" and not _has_onednn():
        raise ValueError(
            f"{VARIABLE}=onednn: this PyTorch has no oneDNN product with a precision of its own; unset the variable"
        )
    if wanted == "default" or not _has_onednn():
        return "default"
    return "onednn" if wanted == "onednn" or _onednn_is_fp32(dim) else "default"


@contextlib.contextmanager
def fp32_products(device: torch.device, dim: int) -> Iterator[None]:
    """fp32 products inside are fp32: no autocast, no TF32. Restores torch's flags, which are the whole process's."""
    with torch.autocast(device.type, enabled=False), contextlib.ExitStack() as flags:
        if device.type == "cpu" and _has_onednn():
            flags.enter_context(_onednn_precision("bf16" if cpu_library(dim) == "onednn" else "ieee"))
        if device.type == "cuda":
            flags.enter_context(_precision(torch.backends.cuda.matmul, "ieee"))
        yield


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in place, inside `fp32_products`.

    oneDNN adds up all of a product's terms one after the other, which leaves twice the rounding error of libraries that add in
    blocks. Short sums added to one another have less than either, at the same speed.
    """
    step = _TERMS if total.device.type == "cpu" else max(left.shape[1], 1)
    for start in range(0, left.shape[1], step):
        total.addmm_(left[:, start : start + step], right[start : start + step])


@torch.library.custom_op("scaleclip_kernels::add_panel_product", mutates_args=("total",))
def add_panel_product(total: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """total += factor * left @ right, in place: fp32 sums of products in the operands' dtype, fp32 never as TF32."""
    if left.dtype == torch.float32:
        with fp32_products(total.device, left.shape[1]):
            total.addmm_(left, right, alpha=factor)
    elif total.device.type == "cpu" or torch.version.hip is not None:
        # No product into fp32 there (of ROCm's, reports disagree): the same sums from widened operands, a part at a time.
        wide = right.float()
        with fp32_products(total.device, left.shape[1]):
            for rows in row_chunks(left):
                total[rows].addmm_(left[rows].float(), wide, alpha=factor)
    else:
        with torch.autocast(total.device.type, enabled=False):
            torch.addmm(total, left, right, alpha=factor, out_dtype=torch.float32, out=total)


def _has_onednn() -> bool:
    return bool(_onednn.is_available()) and hasattr(_onednn, "matmul")


def _onednn_precision(value: str) -> contextlib.AbstractContextManager[None]:
    return _precision(_onednn.matmul, value)


@contextlib.contextmanager
def _precision(products: Any, value: str) -> Iterator[None]:
    """The flag is the process's: of several threads inside (autograd's), the first sets it and the last puts it back."""
    with _lock:
        inside = _inside.setdefault(id(products), [])
        inside.append(products.fp32_precision)
        products.fp32_precision = value
    try:
        yield
    finally:
        with _lock:
            before = inside[0]
            inside.pop()
            if not inside:
                products.fp32_precision = "none"  # inherited from a wider flag, where that is what it was
                if products.fp32_precision != before:
                    products.fp32_precision = before


@functools.cache
def _onednn_is_fp32(dim: int) -> bool:
    """Whether oneDNN's error in the three products of a panel is that of fp32."""
    random = torch.Generator().manual_seed(0)
    # all of one sign, like features that share a direction: rounding errors then add up
    plain: Any = {"generator": random, "dtype": torch.float32, "device": "cpu"}
    x_RD, y_RD = (torch.rand(_PROBE_ROWS, dim, **plain) for _ in range(2))
    panel_RR = torch.rand(_PROBE_ROWS, _PROBE_ROWS, **plain)
    return all(
        _error(left, right, "bf16") <= _ALLOWED_ERROR * _error(left, right, "ieee")
        for left, right in ((x_RD, y_RD.T), (panel_RR, y_RD), (panel_RR.T, x_RD))
    )


def _error(left: Tensor, right: Tensor, precision: str) -> float:
    truth = left[:_PROBE_CHECKED].double() @ right.double()
    with torch.autocast("cpu", enabled=False), _onednn_precision(precision):
        product = left @ right
    return float((product[:_PROBE_CHECKED] - truth).norm())
