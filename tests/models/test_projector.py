"""SLIP's projector: its layers, its start, and that its weights outlive a forward pass, whole."""

import pytest
import torch

from scaleclip.config import ProjectorConfig
from scaleclip.local_ranks import run_ranks
from scaleclip.models.projector import Projector, ProjectorWeights
from ssl_rank_jobs import gradients_under_stage_3

SHAPES = ProjectorWeights((64, 48), (64,), (64,), (64, 64), (64,), (64,), (16, 64), (16,))


def projector(width: int = 48) -> Projector:
    return Projector(width, ProjectorConfig(hidden=64, dim=16))


def test_shapes_are_slips():
    model = projector()
    assert ProjectorWeights(*(tuple(weight.shape) for weight in model())) == SHAPES
    assert [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()] == [
        ("first.weight", (64, 48)),
        ("first_norm.weight", (64,)),
        ("first_norm.bias", (64,)),
        ("second.weight", (64, 64)),
        ("second_norm.weight", (64,)),
        ("second_norm.bias", (64,)),
        ("last.weight", (16, 64)),
        ("last.bias", (16,)),
    ]
    assert not list(model.buffers())
    defaults = Projector(768, ProjectorConfig())()
    assert defaults.second_HH.shape == (4096, 4096)
    assert defaults.last_EH.shape == (256, 4096)


def test_it_starts_as_linear_layers_and_batch_norm_do():
    torch.manual_seed(0)
    weights = projector()()
    for weight, fan_in in ((weights.first_HD, 48), (weights.second_HH, 64), (weights.last_EH, 64), (weights.last_bias_E, 64)):
        bound = fan_in**-0.5
        assert 0.9 * bound < weight.abs().max() <= bound or weight.ndim == 1
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.25 if weight.ndim == 1 else 0.05)
    for scale_H, shift_H in ((weights.first_scale_H, weights.first_shift_H), (weights.second_scale_H, weights.second_shift_H)):
        assert (scale_H == 1).all()
        assert (shift_H == 0).all()


def test_it_can_be_made_without_values():
    with torch.device("meta"):
        model = projector()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert ProjectorWeights(*(tuple(weight.shape) for weight in model())) == SHAPES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_fp32_copies_through_which_gradients_flow(dtype):
    model = projector().to(dtype)
    weights = model()
    before = [weight.detach().clone() for weight in weights]
    for number, (weight, parameter) in enumerate(zip(weights, model.parameters(), strict=True)):
        assert weight.dtype == torch.float32
        assert torch.equal(weight, parameter.float())
        parameter.data.zero_()
        assert torch.equal(weight, before[number])
    torch.stack([number * weight.sum() for number, weight in enumerate(weights, 1)]).sum().backward()
    for number, parameter in enumerate(model.parameters(), 1):
        assert (parameter.grad == number).all()


def test_parameters_that_zero_3_gathers_for_a_layer_alone():
    """Nothing is gathered where the loss is taken, and the gradients are those of one process."""
    for found, expected in run_ranks(gradients_under_stage_3, 2):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-6 * gradient.abs().max().item())
