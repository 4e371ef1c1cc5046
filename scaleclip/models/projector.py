"""The head of self-supervision on images: SimCLR's projector (arXiv:2002.05709) as SLIP has it (arXiv:2112.12750).

The module holds parameters and no arithmetic: `scaleclip.losses.projection.project` does that, once on a rank's whole share of
the batch, where the towers may have seen it in chunks. Batch norm has no running statistics, since nothing is evaluated here.

Dimensions: D the image tower's width, H hidden, E the output's width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from scaleclip.config import ProjectorConfig


class ProjectorWeights(NamedTuple):
    """Two hidden layers with batch norm and ReLU, and a linear one. All fp32."""

    first_HD: Tensor
    first_scale_H: Tensor
    first_shift_H: Tensor
    second_HH: Tensor
    second_scale_H: Tensor
    second_shift_H: Tensor
    last_EH: Tensor
    last_bias_E: Tensor


class Projector(nn.Module):
    """The projector's parameters.

    Under `torch.device("meta")` it has the shapes of its parameters and no values.

    Args:
        width: of the states that it projects (D).
        config: its other widths.
    """

    def __init__(self, width: int, config: ProjectorConfig) -> None:
        super().__init__()
        hidden = config.hidden
        # batch norm takes away what a bias before it would add
        self.first = _Layer(_uniform(hidden, width, fan_in=width))
        self.first_norm = _Layer(torch.ones(hidden), torch.zeros(hidden))
        self.second = _Layer(_uniform(hidden, hidden, fan_in=hidden))
        self.second_norm = _Layer(torch.ones(hidden), torch.zeros(hidden))
        self.last = _Layer(_uniform(config.dim, hidden, fan_in=hidden), _uniform(config.dim, fan_in=hidden))

    def forward(self) -> ProjectorWeights:
        """Copies of the parameters, through which gradients reach them."""
        layers = (self.first, self.first_norm, self.second, self.second_norm, self.last)
        return ProjectorWeights(*(copy for layer in layers for copy in layer()))


class _Layer(nn.Module):
    """A layer's parameters. ZeRO-3 gathers them for its forward pass and takes them away after it, so that gives copies."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self) -> tuple[Tensor, ...]:
        return tuple(parameter.to(torch.float32, copy=True) for parameter in self.parameters())


def _uniform(*shape: int, fan_in: int) -> Tensor:
    """As nn.Linear starts."""
    bound = fan_in**-0.5
    return torch.empty(shape).uniform_(-bound, bound)
