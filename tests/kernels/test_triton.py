"""The Triton kernels in the interpreter: values and gradients against fp64 with the budget of loss_cases.py, at sizes that
divide nothing; that they look at nothing beyond their arguments; and what their launches do, counted.

What they promise as every backend does is in test_both_losses.py; what their machine code takes in tests/tools.

Shapes: N pairs, V views, M columns, D feature dims.
"""

import dataclasses
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import triton_interpreter
from kernel_inspection.counts import Asked, Counts, fold_counts, launch_counts
from loss_cases import (
    DUPLICATES,
    LOSSES,
    REGIMES,
    WEIGHTS,
    Inputs,
    assert_within_budget,
    check_random_cases,
    evaluate,
    features,
    set_panels,
)
from scaleclip_kernels import arguments, gemm, panels, triton_backend, triton_launch, triton_sigmoid, triton_softmax, tuning
from scaleclip_kernels.arguments import Backend
from scaleclip_kernels.blocks import LOG2_E, Block, Fp32Precision, Matched, Side
from scaleclip_kernels.tuning import INTERPRETER, KERNELS, OTHER, PRODUCTS, Kernel, Key, Launch, table

BIASES = {"softmax": None, "sigmoid": -2.0}
# Tiles of 32 x 64: three row panels and two column panels for 70 x 70, the last ones ragged
BORDERS = (33, 70)
SCALES = (14.3, 100.0)
LOW = [(torch.bfloat16, None), (torch.float16, None), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
TMA = dataclasses.replace(INTERPRETER, tma=True)
# of what every test of a kind has, the easier half waits for `make test-slow`
DTYPES = (pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16)
OPTIONS = ("plain", pytest.param("ignore", marks=pytest.mark.slow), "positive")


def inputs(loss: str, regime: str, num_pairs: int, dim: int, scale: float, **rest: Any) -> Inputs:
    return Inputs(loss, regime, num_pairs, dim, scale, BIASES[loss], backend="triton", **rest)


@pytest.fixture(params=["pointers", "TMA"])
def features_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways that features reach a tile."""
    monkeypatch.setattr(tuning, "INTERPRETER", TMA if request.param == "TMA" else INTERPRETER)
    return request.param


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("scale", SCALES)
def test_error_budget(loss: str, scale: float, regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_panels(monkeypatch, *BORDERS)
    assert_within_budget(inputs(loss, regime, 70, 40, scale))


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("num_pairs", "dim"), [(1, 64), (7, 100), (100, 640), (257, 100), (130, 1152)])
def test_error_budget_of_many_sizes(num_pairs: int, dim: int, scale: float, regime: str, loss: str, features_by: str) -> None:
    assert_within_budget(inputs(loss, regime, num_pairs, dim, scale))


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_error_budget_of_whole_panels(loss: str) -> None:
    """A modality gap and a few matched pairs at scale 100, where one exponential a tile alone gives infinite gradients."""
    assert_within_budget(inputs(loss, "gap", 1100, 512, 100.0))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("regime", ["gap", pytest.param("low", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scale", [pytest.param(14.3, marks=pytest.mark.slow), 100.0])
@pytest.mark.parametrize(("dtype", "compute_dtype"), LOW)
def test_error_budget_in_16_bits(
    dtype: torch.dtype, compute_dtype: torch.dtype | None, scale: float, regime: str, loss: str
) -> None:
    assert_within_budget(inputs(loss, regime, 70, 40, scale, dtype=dtype), compute_dtype=compute_dtype)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [100, pytest.param(32, marks=pytest.mark.slow)])
def test_error_budget_through_tma(loss: str, dtype: torch.dtype, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 100 bf16 features are not aligned to 16 bytes: they come through pointers, whatever the launch table says."""
    monkeypatch.setattr(tuning, "INTERPRETER", TMA)
    set_panels(monkeypatch, *BORDERS)
    assert_within_budget(inputs(loss, "gap", 70, dim, 100.0, dtype=dtype))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", SCALES)
def test_error_budget_with_tf32x3(loss: str, scale: float) -> None:
    """The interpreter rounds to TF32 as the matrix units do; three products have fp32's error again."""
    assert_within_budget(inputs(loss, "gap", 70, 40, scale), fp32_precision="tf32x3")


def test_tf32_alone_is_far_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above can fail."""
    launch_arguments = triton_launch.arguments
    monkeypatch.setattr(triton_softmax, "arguments", lambda *a: {**launch_arguments(*a), "PRECISION": "tf32"})
    found = inputs("softmax", "gap", 70, 40, 100.0).errors()
    assert any(errors.above(50) for errors in found)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("duplicates", DUPLICATES)
@pytest.mark.parametrize("with_valid", [pytest.param(False, marks=pytest.mark.slow), True])
def test_error_budget_with_duplicates(loss: str, with_valid: bool, duplicates: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_panels(monkeypatch, *BORDERS)
    ids = torch.randint(30, (75,), generator=torch.Generator().manual_seed(1))
    valid = torch.arange(75) % 5 != 2 if with_valid else None
    assert_within_budget(inputs(loss, "gap", 75, 40, 14.3), valid=valid, ids=ids, duplicates=duplicates)


@pytest.mark.parametrize("bias", [-10.0, -7.0, -5.5, -4.0])
def test_error_budget_of_joined_logarithms(bias: float) -> None:
    """64 terms share a logarithm: of an argument from 0.003 to 1.2, on both sides of where its series ends."""
    assert_within_budget(Inputs("sigmoid", "random", 70, 40, 1.0, bias, backend="triton"))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_error_budget_of_unequal_anchors(weights: tuple[float, float]) -> None:
    column_valid = torch.arange(3 * 40) % 40 < torch.tensor([40, 31, 7]).repeat_interleave(40)
    assert_within_budget(inputs("softmax", "hot", 40, 40, 100.0, views=3), weights=weights, column_valid=column_valid)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_budget_with_extra_columns(loss: str, dtype: torch.dtype) -> None:
    """Columns without a loss of their own, a whole tile of them far above everything else."""
    assert_within_budget(inputs(loss, "hot", 40, 40, 100.0, extras=90, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_error_budget_of_random_options(loss: str, monkeypatch: pytest.MonkeyPatch, features_by: str) -> None:
    seeds = range(2000, 2040) if features_by == "TMA" else range(3000, 3040)
    check_random_cases(loss, seeds, monkeypatch, "triton", most_logits=30_000)


@pytest.mark.parametrize("side", ["row", "column"])
def test_distant_row_or_column_does_not_underflow(side: str) -> None:
    """150 nats below the rest of its tile: the tile's one maximum would lose it, so it gets maxima of its own."""
    x, y = features("low", 40, 64)
    distant = x if side == "row" else y
    distant[3] *= -1
    truth = evaluate(LOSSES["softmax"], x.double(), y.double(), 100.0, backend="reference")
    ours = evaluate(LOSSES["softmax"], x, y, 100.0, backend="triton")
    for true, got in zip(truth, ours, strict=True):
        torch.testing.assert_close(got, true.float(), rtol=1e-5, atol=1e-5 * true.abs().max().item())


@pytest.mark.parametrize("loss", LOSSES)
def test_logits_of_thousands_are_finite(loss: str) -> None:
    for regime in REGIMES:
        x, y = (t * 6 for t in features(regime, 70, 40))
        truth = evaluate(LOSSES[loss], x.double(), y.double(), 100.0, BIASES[loss], backend="reference")
        ours = evaluate(LOSSES[loss], x, y, 100.0, BIASES[loss], backend="triton")
        for true, got in zip(truth, ours, strict=True):
            # the logits themselves are rounded to 3e-4
            torch.testing.assert_close(got, true.float(), rtol=2e-3, atol=2e-3 * true.abs().max().item() + 1e-30)


def test_low_loss_keeps_relative_accuracy() -> None:
    """A loss of 1e-6 is below the rounding of log-sum-exp minus the matched logit; negatives alone keep its digits."""
    x, y = features("low", 70, 64)
    truth = evaluate(LOSSES["softmax"], x.double(), y.double(), 100.0, backend="reference")
    ours = evaluate(LOSSES["softmax"], x, y, 100.0, backend="triton")
    assert 1e-9 < truth.loss < 1e-5
    for true, got in zip(truth, ours, strict=True):
        assert (got - true).norm() <= 3e-5 * true.norm()


def _embedded(rows: Tensor, around: float) -> Tensor:
    """The same rows inside a larger buffer of `around`, aligned as they were."""
    buffer = torch.full((len(rows) + 128, *rows.shape[1:]), around, dtype=rows.dtype)
    inside = buffer[64 : 64 + len(rows)]
    inside.copy_(rows)
    return inside


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_around_the_arguments_is_never_used(loss: str, dtype: torch.dtype, features_by: str) -> None:
    """Reads beyond a tensor do not fail in the interpreter: what lies there is poison, and the results are the same bits."""
    x, y = (t.to(dtype) for t in features("gap", 37, 40, extras=31))
    labels = {"ids": torch.arange(37) % 20, "column_ids": torch.arange(68) % 20, "valid": torch.arange(37) % 6 != 1}
    options = {"duplicates": "positive", "backend": "triton"}
    expected = evaluate(LOSSES[loss], x, y, 14.3, BIASES[loss], **labels, **options)
    # the matched pairs' ids around, and valid: a pair beyond the end would count
    poisoned = {name: _embedded(t, 1) for name, t in labels.items()}
    leaves = [_embedded(t, math.nan).requires_grad_() for t in (x, y)]
    scalars = [torch.tensor(value) for value in (14.3, BIASES[loss]) if value is not None]
    value = LOSSES[loss](*leaves, *scalars, **poisoned, **options)
    gradients = torch.autograd.grad(value, leaves)
    assert torch.equal(value, expected.loss)
    assert torch.equal(gradients[0], expected.x)
    assert torch.equal(gradients[1], expected.y)


def test_offsets_pass_32_bits(features_by: str) -> None:
    """Rows more than 2^31 elements apart, in a buffer of which only they are ever touched."""
    stride = (1 << 31) + 16
    buffer = torch.empty(0, dtype=torch.float32).set_(torch.UntypedStorage(4 * (stride + 64))).as_strided((2, 32), (stride, 1))
    x, y = features("random", 2, 32)
    buffer.copy_(x)
    sides = Side(buffer, None, None), Side(y, None, None)
    found, expected = (torch.zeros(2, 2) for _ in range(2))
    for block_x, sums in ((sides[0], found), (Side(x, None, None), expected)):
        sums[:, 0] = torch.finfo(torch.float32).min
        block = Block(block_x, sides[1], Matched(0, 0, 2), False)
        triton_backend.fold_softmax(block, torch.tensor(10.0), sums, None)
    assert torch.equal(found, expected)


# --- what launches do ---------------------------------------------------------------------------------------------------------


def _block(num_rows: int, num_columns: int, dim: int, dtype: torch.dtype, options: str) -> Block:
    x, y = (torch.nn.functional.normalize(torch.randn(n, dim)).to(dtype) for n in (num_rows, num_columns))
    masks = [torch.arange(n) % 3 == 0 for n in (num_rows, num_columns)] if options != "plain" else [None, None]
    ids = [torch.arange(n) % 9 for n in (num_rows, num_columns)] if options != "plain" else [None, None]
    sides = Side(x, masks[0], ids[0]), Side(y, masks[1], ids[1])
    return Block(*sides, Matched(3, 5, min(num_rows - 3, num_columns - 5)), options == "positive")


def _launch(kernel: str, block: Block) -> None:
    scale = triton_launch.scale_parts(torch.tensor(10.0, dtype=torch.float64))
    num_terms = 2 if block.duplicates_are_positive else 1
    if kernel == "softmax_sums":
        triton_softmax._softmax_sums(*triton_launch.flat(block), scale, True, True)
    elif kernel == "softmax_gradients":
        terms = [torch.full((size, num_terms), 30.0) for size in block.shape]
        triton_softmax._softmax_gradients(*triton_launch.flat(block), scale, *terms, None, None)
    else:
        triton_sigmoid._sigmoid(*triton_launch.flat(block), scale, torch.tensor(-2.0), None, True)


def _results(backend: ModuleType, block: Block) -> list[Tensor]:
    """Sums as logarithms, since their references are the backend's own; gradients; the sigmoid's gradients and totals."""
    sizes, dim, num_terms = block.shape, block.x.features.shape[1], 2 if block.duplicates_are_positive else 1
    sums = [torch.zeros(size, 2 * num_terms) for size in sizes]
    for part in sums:
        part[:, 0] = torch.finfo(torch.float32).min
    backend.fold_softmax(block, torch.tensor(10.0), sums[0], lambda: sums[1])
    terms = [torch.linspace(20, 140, size * num_terms).view(size, num_terms) for size in sizes]
    softmax, sigmoid = ([torch.zeros(size, dim) for size in sizes] for _ in range(2))
    weights = torch.tensor(0.3), torch.tensor(1.0)
    backend.softmax_gradients(block, torch.tensor(10.0), *terms, weights, softmax[0], lambda: softmax[1])
    totals = torch.zeros(2, dtype=torch.float64)
    scalars = torch.tensor(10.0), torch.tensor(-2.0), torch.tensor(0.7)
    backend.sigmoid_block(block, *scalars, totals, sigmoid[0], lambda: sigmoid[1])
    return [*(part[:, 0] + part[:, 1].log2() for part in sums), *(part[:, 2:] for part in sums), *softmax, *sigmoid, totals]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("matched", [(0, 0, 0), (3, 5, 60), (40, 0, 60), (0, 90, 35)])
def test_blocks_of_which_some_pairs_are_matched(
    matched: tuple[int, int, int], options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As blocks of other ranks are: matched pairs begin and end anywhere."""
    set_panels(monkeypatch, 70, 90)
    block = _block(100, 150, 48, torch.float32, options)._replace(matched=Matched(*matched))
    for got, true in zip(_results(triton_backend, block), _results(panels, block), strict=True):
        torch.testing.assert_close(got, true, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_flop_and_bytes_are_the_formulas(kernel: str, options: str, dtype: torch.dtype, features_by: str) -> None:
    block = _block(100, 150, 48, dtype, options)
    has_options = options != "plain"
    parts = 2 if dtype == torch.float32 else 1
    asked = Asked(100, 150, 48, dtype.itemsize, has_options, has_options, options == "positive", parts)
    with triton_interpreter.counting() as counts:
        _launch(kernel, block)
    expected = launch_counts(kernel, asked, tuning.INTERPRETER)
    assert Counts(counts.flop, counts.loaded, counts.stored) == expected


@pytest.mark.parametrize("num_sums", [2, 4])
def test_bytes_of_folding_are_the_formula(num_sums: int) -> None:
    partials, sums = torch.ones(num_sums, 19, 150), torch.zeros(150, num_sums)
    with triton_interpreter.counting() as counts:
        triton_softmax._fold_sums(partials, sums)
    assert Counts(counts.flop, counts.loaded, counts.stored) == fold_counts(num_sums, 19, 150)


def test_only_tiles_that_need_it_are_computed_twice() -> None:
    """The guard of the one exponential: a tile is made again where the logits of one of its rows all lie 2^64 below."""
    axis = torch.nn.functional.normalize(torch.ones(32), dim=0)
    x, y = (torch.nn.functional.normalize(axis + 0.02 * noise) for noise in torch.randn(2, 128, 32))
    scale = triton_launch.scale_parts(torch.tensor(40 * LOG2_E, dtype=torch.float64))
    for far_rows, recomputed in (([], 0), ([3], 2), ([3, 5, 40], 4)):  # a row meets two column tiles
        moved = x.clone()
        moved[far_rows] *= -1
        block = Block(Side(moved, None, None), Side(y, None, None), Matched(0, 0, 0), False)
        with triton_interpreter.counting() as counts:
            triton_softmax._softmax_sums(*triton_launch.flat(block), scale, True, True)
        assert counts.flop == launch_counts("softmax_sums", Asked(128, 128, 32, 4), INTERPRETER, recomputed).flop


@pytest.mark.parametrize("num_columns", [64, 1000])
def test_parts_of_sums_fit_a_super_panel(num_columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "PARTIAL_BYTES", 1 << 15)
    # the interpreter's are smaller than any on a GPU
    monkeypatch.setattr(triton_launch, "LEAST_TILE", 32)
    monkeypatch.setattr(triton_launch, "WIDEST_TILE", 64)
    monkeypatch.setattr(triton_launch, "SUPER_ROWS", 100)
    made, make = [], triton_softmax._empty_partials

    def watched(*given: Any) -> tuple[Tensor, Tensor]:
        made.append(make(*given))
        return made[-1]

    monkeypatch.setattr(triton_softmax, "_empty_partials", watched)
    block = _block(250, num_columns, 16, torch.float32, "plain")
    sums = [torch.zeros(size, 2) for size in block.shape]
    triton_backend.fold_softmax(block, torch.tensor(1.0), sums[0], lambda: sums[1])
    assert len(made) >= 3
    assert all(rows.nbytes + columns.nbytes <= 1 << 15 for rows, columns in made)
    # every logit once: the unmatched ones of each row, of about the same size
    assert sums[0][:, 1].log2().add(sums[0][:, 0]).sub(math.log2(num_columns)).abs().max() < 1


# --- as operators -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["plain", "positive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_are_what_they_say(options: str, dtype: torch.dtype) -> None:
    """opcheck: schemas, no hidden mutation or aliases, fake kernels with the shapes, strides and dtypes of the real ones."""
    block = _block(40, 70, 24, dtype, options)
    scale = triton_launch.scale_parts(torch.tensor(10.0, dtype=torch.float64))
    num_terms = 2 if options == "positive" else 1
    terms = [torch.full((size, num_terms), 30.0) for size in block.shape]
    flat = triton_launch.flat(block)
    bias, weight = torch.tensor(-2.0), torch.tensor(0.5)
    partials, sums = torch.ones(2 * num_terms, 3, 40), torch.zeros(40, 2 * num_terms)
    calls = [
        (triton_softmax._softmax_sums, (*flat, scale, True, True)),
        (triton_softmax._softmax_sums, (*flat, scale, True, False)),
        (triton_softmax._fold_sums, (partials, sums)),
        (triton_softmax._softmax_gradients, (*flat, scale, *terms, None, None)),
        (triton_softmax._softmax_gradients, (*flat, scale, None, terms[1], weight, weight)),
        (triton_sigmoid._sigmoid, (*flat, scale, bias, None, True)),
        (triton_sigmoid._sigmoid, (*flat, scale, bias, weight, False)),
        (gemm.add_panel_product, (torch.zeros(40, 24), torch.ones(40, 70, dtype=dtype), block.y.features, 0.5)),
    ]
    # the poison of these tests would be a second result; deterministic mode makes every operator one
    for operator, given in calls:
        torch.library.opcheck(operator, given)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("views", "duplicates"), [(1, "negative"), pytest.param(2, "positive", marks=pytest.mark.slow)])
def test_compiles_whole(loss: str, views: int, duplicates: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without a graph break, forward and backward, to the same bits where nothing is fused.

    As on a GPU: `auto` chooses Triton, and the launch comes from the table's file.
    """
    monkeypatch.setattr(arguments, "_backend", _as_on_a_gpu)
    monkeypatch.setattr(triton_launch, "launch_for", _launch_from_the_table)
    x, y = (t.requires_grad_() for t in features("gap", 70, 40, views=views))
    scalars = [torch.tensor(value, requires_grad=True) for value in (14.3, BIASES[loss]) if value is not None]
    ids, valid = torch.arange(70) % 25, torch.arange(70) % 7 != 1

    def step(x: Tensor, y: Tensor, *scalars: Tensor) -> Tensor:
        return LOSSES[loss](x, y, *scalars, ids=ids, valid=valid, views=views, duplicates=duplicates)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = compiled(x, y, *scalars)
    expected = step(x, y, *scalars)
    assert torch.equal(found, expected)
    for got, true in zip(*(torch.autograd.grad(value, (x, y, *scalars)) for value in (found, expected)), strict=True):
        assert torch.equal(got, true)


_backend, launch_for = arguments._backend, tuning.launch_for


def _as_on_a_gpu(name: Backend, precision: Fp32Precision, device: torch.device, num_ranks: int) -> ModuleType:
    return _backend(name, precision, torch.device("cuda"), num_ranks)


def _launch_from_the_table(
    kernel: Kernel, dtype: torch.dtype, precision: Fp32Precision, positives: bool, is_aligned: bool, device: torch.device
) -> Launch:
    return launch_for(kernel, dtype, precision, positives, is_aligned, torch.device("cuda"))


# --- which launch, and where it cannot run ------------------------------------------------------------------------------------


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What torch says of the GPU: change it."""
    found = {"capability": (9, 0), "hip": None, "gcn": "gfx942:sramecc+:xnack-"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("P", (), {"gcnArchName": found["gcn"]}))
    tuning.architecture.cache_clear()
    yield found
    tuning.architecture.cache_clear()


@pytest.mark.parametrize(
    ("capability", "hip", "architecture"),
    [
        ((8, 0), None, "sm80"),
        ((9, 0), None, "sm90"),
        ((10, 0), None, "sm100"),
        ((9, 4), "7.0", "gfx942"),
        ((8, 9), None, OTHER),
    ],
)
def test_launch_is_the_architectures_or_the_one_for_all_others(
    capability: tuple[int, int],
    hip: str | None,
    architecture: str,
    pretended_gpu: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretended_gpu["capability"] = capability
    monkeypatch.setattr(torch.version, "hip", hip)
    for positives in (False, True):
        found = tuning.launch_for("softmax_sums", torch.bfloat16, "ieee", positives, True, torch.device("cuda"))
        assert found == table()[Key(architecture, "softmax_sums", "16 bits", positives)]
        unaligned = tuning.launch_for("softmax_sums", torch.bfloat16, "ieee", positives, False, torch.device("cuda"))
        assert unaligned == table()[Key(OTHER, "softmax_sums", "16 bits", positives)]


def test_table_has_a_launch_for_every_kernel_everywhere() -> None:
    wanted = {
        Key(OTHER, kernel, products, positives) for kernel in KERNELS for products in PRODUCTS for positives in (False, True)
    }
    assert wanted <= set(table())
    for key, launch in table().items():
        assert isinstance(launch, Launch)
        # a block is made of whole products of the matrix units, and the sigmoid's factors of 64 columns
        assert launch.block_rows % 64 == launch.block_columns % 64 == launch.block_dim % 16 == 0, key
        for size in (launch.block_rows, launch.block_columns):
            assert triton_launch.LEAST_TILE <= size <= triton_launch.WIDEST_TILE, key
        assert not launch.tma or key.architecture in ("sm90", "sm100"), key


def test_needs_a_gpu_unless_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "IS_INTERPRETED", False)
    with pytest.raises(ValueError, match=r"backend='triton' cannot run on cpu: it needs a CUDA or ROCm device; choose 'auto'"):
        arguments._backend("triton", "ieee", torch.device("cpu"), 1)
    assert arguments._backend("triton", "tf32x3", torch.device("cuda"), 1) is triton_backend


def test_auto_is_triton_on_a_gpu_and_panels_on_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    from scaleclip_kernels import distributed

    distributed._say.cache_clear()
    with caplog.at_level("INFO", logger="scaleclip_kernels"):
        for _ in range(2):
            assert arguments._backend("auto", "ieee", torch.device("cuda"), 1) is triton_backend
            assert arguments._backend("auto", "ieee", torch.device("cpu"), 1) is panels
    assert [record.message for record in caplog.records] == ["backend triton on cuda", "backend panels on cpu"]


def test_without_triton_auto_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    import scaleclip_kernels

    monkeypatch.delattr(scaleclip_kernels, "triton_backend")
    monkeypatch.setitem(sys.modules, "scaleclip_kernels.triton_backend", None)
    with pytest.raises(ValueError, match=r"backend='triton' cannot run: .*install it, or choose backend='panels'"):
        arguments._backend("auto", "ieee", torch.device("cuda"), 1)
