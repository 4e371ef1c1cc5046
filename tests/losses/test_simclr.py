"""NT-Xent against its definition: an explicit matrix of all views against all, in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scaleclip.config import LossConfig
from scaleclip.losses.options import kernel_options
from scaleclip.losses.simclr import simclr
from ssl_rank_jobs import CONFIGS, DIM, EVEN_SHARES, nt_xent, valid, views_of


def naive(views_2BE: Tensor, temperature: float) -> Tensor:
    """Of samples that are all valid."""
    num_samples = views_2BE.shape[1]
    unit_NE = F.normalize(views_2BE.flatten(0, 1), dim=1)
    logits_NN = (unit_NE @ unit_NE.T / temperature).masked_fill(torch.eye(2 * num_samples, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits_NN, torch.arange(2 * num_samples).roll(num_samples))


def truth(shares: list[str], temperature: float) -> tuple[Tensor, Tensor]:
    """The loss of the global batch and its gradient [2, B, E], zero where invalid. fp64."""
    views_2BE, valid_B = views_of(shares).double(), valid(shares)
    there_2BE = views_2BE[:, valid_B].requires_grad_()
    loss = naive(there_2BE, temperature)
    loss.backward()
    gradient_2BE = torch.zeros_like(views_2BE)
    gradient_2BE[:, valid_B] = there_2BE.grad
    return loss.detach(), gradient_2BE


def assert_close(found: Tensor, true: Tensor, unit: float) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), true, rtol=0, atol=unit * true.abs().max().item())


@pytest.mark.parametrize("number", range(len(CONFIGS)), ids=["default", "gathered", "bf16"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_value_and_gradients_are_those_of_the_global_batch(num_ranks, number, on_ranks):
    """Of several lengths, NaN where invalid; a rank's gradients are num_ranks times its share of the true ones."""
    config = CONFIGS[number]
    unit = 2e-6 if config.compute_dtype == "fp32" else 2e-2
    loss, gradient_2BE = truth(EVEN_SHARES[num_ranks], config.simclr_temperature)
    found = [result.nt_xent[number] for result in on_ranks(num_ranks)]
    assert all(torch.equal(rank_loss, found[0][0]) for rank_loss, _ in found)
    assert_close(found[0][0], loss, unit)
    whole_2BE = torch.cat([gradient for _, gradient in found], dim=1) / num_ranks
    assert_close(whole_2BE, gradient_2BE, unit)
    assert (whole_2BE[:, ~valid(EVEN_SHARES[num_ranks])] == 0).all()


def test_compute_dtype_is_heeded(on_ranks):
    (rank,) = on_ranks(1)
    assert 1e-6 < (rank.nt_xent[0][0] - rank.nt_xent[2][0]).abs() < 1e-1


def test_one_process_alone_needs_no_group(on_ranks):
    (rank,) = on_ranks(1)
    loss, gradient_2BE = nt_xent(None, CONFIGS[0])
    assert torch.equal(loss, rank.nt_xent[0][0])
    assert torch.equal(gradient_2BE, rank.nt_xent[0][1])


def test_kernels_take_what_is_configured():
    config = LossConfig(compute_dtype="bf16", fp32_precision="tf32x3", schedule="gather", backend="triton")
    assert kernel_options(config, None) == {
        "compute_dtype": torch.bfloat16, "fp32_precision": "tf32x3", "group": None, "schedule": "gather", "backend": "triton",
    }  # fmt: skip


def test_backend_and_precision_are_heeded():
    loss, gradient_2BE = truth(EVEN_SHARES[1], 0.1)
    found = nt_xent(None, LossConfig(backend="reference"))
    assert_close(found[0], loss, 2e-6)
    assert_close(found[1], gradient_2BE, 2e-6)
    with pytest.raises(ValueError, match="tf32x3"):
        nt_xent(None, LossConfig(backend="panels", fp32_precision="tf32x3"))
    with pytest.raises(ValueError, match="tf32x3"):
        nt_xent(None, LossConfig(backend="reference", fp32_precision="tf32x3"))


def test_ranks_with_other_numbers_of_samples_are_refused(on_ranks):
    assert all("all ranks of a group must make the same call" in result.error for result in on_ranks(2))


def test_a_sample_that_is_alone_and_none_at_all():
    """Alone, a view has no other candidate than the right one."""
    views_2BE = torch.randn(2, 3, DIM).requires_grad_()
    for digits in ("010", "000"):
        loss = simclr((views_2BE[0], views_2BE[1]), valid([digits]), LossConfig(), None)
        (gradient_2BE,) = torch.autograd.grad(loss, views_2BE)
        assert loss == 0
        assert (gradient_2BE == 0).all()


def test_half_precision_views_are_compared_in_fp32():
    views_2BE = views_of(EVEN_SHARES[1]).bfloat16()
    arguments = valid(EVEN_SHARES[1]), LossConfig(), None
    loss = simclr((views_2BE[0], views_2BE[1]), *arguments)
    assert loss == simclr((views_2BE[0].float(), views_2BE[1].float()), *arguments)
