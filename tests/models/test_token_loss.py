import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scaleclip.models.token_loss import best_tokens, token_loss
from storage_tracker import StorageTracker

SHAPES = [(1, 2, 1), (7, 11, 3), (64, 37, 16), (65, 129, 20)]
"""Tokens, words, values of a state."""


def tokens(num: int, words: int, dim: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num)
    states = torch.randn(num, dim, dtype=dtype, generator=generator)
    head = torch.randn(words, dim, dtype=dtype, generator=generator)
    targets = torch.randint(0, words, (num,), generator=generator)
    counted = torch.rand(num, generator=generator) < 0.7
    return states.requires_grad_(), head.requires_grad_(), targets, counted


def naive(states: Tensor, head: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    return F.cross_entropy((states @ head.T)[counted], targets[counted], reduction="sum")


def with_gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    # an upstream gradient that is not 1
    return (loss.detach(), *torch.autograd.grad(3 * loss, inputs))


@pytest.mark.parametrize("chunk", [1, 8, 1000])
@pytest.mark.parametrize(("num", "words", "dim"), SHAPES)
def test_loss_and_gradients_are_those_of_cross_entropy(num: int, words: int, dim: int, chunk: int) -> None:
    states, head, targets, counted = tokens(num, words, dim)
    ours = with_gradients(token_loss(states, head, targets, counted, chunk), states, head)
    torch.testing.assert_close(
        ours, with_gradients(naive(states, head, targets, counted), states, head), rtol=1e-12, atol=1e-12
    )


def test_large_logits_neither_overflow_nor_vanish() -> None:
    states, head, targets, counted = tokens(20, 30, 8)
    with torch.no_grad():
        states *= 1000
    ours = with_gradients(token_loss(states, head, targets, counted, 6), states, head)
    torch.testing.assert_close(
        ours, with_gradients(naive(states, head, targets, counted), states, head), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_error_is_that_of_plain_torch(autocast: bool) -> None:
    """fp32, and fp32 parameters under bf16 autocast."""
    states, head, targets, counted = tokens(300, 500, 64, torch.float32)
    with torch.no_grad():
        head /= 8
    truth = with_gradients(naive(states.double(), head.double(), targets, counted), states, head)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain_loss = F.cross_entropy(F.linear(states, head)[counted].float(), targets[counted], reduction="sum")
        plain = with_gradients(plain_loss, states, head)
        ours = with_gradients(token_loss(states, head, targets, counted, 128), states, head)
    for truth_i, plain_i, ours_i in zip(truth, plain, ours, strict=True):
        assert ours_i.dtype == torch.float32
        plain_error, our_error = (plain_i - truth_i).norm(), (ours_i - truth_i).norm()
        assert our_error <= 1.5 * plain_error + 1e-6 * truth_i.norm(), f"{our_error=:.2e} {plain_error=:.2e}"
    # logits are bf16 indeed
    assert ((ours[1] - truth[1]).norm() > 1e-3 * truth[1].norm()) == autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_get_gradients_of_their_own_type(dtype: torch.dtype) -> None:
    states, head, targets, counted = tokens(40, 50, 8, dtype)
    loss, *gradients = with_gradients(token_loss(states, head, targets, counted, 16), states, head)
    expected, *_ = with_gradients(naive(states.double(), head.double(), targets, counted), states, head)
    assert loss.dtype == torch.float32
    assert [gradient.dtype for gradient in gradients] == [dtype, dtype]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=0)


def test_what_does_not_count_may_be_anything() -> None:
    states, head, targets, counted = tokens(30, 11, 4)
    expected = with_gradients(token_loss(states, head, targets, counted, 8), states, head)
    spoilt = states.detach().masked_fill(~counted.unsqueeze(1), torch.nan).requires_grad_()
    ours = with_gradients(token_loss(spoilt, head, targets.masked_fill(~counted, -100), counted, 8), spoilt, head)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert (ours[1][~counted] == 0).all()


def test_nothing_counts() -> None:
    states, head, targets, counted = tokens(10, 11, 4)
    for num in (10, 0):
        args = states[:num], head, targets[:num], counted[:num] & False
        for value in with_gradients(token_loss(*args, 4), states, head):
            assert (value == 0).all()


def test_nan_that_counts_is_not_hidden() -> None:
    states, head, targets, counted = tokens(10, 11, 4)
    spoilt = states.detach().masked_fill(counted.unsqueeze(1), torch.nan).requires_grad_()
    assert all(value.isnan().any() for value in with_gradients(token_loss(spoilt, head, targets, counted, 4), spoilt, head))


def test_gradients_are_computed_only_where_needed() -> None:
    states, head, targets, counted = tokens(10, 11, 4)
    by_states, by_head = torch.autograd.grad(token_loss(states, head, targets, counted, 4), (states, head))
    only_states = token_loss(states, head.detach(), targets, counted, 4)
    torch.testing.assert_close(torch.autograd.grad(only_states, states)[0], by_states, rtol=0, atol=0)
    only_head = token_loss(states.detach(), head, targets, counted, 4)
    torch.testing.assert_close(torch.autograd.grad(only_head, head)[0], by_head, rtol=0, atol=0)
    num_products = []
    for enabled, frozen in ((True, False), (True, True), (False, False)):
        with torch.set_grad_enabled(enabled), torch.profiler.profile() as profile:
            token_loss(states, head.detach() if frozen else head, targets, counted, 4)
        num_products.append(sum(event.count for event in profile.key_averages() if event.key == "aten::mm"))
    assert num_products == [9, 6, 3]  # of 3 chunks


@pytest.mark.parametrize("autocast", [False, True])
def test_no_tensor_holds_all_logits(autocast: bool) -> None:
    num, words, dim, chunk = 512, 1000, 8, 32
    states, head, targets, counted = tokens(num, words, dim, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with StorageTracker() as tracker:
            token_loss(states, head, targets, counted, chunk).backward()
        assert tracker.largest_bytes == chunk * words * 4
        assert tracker.peak_bytes < 3 * chunk * words * 4
        with StorageTracker() as tracker:
            best_tokens(states, head, chunk)
        assert tracker.peak_bytes < 2 * chunk * words * 4


def test_best_tokens() -> None:
    states, head, *_ = tokens(65, 129, 20)
    assert best_tokens(states, head, 16).tolist() == (states @ head.T).argmax(1).tolist()
