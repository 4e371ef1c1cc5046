"""Triton's interpreter, made to do what a GPU does. Import it before anything imports triton: jit functions bind at import.

The kernels are imported here, and TRITON_INTERPRET is taken away again: processes that a test starts are not to see it.

Triton 3.8's interpreter multiplies the bit patterns of bf16 operands (triton#11584), truncates where it casts to bf16, and
multiplies fp32 exactly whatever precision a dot asks for. Here bf16 products are right, casts to bf16 round to nearest even as
`cvt.rn` does, and TF32 rounds its operands. It also counts what a launch does: FLOPs of dots, and bytes of loads and stores.
"""

import os
import sys

assert "triton" not in sys.modules, "imported too late: triton's own functions are bound already"
os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton.experimental.gluon  # noqa: F401  # at the first launch otherwise, when decorators bind elsewhere
import triton.language as tl
from triton.runtime import interpreter

from scaleclip_kernels import triton_backend

del os.environ["TRITON_INTERPRET"]
assert triton_backend.IS_INTERPRETED


@dataclass
class Counts:
    """Of all launches inside `counting`."""

    flop: int = 0
    """Two for each multiply-add of a dot, padding of tiles included."""
    loaded: int = 0
    """Bytes asked for: elements of unmasked lanes, each time they are asked for."""
    stored: int = 0


_counts: list[Counts] = []
_builder = interpreter.InterpreterBuilder


@contextmanager
def counting() -> Iterator[Counts]:
    counts = Counts()
    _counts.append(counts)
    try:
        yield counts
    finally:
        _counts.pop()


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 to the upper 16 bits of the nearest bf16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _widened(handle: Any) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.asarray(handle.data, dtype=np.float32)


def _to_tf32(values: np.ndarray) -> np.ndarray:
    """Ten bits of mantissa, to nearest."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    left, right = _widened(a), _widened(b)
    for counts in _counts:
        counts.flop += 2 * left.size * right.shape[-1]
    precision = str(input_precision).rpartition(".")[2].upper()
    if a.dtype.scalar == tl.float32 and precision.startswith("TF32"):
        high_left, high_right = _to_tf32(left), _to_tf32(right)
        product = high_left @ high_right
        if precision == "TF32X3":
            product = (_to_tf32(left - high_left) @ high_right + high_left @ _to_tf32(right - high_right)) + product
    else:
        assert precision == "IEEE" or a.dtype.scalar != tl.float32, precision
        product = left @ right
    return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)


def _cast(self: Any, source: Any, to: Any) -> Any:
    if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
        return interpreter.TensorHandle(round_to_bf16(source.data), tl.bfloat16)
    return _plain_cast(self, source, to)


def _num_set(mask: Any) -> int:
    # a descriptor's mask comes bare
    return int(np.sum(mask.data if isinstance(mask, interpreter.TensorHandle) else mask))


def _load(self: Any, pointers: Any, mask: Any, *rest: Any, **more: Any) -> Any:
    handle = _plain_load(self, pointers, mask, *rest, **more)
    for counts in _counts:
        counts.loaded += _num_set(mask) * handle.data.dtype.itemsize
    return handle


def _store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
    for counts in _counts:
        counts.stored += _num_set(mask) * value.data.dtype.itemsize
    return _plain_store(self, pointers, value, mask, *rest)


def _reduce(self: Any, tensors: Any) -> list[Any]:
    """By halves, as a GPU's lanes do, and not one element after the other, which takes a second a tile."""
    (tensor,) = tensors
    assert self.axis is not None
    assert not self.keep_dims
    values = tensor.handle.data
    while values.shape[self.axis] > 1:
        halves = (self.to_tensor(half, tensor.dtype) for half in np.split(values, 2, self.axis))
        values = self.combine_fn.fn(*halves).handle.data
    return [self.to_tensor(values.squeeze(self.axis), tensor.dtype)]


_plain_cast, _plain_load, _plain_store = _builder.cast_impl, _builder.create_masked_load, _builder.create_masked_store
_builder.create_dot = _dot
_builder.cast_impl = _cast
_builder.create_masked_load = _load
_builder.create_masked_store = _store
interpreter.ReduceOps.generic_reduce = _reduce
