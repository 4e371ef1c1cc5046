"""How each kernel is launched on each architecture: `launches.csv`, which `tools/tune_kernels.py` writes.

Nothing is tuned while training: the same launch in every run and on every rank is what bit-equal resume needs.
"""

import csv
import functools
from dataclasses import dataclass, fields, replace
from importlib import resources
from typing import Literal, NamedTuple, get_args

import torch

from scaleclip_kernels.blocks import Fp32Precision

Kernel = Literal["softmax_sums", "softmax_gradients", "sigmoid"]
Products = Literal["16 bits", "ieee", "tf32x3"]
"""How a tile's products are made: bf16 and fp16 features alike, fp32 features by their precision."""

KERNELS: tuple[Kernel, ...] = get_args(Kernel)
PRODUCTS: tuple[Products, ...] = get_args(Products)
ARCHITECTURES = ("sm80", "sm90", "sm100", "gfx942")
OTHER = "other"
"""Stands in the table for every other architecture."""


class Key(NamedTuple):
    """What a launch is chosen for."""

    architecture: str
    kernel: Kernel
    products: Products
    positives: bool
    """Whether ids make further positives, which takes more registers."""


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
    tma: bool
    """Features come through the tensor memory accelerator, where their rows are aligned to 16 bytes."""
    group: int = 8
    """Row tiles that meet one column tile before the next one is taken."""


# Each operation costs the interpreter about as much whatever its size, so its tiles are not smaller; no test's shapes are their
# multiples.
INTERPRETER = Launch(32, 64, 32, num_warps=4, num_stages=1, tma=False)


# the table is a file, which torch.compile cannot read
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def launch_for(
    kernel: Kernel, dtype: torch.dtype, precision: Fp32Precision, positives: bool, is_aligned: bool, device: torch.device
) -> Launch:
    """For features of `dtype`, in rows aligned to 16 bytes or not. A CPU is Triton's interpreter.

    Rows that are not aligned are loaded an element at a time, with the small tiles of all other architectures.
    """
    if device.type == "cpu":
        return INTERPRETER if is_aligned else replace(INTERPRETER, tma=False)
    products: Products = "16 bits" if dtype.itemsize == 2 else precision
    launches = table()
    found = launches.get(Key(architecture(device), kernel, products, positives)) if is_aligned else None
    return launches[Key(OTHER, kernel, products, positives)] if found is None else found


@functools.cache
def table() -> dict[Key, Launch]:
    """All of launches.csv."""
    launches = {}
    for row in csv.DictReader(resources.files("scaleclip_kernels").joinpath("launches.csv").read_text().splitlines()):
        key = Key(row["architecture"], row["kernel"], row["products"], row["positives"] == "yes")  # type: ignore[arg-type]
        numbers = {field.name: int(row[field.name]) for field in fields(Launch) if field.name != "tma"}
        launches[key] = Launch(**numbers, tma=row["tma"] == "yes")
    return launches


@functools.cache
def architecture(device: torch.device) -> str:
    """Such as sm90 or gfx942."""
    if not torch.cuda.is_available():
        return OTHER  # a device that is only pretended, by fake tensors
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"
