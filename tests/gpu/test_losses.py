"""The Triton kernels on a GPU: errors, host synchronisation, memory of large batches, CUDA graphs, torch.compile, memcheck.

`make test-gpu` alone runs this: elsewhere in the tests Triton's interpreter takes the GPU's place.

Shapes: N pairs, D feature dims.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from scaleclip_kernels import sigmoid_contrastive_loss, softmax_contrastive_loss

pytestmark = pytest.mark.gpu
DIM = 512
BIAS = -10.0
DEVICE = torch.device("cuda")
MIB = 1 << 20
LOSSES: dict[str, Callable[..., Tensor]] = {"softmax": softmax_contrastive_loss, "sigmoid": sigmoid_contrastive_loss}

# times plain torch's error: logits in base 2 are 1.44 times as large, and so is what their rounding costs
_AT_MOST = 3.0

by_loss = pytest.mark.parametrize("name", LOSSES)


def make(num_pairs: int, dtype: torch.dtype, dim: int = DIM) -> tuple[Tensor, Tensor]:
    """Unit-length leaves, every second pair correlated, with a gap between the modalities."""
    random = torch.Generator(DEVICE).manual_seed(0)
    x, y = (torch.randn(num_pairs, dim, generator=random, device=DEVICE) for _ in range(2))
    y[::2] += x[::2]
    axis = torch.randn(1, dim, generator=random, device=DEVICE)
    leaves = (normalize(normalize(x) + normalize(axis)), normalize(normalize(y) - normalize(axis)))
    return tuple(leaf.to(dtype).requires_grad_() for leaf in leaves)  # type: ignore[return-value]


def step(name: str, x: Tensor, y: Tensor, scale: float, **options: object) -> tuple[Tensor, ...]:
    """Loss and gradients of x, y and the scale."""
    scalar_dtype = torch.promote_types(x.dtype, torch.float32)
    logit_scale = torch.tensor(scale, dtype=scalar_dtype, device=DEVICE, requires_grad=True)
    scalars = [logit_scale] if name == "softmax" else [logit_scale, torch.tensor(BIAS, dtype=scalar_dtype, device=DEVICE)]
    loss = LOSSES[name](x, y, *scalars, **options)
    return loss.detach(), *torch.autograd.grad(loss, (x, y, logit_scale))


def plain_step(name: str, x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, ...]:
    """As one writes it in plain torch, under autocast in 16 bits."""
    logit_scale = torch.tensor(scale, device=DEVICE, requires_grad=True)
    with torch.autocast("cuda", dtype=x.dtype, enabled=x.dtype != torch.float32):
        logits = logit_scale * x @ y.T
        labels = torch.arange(len(x), device=DEVICE)
        if name == "softmax":
            loss = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
        else:
            signs = 2 * torch.eye(len(x), device=DEVICE) - 1
            loss = -logsigmoid(signs * (logits.float() + BIAS)).sum() / len(x)
    return loss.detach(), *torch.autograd.grad(loss, (x, y, logit_scale))


@by_loss
@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32x3")],
)
@pytest.mark.parametrize(("num_pairs", "dim"), [(1000, DIM), (2049, 640), (1, 512), (130, 100)])
def test_no_worse_than_plain_torch(
    name: str, num_pairs: int, dim: int, dtype: torch.dtype, precision: str, scale: float
) -> None:
    x, y = make(num_pairs, dtype, dim)
    wide = tuple(leaf.detach().double().requires_grad_() for leaf in (x, y))
    truth = step(name, *wide, scale, backend="reference")
    plain = plain_step(name, x, y, scale)
    ours = step(name, x, y, scale, backend="triton", fp32_precision=precision)
    for what, true, theirs, got in zip(("loss", "dx", "dy", "dscale"), truth, plain, ours, strict=True):
        size = true.norm()
        # the result's own rounding; of a scalar also what cancels in it
        slack = 2 * torch.finfo(got.dtype).eps * size + (1e-6 if got.ndim == 0 else 1e-7 * size)
        if what == "dscale" and dtype != torch.float32:
            slack = slack + torch.finfo(dtype).eps * size
        # norms: which of the two has the largest single error is chance
        error, allowed = (got - true).norm(), _AT_MOST * (theirs - true).norm() + slack
        assert error <= allowed, f"{what}: {error:.2e} > {allowed:.2e}"


@pytest.mark.parametrize("extras", [0, 300])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, 0.0)])
@pytest.mark.parametrize("dim", [DIM, 100])
def test_tiles_that_one_exponential_does_not_fit(dim: int, weights: tuple[float, float], extras: int) -> None:
    """A row far below its tile and extra columns far above theirs: maxima of their own, and two exponentials backward."""
    x, y = (leaf.detach().float() for leaf in make(700 + extras, torch.float32, dim))
    x = x[:700].clone()
    x[3] *= -1
    y[700:] += 3 * normalize(x.mean(dim=0, keepdim=True))
    x, y = (normalize(side).bfloat16().requires_grad_() for side in (x, y))
    wide = tuple(leaf.detach().double().requires_grad_() for leaf in (x, y))
    truth = step("softmax", *wide, 100.0, backend="reference", weights=weights)
    ours = step("softmax", x, y, 100.0, backend="triton", weights=weights)
    for got, true in zip(ours, truth, strict=True):
        assert (got.double() - true).norm() <= 1e-2 * true.norm() + 1e-6


@by_loss
def test_agrees_with_panels(name: str) -> None:
    """At every option at once; panels multiply in fp32."""
    x, y = make(700, torch.bfloat16)
    at = torch.arange(700, device=DEVICE)
    options = {"ids": at % 300, "valid": at % 7 != 1, "duplicates": "positive"}
    for got, true in zip(
        step(name, x, y, 14.3, backend="triton", **options), step(name, x, y, 14.3, backend="panels", **options), strict=True
    ):
        assert (got.float() - true.float()).norm() <= 1e-2 * true.float().norm() + 1e-6


@by_loss
def test_the_host_never_waits(name: str) -> None:
    x, y = make(4096, torch.bfloat16)
    logit_scale = torch.tensor(14.3, device=DEVICE, requires_grad=True)
    bias = [] if name == "softmax" else [torch.tensor(BIAS, device=DEVICE)]
    valid = torch.ones(4096, dtype=torch.bool, device=DEVICE)
    for mode in ("default", "error"):  # the first step compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            LOSSES[name](x, y, logit_scale, *bias, valid=valid, backend="triton").backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@by_loss
def test_same_bits_every_time(name: str) -> None:
    x, y = make(5000, torch.bfloat16)
    first, second = (step(name, x, y, 14.3, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@by_loss
@pytest.mark.parametrize("num_pairs", [32_768, 131_072])
def test_large_batches_need_no_quadratic_memory(name: str, num_pairs: int) -> None:
    x, y = make(num_pairs, torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, grad_x, grad_y, _ = step(name, x, y, 14.3, backend="triton")
    added = torch.cuda.max_memory_allocated() - before
    # both gradients in fp32 and again in bf16, a copy of either for their dots, parts of sums, a panel and what cuBLAS works in
    assert added < 3 * 4 * 2 * num_pairs * DIM + 256 * MIB
    assert loss.isfinite()
    # the gradients of a part of the rows, by the definition in fp64
    rows = slice(1000, 1064)
    logits = 14.3 * x[rows].double() @ y.double().T
    matched = torch.arange(1000, 1064, device=DEVICE)
    if name == "sigmoid":
        signs = -torch.ones_like(logits)
        signs[torch.arange(64, device=DEVICE), matched] = 1
        gradient = -signs * torch.sigmoid(-signs * (logits + BIAS)) / num_pairs
    else:
        column_sums = torch.zeros(num_pairs, dtype=torch.float64, device=DEVICE)
        for start in range(0, num_pairs, 2048):
            column_sums += (14.3 * x[start : start + 2048].detach().double() @ y.detach().double().T).exp().sum(dim=0)
        gradient = (logits.softmax(dim=1) + logits.exp() / column_sums) / (2 * num_pairs)
        gradient[torch.arange(64, device=DEVICE), matched] -= 1 / num_pairs
    expected = 14.3 * gradient @ y.double()
    assert (grad_x[rows].double() - expected).norm() <= 1e-2 * expected.norm()
    assert grad_y.isfinite().all()


@by_loss
def test_captured_in_a_cuda_graph(name: str) -> None:
    x, y = make(4096, torch.bfloat16)
    logit_scale = torch.tensor(14.3, device=DEVICE, requires_grad=True)
    bias = [] if name == "softmax" else [torch.tensor(BIAS, device=DEVICE)]

    def whole_step() -> tuple[Tensor, ...]:
        loss = LOSSES[name](x, y, logit_scale, *bias, backend="triton")
        return loss, *torch.autograd.grad(loss, (x, y, logit_scale))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        whole_step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = whole_step()
    with torch.no_grad():
        x.copy_(normalize(torch.randn_like(x.float())))
    graph.replay()
    for got, true in zip(captured, whole_step(), strict=True):
        assert torch.equal(got, true)


@by_loss
def test_compiles_whole(name: str) -> None:
    x, y = make(1000, torch.bfloat16)
    logit_scale = torch.tensor(14.3, device=DEVICE, requires_grad=True)
    bias = [] if name == "softmax" else [torch.tensor(BIAS, device=DEVICE)]

    def loss(x: Tensor, y: Tensor, *scalars: Tensor) -> Tensor:
        return LOSSES[name](x, y, *scalars, backend="triton")

    expected, found = loss(x, y, logit_scale, *bias), torch.compile(loss, fullgraph=True)(x, y, logit_scale, *bias)
    torch.testing.assert_close(found, expected)
    for got, true in zip(*(torch.autograd.grad(value, (x, y)) for value in (found, expected)), strict=True):
        torch.testing.assert_close(got, true)


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@by_loss
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(name: str, tool: str) -> None:
    code = f"""
import torch, scaleclip_kernels
scalars = [torch.tensor(value, device="cuda", requires_grad=True) for value in {[60.0] if name == "softmax" else [60.0, BIAS]}]
ids = torch.arange(333, device="cuda") % 50
for dim, duplicates in ((200, "negative"), (200, "positive"), (100, "negative")):
    x, y = (torch.nn.functional.normalize(torch.randn(333, dim, device="cuda")).bfloat16().requires_grad_() for _ in range(2))
    x.data[3] = -x.data[3]
    scaleclip_kernels.{name}_contrastive_loss(x, y, *scalars, ids=ids, duplicates=duplicates, backend="triton").backward()
torch.cuda.synchronize()
"""
    command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", sys.executable, "-c", code]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
