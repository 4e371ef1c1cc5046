"""fp32 products: the library that is chosen, and torch's global flags as the caller left them."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from loss_cases import LOSSES, evaluate, features
from scaleclip_kernels import gemm, panels

PRECISIONS = ("highest", "high", "medium")
matmul_flags: Any = torch.backends.mkldnn.matmul
needs_onednn = pytest.mark.skipif(not gemm._has_onednn(), reason="this PyTorch has no oneDNN product")


@pytest.fixture(autouse=True)
def restored_flags(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test may set any precision and any library."""
    monkeypatch.delenv(gemm.VARIABLE, raising=False)
    before = torch.get_float32_matmul_precision()
    gemm._onednn_is_fp32.cache_clear()
    yield
    gemm._onednn_is_fp32.cache_clear()
    torch.set_float32_matmul_precision(before)
    for level in (torch.backends, torch.backends.mkldnn, matmul_flags, torch.backends.cuda.matmul):
        level.fp32_precision = "none"


def flags() -> tuple[str, str, bool]:
    return torch.get_float32_matmul_precision(), matmul_flags.fp32_precision, torch.is_autocast_enabled("cpu")


def arguments_of(name: str) -> tuple[float, float | None]:
    return (14.3, None) if name == "softmax" else (14.3, -2.0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_flags_are_restored(name: str, precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    before = flags()
    x, y = (t.requires_grad_() for t in features("random", 50, 16))
    loss = LOSSES[name](x, y, *(torch.tensor(value) for value in arguments_of(name) if value is not None))
    assert flags() == before
    loss.backward()
    assert flags() == before


@pytest.mark.parametrize("precision", PRECISIONS)
def test_flags_are_restored_after_an_error(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision(precision)
    before = flags()
    x, y = (t.requires_grad_() for t in features("random", 50, 16))
    loss = LOSSES["softmax"](x, y, torch.tensor(14.3))

    def fail(panel: panels._Panel) -> Tensor:
        raise MemoryError("no room for this panel")

    monkeypatch.setattr(panels._Panel, "logits", fail)
    for step in (loss.backward, lambda: LOSSES["softmax"](x, y, torch.tensor(14.3))):
        with pytest.raises(MemoryError, match="no room"):
            step()
        assert flags() == before


@needs_onednn
def test_a_flag_that_was_inherited_still_is() -> None:
    """What torch.backends.fp32_precision says afterwards holds for matmul too, as it did before the call."""
    x, y = features("random", 50, 16)
    torch.backends.fp32_precision = "tf32"
    assert matmul_flags.fp32_precision == "tf32"
    evaluate(LOSSES["softmax"], x, y, 14.3)
    assert matmul_flags.fp32_precision == "tf32"
    torch.backends.fp32_precision = "ieee"
    assert matmul_flags.fp32_precision == "ieee"


@needs_onednn
@pytest.mark.parametrize("library", ["default", "onednn"])
def test_products_run_under_their_own_flags(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gemm.VARIABLE, library)
    seen = set()
    logits = panels._Panel.logits

    def spy(panel: panels._Panel) -> Tensor:
        seen.add((matmul_flags.fp32_precision, torch.is_autocast_enabled("cpu")))
        return logits(panel)

    monkeypatch.setattr(panels._Panel, "logits", spy)
    x, y = features("random", 50, 16)
    torch.set_float32_matmul_precision("high")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name in LOSSES:
            evaluate(LOSSES[name], x, y, *arguments_of(name))
    assert seen == {("bf16" if library == "onednn" else "ieee", False)}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("library", ["default", "onednn"])
def test_results_do_not_depend_on_the_callers_flags(name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if library == "onednn" and not gemm._has_onednn():
        pytest.skip("this PyTorch has no oneDNN product")
    monkeypatch.setenv(gemm.VARIABLE, library)
    x, y = features("random", 200, 64)
    results = []
    for precision in PRECISIONS:
        torch.set_float32_matmul_precision(precision)
        results.append(evaluate(LOSSES[name], x, y, *arguments_of(name)))
    for got in results[1:]:
        assert all(torch.equal(value, first) for value, first in zip(got, results[0], strict=True))


@needs_onednn
def test_variable_overrules_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def must_not_run(dim: int) -> bool:
        raise AssertionError("checked although the variable has decided")

    monkeypatch.setattr(gemm, "_onednn_is_fp32", must_not_run)
    for library in ("default", "onednn"):
        monkeypatch.setenv(gemm.VARIABLE, library)
        assert gemm.cpu_library(64) == library
    monkeypatch.undo()
    monkeypatch.setenv(gemm.VARIABLE, "auto")
    chosen = gemm.cpu_library(64)
    monkeypatch.delenv(gemm.VARIABLE)
    assert gemm.cpu_library(64) == chosen


def test_unknown_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gemm.VARIABLE, "fastest")
    with pytest.raises(ValueError, match="SCALECLIP_KERNELS_CPU_GEMM=fastest is not one of default, onednn, auto"):
        LOSSES["softmax"](torch.zeros(4, 8), torch.zeros(4, 8), torch.tensor(1.0))


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "_has_onednn", lambda: False)
    assert gemm.cpu_library(64) == "default"
    x, y = features("random", 50, 16)
    assert evaluate(LOSSES["softmax"], x, y, 14.3).loss.isfinite()
    monkeypatch.setenv(gemm.VARIABLE, "onednn")
    with pytest.raises(ValueError, match=r"SCALECLIP_KERNELS_CPU_GEMM=onednn: this PyTorch has no oneDNN.*unset the variable"):
        gemm.cpu_library(64)


@needs_onednn
def test_inaccurate_onednn_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """On some CPUs the flag means what it says: bf16 arithmetic."""

    def error(left: Tensor, right: Tensor, precision: str) -> float:
        truth = left.double() @ right.double()
        inputs = [t.bfloat16().double() if precision == "bf16" else t.double() for t in (left, right)]
        return float((inputs[0] @ inputs[1] - truth).norm()) + 1e-4

    monkeypatch.setattr(gemm, "_error", error)
    assert gemm.cpu_library(64) == "default"


@needs_onednn
@pytest.mark.parametrize("worse", range(3))
def test_each_of_the_three_products_counts(worse: int, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[tuple[int, ...]] = []

    def error(left: Tensor, right: Tensor, precision: str) -> float:
        if precision == "bf16":
            checked.append((*left.shape, *right.shape))
            return 4.0 if len(checked) == worse + 1 else 1.0
        return 1.0

    monkeypatch.setattr(gemm, "_error", error)
    assert gemm.cpu_library(64) == "default"
    assert len(checked) == worse + 1


@needs_onednn
@pytest.mark.parametrize("dim", [64, 100, 512, 640, 1152])
def test_chosen_library_is_fp32_for_features_like_real_ones(dim: int) -> None:
    """Features of one modality share a direction, so that rounding errors add up instead of cancelling."""
    if gemm.cpu_library(dim) == "default":
        return
    generator = torch.Generator().manual_seed(1)
    x, y, axis = (normalize(torch.randn(n, dim, generator=generator)) for n in (1024, 1024, 1))
    x, y = normalize(x + 3 * axis), normalize(y + 3 * axis)
    probabilities = torch.rand(1024, 1024, generator=generator)
    for left, right in ((x, y.T), (probabilities, y), (probabilities.T, x)):
        onednn, default = (gemm._error(left, right, precision) for precision in ("bf16", "ieee"))
        assert onednn <= gemm._ALLOWED_ERROR * default


def test_same_choice_in_every_process() -> None:
    """Whatever the number of threads: ranks must agree, and a resumed run with the one before."""
    dims = (8, 512, 640)
    here = [gemm.cpu_library(dim) for dim in dims]
    gemm._onednn_is_fp32.cache_clear()
    assert [gemm.cpu_library(dim) for dim in dims] == here
    code = f"from scaleclip_kernels import gemm; print(*map(gemm.cpu_library, {dims}))"
    for num_threads in ("1", "2"):
        environment = {"OMP_NUM_THREADS": num_threads, "PYTHONPATH": ":".join(sys.path)}
        out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert out.stdout.split() == here
