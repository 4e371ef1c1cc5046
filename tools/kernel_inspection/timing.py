"""Times a launch of a kernel on the GPU that is here, once its results agree with the panels'."""

from collections.abc import Callable
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


def time_launch(key: Key, launch: Launch, batch: int, device: str = "cuda") -> tuple[float, str]:
    """Median milliseconds for `batch` x `batch` logits with bf16 or fp32 features; or what is wrong with the launch."""
    from triton.testing import do_bench

    try:
        # every launch inside is the one that is tried
        with mock.patch.object(triton_launch, "launch_for", return_value=launch):
            block, arguments = _inputs(key, min(_CHECKED_PAIRS, batch), device)
            expected, found = _run(key, panels, block, *arguments)(), _run(key, triton_backend, block, *arguments)()
            error = max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(found, expected, strict=True))
            if not error <= _ALLOWED[block.x.features.dtype]:
                return 0.0, f"wrong: off by {error:.1e}"
            block, arguments = _inputs(key, batch, device)
            return float(do_bench(_run(key, triton_backend, block, *arguments), return_mode="median")), ""
    except Exception as error:
        return 0.0, f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"


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
        bias = torch.tensor(-10.0, device=totals.device)
        backend.sigmoid_block(block, scale, bias, None, totals, out[0], lambda: out[1])  # type: ignore[attr-defined]
        return [*out, totals]

    return {"softmax_sums": sums, "softmax_gradients": gradients, "sigmoid": sigmoid}[key.kernel]
