"""The projector's arithmetic against torch's batch norm over the valid samples of all ranks, in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scaleclip.config import ProjectorConfig
from scaleclip.losses.projection import project
from scaleclip.models.projector import Projector, ProjectorWeights
from ssl_rank_jobs import DIM, SHARES, WIDTH, ProjectionCase, projection, projection_case, share_of


def naive(states_BD: Tensor, weights: ProjectorWeights) -> Tensor:
    """Of samples that are all valid."""
    w = weights
    hidden_BH = F.linear(states_BD, w.first_HD)
    hidden_BH = F.batch_norm(hidden_BH, None, None, w.first_scale_H, w.first_shift_H, training=True).relu()
    hidden_BH = F.linear(hidden_BH, w.second_HH)
    hidden_BH = F.batch_norm(hidden_BH, None, None, w.second_scale_H, w.second_shift_H, training=True).relu()
    return F.linear(hidden_BH, w.last_EH, w.last_bias_E)


def truth(case: ProjectionCase) -> dict[str, Tensor]:
    """The projection of the whole batch and its true gradients, zero where invalid. fp64."""
    states_BD = case.states_BD[case.valid_B].double().requires_grad_()
    weights = ProjectorWeights(*(weight.detach().double().requires_grad_() for weight in case.weights))
    projected_BE = naive(states_BD, weights)
    projected_BE.backward(case.grad_BE[case.valid_B].double())

    def padded(rows: Tensor) -> Tensor:
        return rows.new_zeros(len(case.valid_B), rows.shape[1]).index_copy(0, case.valid_B.nonzero()[:, 0], rows)

    gradients = {name: weight.grad for name, weight in weights._asdict().items()}
    return {"projected": padded(projected_BE.detach()), "states": padded(states_BD.grad), **gradients}


def assert_close(found: Tensor, true: Tensor, name: str) -> None:
    error = (found.double() - true).abs().max() if true.numel() else torch.zeros(())
    assert found.dtype == torch.float32
    assert error <= 3e-5 * true.abs().max(), f"{name}: {error:.1e} of {true.abs().max():.1e}"


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_values_and_gradients_are_those_of_the_global_batch(num_ranks, on_ranks):
    """The mean over ranks for weights; for states num_ranks times the true ones. Invalid samples hold NaN."""
    found = [result.projection for result in on_ranks(num_ranks)]
    for name, true in truth(projection_case(SHARES[num_ranks])).items():
        if name == "projected":
            assert_close(torch.cat([rank[name] for rank in found]), true, name)
        elif name == "states":
            assert_close(torch.cat([rank[name] for rank in found]) / num_ranks, true, name)
        else:
            assert_close(torch.stack([rank[name] for rank in found]).mean(dim=0), true, name)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_invalid_samples_are_zero_and_have_no_gradient(num_ranks, on_ranks):
    case = projection_case(SHARES[num_ranks])
    for rank, result in enumerate(on_ranks(num_ranks)):
        invalid_B = ~case.valid_B[share_of(SHARES[num_ranks], rank)]
        for name in ("projected", "states"):
            assert (result.projection[name][invalid_B] == 0).all()


def test_one_process_alone_needs_no_group(on_ranks):
    (ranks,) = on_ranks(1)
    for name, tensor in projection(None).items():
        assert torch.equal(tensor, ranks.projection[name])


def test_a_mean_that_is_large_beside_the_deviation():
    """E[x^2] - E[x]^2 would be off by 10 % and more here."""
    case = projection_case(["1" * 32])
    # what the rounding of states and of products costs is no error of the statistics
    states_BD = (2048 + torch.randint(-4, 5, (32, WIDTH))).float()
    first_HD = torch.eye(WIDTH).repeat(2, 1)[: len(case.weights.first_HD)]
    case = case._replace(states_BD=states_BD, weights=case.weights._replace(first_HD=first_HD))
    found_BE = project(case.states_BD, case.weights, case.valid_B, None)
    assert_close(found_BE.detach(), truth(case)["projected"], "projected")


def test_autocast_plays_no_part():
    case = projection_case(SHARES[1])
    expected_BE = project(case.states_BD, case.weights, case.valid_B, None)
    with torch.autocast("cpu", torch.bfloat16):
        found_BE = project(case.states_BD, case.weights, case.valid_B, None)
    assert found_BE.dtype == torch.float32
    assert torch.equal(found_BE, expected_BE)


def test_half_precision_states_are_projected_in_fp32():
    case = projection_case(SHARES[1])
    states_BD = case.states_BD.bfloat16().requires_grad_()
    found_BE = project(states_BD, case.weights, case.valid_B, None)
    assert torch.equal(found_BE, project(states_BD.float(), case.weights, case.valid_B, None))
    found_BE[case.valid_B].square().sum().backward()
    assert states_BD.grad.dtype == torch.bfloat16
    assert states_BD.grad[case.valid_B].any()


def test_no_valid_sample_and_a_single_one():
    weights = Projector(WIDTH, ProjectorConfig(hidden=8, dim=DIM))()
    for valid_B in (torch.tensor([False, False]), torch.tensor([False, True])):
        states_BD = torch.full((2, WIDTH), torch.nan).masked_fill(valid_B.unsqueeze(1), 1.0).requires_grad_()
        projected_BE = project(states_BD, weights, valid_B, None)
        found = torch.autograd.grad(projected_BE.square().sum(), [states_BD, *weights], retain_graph=True)
        assert (projected_BE[~valid_B] == 0).all()
        assert projected_BE.isfinite().all()
        # a sample that is alone is its own mean, whatever it holds
        assert (found[0] == 0).all()
        assert all(gradient.isfinite().all() and (valid_B.any() or not gradient.any()) for gradient in found)
