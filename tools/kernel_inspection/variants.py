"""What is compiled: a kernel as it is launched on an architecture, for a dtype and for the options that change its code."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from triton.runtime.jit import JITFunction

from scaleclip_kernels import triton_launch, triton_sigmoid, triton_softmax
from scaleclip_kernels.tuning import KERNELS, OTHER, PRODUCTS, Kernel, Key, Launch, Products, table

Dtype = Literal["bf16", "fp16", "fp32"]
Options = Literal["plain", "one way", "ignore", "positive", "unaligned"]
"""All pairs valid, both directions; one direction; ids that leave pairs out, or make positives, with validity and weights;
plain with rows of features that are not aligned."""

DIM = 512
KERNEL_FUNCTIONS: dict[Kernel, JITFunction[Any]] = {
    "softmax_sums": triton_softmax.softmax_sums_kernel,
    "softmax_gradients": triton_softmax.softmax_gradients_kernel,
    "sigmoid": triton_sigmoid.sigmoid_kernel,
}
_DTYPES: dict[Products, tuple[Dtype, ...]] = {"16 bits": ("bf16", "fp16"), "ieee": ("fp32",), "tf32x3": ("fp32",)}
_TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TF32_PRODUCTS = 3
_POINTERS = {
    "fp32": ("scale", "bias", "share", "row_terms", "column_terms", "row_weight", "column_weight", "row_partials",
             "column_partials", "totals"),
    "u8": ("row_invalid", "column_invalid"),
    "i64": ("row_ids", "column_ids"),
}  # fmt: skip
_TYPES = {name: f"*{kind}" for kind, names in _POINTERS.items() for name in names}
_UNALIGNED = {*triton_launch.DO_NOT_SPECIALIZE, "share", "row_weight", "column_weight"}


@dataclass(frozen=True)
class Variant:
    """One compilation."""

    architecture: str
    kernel: Kernel
    dtype: Dtype
    products: Products
    options: Options
    launch: Launch

    @property
    def name(self) -> str:
        products = "" if self.products == "16 bits" else f" {self.products}"
        return f"{self.architecture} {self.kernel} {self.dtype}{products} {self.options}"

    @property
    def key(self) -> Key:
        """Of the launch table."""
        return Key(self.architecture, self.kernel, self.products, self.options == "positive")

    @property
    def is_fallback(self) -> bool:
        """Whether the launch is the one for architectures that are not in the table."""
        return self.options == "unaligned" or self.key not in table()

    @property
    def matrix_flop(self) -> float:
        """Of a tile's products at DIM feature dims."""
        times = _TF32_PRODUCTS if self.products == "tf32x3" else 1
        return 2.0 * times * self.launch.block_rows * self.launch.block_columns * DIM


def variants(architecture: str) -> Iterator[Variant]:
    """What `launch_for` chooses there, with every option in bf16; fp16 and fp32 as they are used most."""
    launches = table()
    for kernel, products, positives in itertools.product(KERNELS, PRODUCTS, (False, True)):
        if products == "tf32x3" and not architecture.startswith("sm"):
            continue  # Triton has no such products there
        key = Key(architecture, kernel, products, positives)
        launch = launches.get(key, launches[key._replace(architecture=OTHER)])
        for dtype in _DTYPES[products]:
            for options in _options(key, dtype):
                yield Variant(architecture, kernel, dtype, products, options, launch)
        if not positives:
            other = launches[key._replace(architecture=OTHER)]
            yield Variant(architecture, kernel, _DTYPES[products][0], products, "unaligned", other)


def _options(key: Key, dtype: Dtype) -> tuple[Options, ...]:
    if key.positives:
        return ("positive",)
    if dtype != "bf16":
        return ("plain",)
    return ("plain", "ignore") if key.kernel == "sigmoid" else ("plain", "one way", "ignore")


class Signature(NamedTuple):
    """What a kernel is compiled for."""

    types: dict[str, str]
    """By parameter."""
    constants: dict[str, Any]
    aligned: set[str]
    """Multiples of 16."""


def signature(variant: Variant) -> Signature:
    """Of the variant's kernel."""
    launch = variant.launch
    constants: dict[str, Any] = {
        "POSITIVE": variant.options == "positive",
        "GRADIENT_SCALE": triton_launch.GRADIENT_SCALE[_TORCH[variant.dtype]],
        "BLOCK_ROWS": launch.block_rows,
        "BLOCK_COLUMNS": launch.block_columns,
        "BLOCK_DIM": launch.block_dim,
        "GROUP": launch.group,
        "EVEN_DIM": variant.options != "unaligned" and DIM % launch.block_dim == 0,
        "TMA": launch.tma,
        "PRECISION": "tf32x3" if variant.products == "tf32x3" else "ieee",
        "EXACT_SCALE": variant.dtype == "fp32",
    }
    if variant.options not in ("ignore", "positive"):
        constants |= dict.fromkeys(_POINTERS["u8"] + _POINTERS["i64"] + ("row_weight", "column_weight", "share"))
    if variant.options == "one way":
        constants |= dict.fromkeys(("column_terms", "column_partials"))
    tiles = {
        "x": (launch.block_rows, launch.block_dim),
        "y": (launch.block_columns, launch.block_dim),
        "gradients": (launch.block_rows, launch.block_columns),
    }
    unaligned = _UNALIGNED | ({"x_stride", "y_stride", "dim"} if variant.options == "unaligned" else set())
    names = KERNEL_FUNCTIONS[variant.kernel].arg_names
    types, aligned = {}, set()
    for name in names:
        if name in constants:
            types[name] = "constexpr"
        elif name in tiles and launch.tma:
            rows, columns = tiles[name]
            types[name] = f"tensordesc<{variant.dtype}[{rows},{columns}]>"
        else:
            types[name] = f"*{variant.dtype}" if name in tiles else _TYPES.get(name, "i32")
            if name not in unaligned:
                aligned.add(name)
    return Signature(types, {name: value for name, value in constants.items() if name in names}, aligned)
