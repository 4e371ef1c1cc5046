"""Whether a launch of a kernel agrees with the panels on the GPU that is here, and its time."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kernel_inspection.variants import DIM
from scaleclip_kernels import panels, triton_backend, triton_launch
from scaleclip_kernels.blocks import Block, Fp32Precision, Matched, Side
from scaleclip_kernels.tuning import Key, Launch

_CHECKED_PAIRS = 1056
_ALLOWED = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-4}
_SCALE = 50.0


def fault_of(key: Key, launch: Launch, device: str = "cuda") -> str:
    """What is wrong with the launch, by its results or its compilation; empty: nothing.

    It leaves machine code in Triton's cache on disk, for `time_launch` in another process.
    """
    try:
        with _launching(launch):
            block, arguments = _inputs(key, _CHECKED_PAIRS, device)
            expected, found = _run(key, panels, block, *arguments)(), _run(key, triton_backend, block, *arguments)()
            error = max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(found, expected, strict=True))
            return "" if error <= _ALLOWED[block.x.features.dtype] else f"wrong: off by {error:.1e}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"


def time_launch(key: Key, launch: Launch, batch: int) -> float:
    """Median milliseconds of the GPU for `batch` x `batch` logits with bf16 or fp32 features.

    A CUDA graph is replayed, so that a slow host does not count.
    """
    from triton.testing import do_bench_cudagraph

    with _launching(launch):
        block, arguments = _inputs(key, batch, "cuda")
        return float(do_bench_cudagraph(_run(key, triton_backend, block, *arguments), return_mode="median"))


def _launching(launch: Launch) -> AbstractContextManager[object]:
    """Every launch inside is this one."""
    return mock.patch.object(triton_launch, "launch_for", return_value=launch)


def _inputs(key: Key, num_pairs: int, device: str) -> tuple[Block, tuple[Tensor, Tensor]]:
    random = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if key.products == "16 bits" else torch.float32
    x, y = (normalize(torch.randn(num_pairs, DIM, generator=random, device=device)).to(dtype) for _ in range(2))
    ids = torch.arange(num_pairs, device=device) // 2 if key.positives else None
    precision: Fp32Precision = "tf32x3" if key.products == "tf32x3" else "ieee"
    block = Block(Side(x, None, ids), Side(y, None, ids), Matched(0, 0, num_pairs), key.positives, precision)
    num_terms = 2 if key.positives else 1
    terms = torch.full((num_pairs, num_terms), 100.0, device=device)
    return block, (torch.tensor(_SCALE, device=device), terms)


def _run(key: Key, backend: object, block: Block, scale: Tensor, terms: Tensor) -> Callable[[], list[Tensor]]:
    """A call of the kernel's function; what it returns is compared."""
    num_rows, num_columns = block.shape
    empty = block.x.features.new_zeros
    bias = torch.tensor(-10.0, device=block.x.features.device)

    def sums() -> list[Tensor]:
        out = [empty(size, 4 if key.positives else 2, dtype=torch.float32) for size in (num_rows, num_columns)]
        for part in out:
            part[:, 0] = torch.finfo(torch.float32).min
        backend.fold_softmax(block, scale, out[0], lambda: out[1])  # type: ignore[attr-defined]
        # the reference of a sum is the backend's choice
        return [part[:, 0] + part[:, 1].log2() for part in out]

    def gradients() -> list[Tensor]:
        out = [empty(size, DIM, dtype=torch.float32) for size in (num_rows, num_columns)]
        backend.softmax_gradients(block, scale, terms, terms, None, out[0], lambda: out[1])  # type: ignore[attr-defined]
        return out

    def sigmoid() -> list[Tensor]:
        out = [empty(size, DIM, dtype=torch.float32) for size in (num_rows, num_columns)]
        totals = empty(2, dtype=torch.float64)
        backend.sigmoid_block(block, scale, bias, None, totals, out[0], lambda: out[1])  # type: ignore[attr-defined]
        return [*out, totals]

    return {"softmax_sums": sums, "softmax_gradients": gradients, "sigmoid": sigmoid}[key.kernel]
