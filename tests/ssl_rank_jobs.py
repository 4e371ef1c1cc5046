"""What the tests of SLIP's losses run on ranks of their own (scaleclip.local_ranks)."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scaleclip.config import LossConfig, ProjectorConfig
from scaleclip.engine import deepspeed, safe_get_full_grad
from scaleclip.losses.projection import project
from scaleclip.losses.simclr import simclr
from scaleclip.models.projector import Projector, ProjectorWeights

WIDTH, HIDDEN, DIM = 7, 12, 5
# samples of each rank, and which of them are valid: some ranks have invalid ones, no valid one, or none at all
SHARES = {1: ["11011"], 2: ["101", "0111"], 4: ["1011", "000", "", "11001"]}
# for the loss, of which every rank has as many
EVEN_SHARES = {1: ["1101"], 2: ["101", "011"], 4: ["101", "000", "111", "010"]}

CONFIGS = [
    LossConfig(),
    LossConfig(simclr_temperature=0.5, schedule="gather", duplicates="positive", weights=(1, 3)),
    LossConfig(compute_dtype="bf16"),
]


class ProjectionCase(NamedTuple):
    """A global batch, rank after rank. What is invalid holds NaN, gradients too."""

    states_BD: Tensor
    weights: ProjectorWeights
    valid_B: Tensor
    grad_BE: Tensor


def projection_case(shares: list[str]) -> ProjectionCase:
    torch.manual_seed(len(shares))
    weights = Projector(WIDTH, ProjectorConfig(hidden=HIDDEN, dim=DIM))()
    weights = ProjectorWeights(*((weight + 0.3 * torch.randn_like(weight)).detach() for weight in weights))
    valid_B = valid(shares)
    # the mean is far from 0
    states_BD, grad_BE = 3 + torch.randn(len(valid_B), WIDTH), torch.randn(len(valid_B), DIM)
    states_BD[~valid_B], grad_BE[~valid_B] = torch.nan, torch.nan
    return ProjectionCase(states_BD, weights, valid_B, grad_BE)


def valid(shares: list[str]) -> Tensor:
    return torch.tensor([digit == "1" for share in shares for digit in share])


def share_of(shares: list[str], rank: int) -> slice:
    start = sum(map(len, shares[:rank]))
    return slice(start, start + len(shares[rank]))


def projection(group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """This rank's share of a projection, and of its gradients."""
    rank, num_ranks = (0, 1) if group is None else (dist.get_rank(), dist.get_world_size())
    case, here = projection_case(SHARES[num_ranks]), share_of(SHARES[num_ranks], rank)
    states_BD = case.states_BD[here].clone().requires_grad_()
    weights = ProjectorWeights(*(weight.requires_grad_() for weight in case.weights))
    projected_BE = project(states_BD, weights, case.valid_B[here], group)
    projected_BE.backward(num_ranks * case.grad_BE[here])
    gradients = {name: weight.grad for name, weight in weights._asdict().items()}
    return {"projected": projected_BE.detach(), "states": states_BD.grad, **gradients}


def views_of(shares: list[str]) -> Tensor:
    """[2, B, E]: projected views of a global batch, of many lengths; NaN where invalid."""
    torch.manual_seed(len(shares))
    views_2BE = torch.randn(2, sum(map(len, shares)), DIM) * 4 * torch.rand(2, sum(map(len, shares)), 1)
    views_2BE[:, ~valid(shares)] = torch.nan
    return views_2BE


def nt_xent(group: dist.ProcessGroup | None, config: LossConfig) -> tuple[Tensor, Tensor]:
    """The loss, and this rank's share of its gradient [2, B, E]."""
    rank, num_ranks = (0, 1) if group is None else (dist.get_rank(), dist.get_world_size())
    shares = EVEN_SHARES[num_ranks]
    here = share_of(shares, rank)
    views_2BE = views_of(shares)[:, here].clone().requires_grad_()
    loss = simclr((views_2BE[0], views_2BE[1]), valid(shares)[here], config, group)
    loss.backward()
    return loss.detach(), views_2BE.grad


class SslResult(NamedTuple):
    projection: dict[str, Tensor]
    nt_xent: list[tuple[Tensor, Tensor]]
    error: str
    """Of ranks with other numbers of samples."""


def ssl_on_ranks() -> SslResult:
    """Everything on the ranks that call: starting one costs more than all of it."""
    group = dist.group.WORLD
    losses = [nt_xent(group, config) for config in CONFIGS]
    found = projection(group)
    error, num_samples = "", 2 + dist.get_rank()
    views_BE = torch.ones(num_samples, DIM)
    try:
        simclr((views_BE, views_BE), torch.ones(num_samples, dtype=torch.bool), LossConfig(), group)
    except (ValueError, RuntimeError) as raised:
        error = str(raised)
    return SslResult(found, losses, error)


class _Model(nn.Module):
    """A tower whose states leave with the weights that they are projected by."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(WIDTH, WIDTH, bias=False)
        self.projector = Projector(WIDTH, ProjectorConfig(hidden=HIDDEN, dim=DIM))

    def forward(self, inputs_BD: Tensor) -> tuple[Tensor, ProjectorWeights]:
        return self.tower(inputs_BD), self.projector()


def sharded_gradients(stage: int) -> dict[str, Tensor]:
    """Gradients of a model under ZeRO, with no parameter small enough to stay; stage 0: of the whole batch on every rank."""
    torch.manual_seed(0)
    model, rank = _Model(), dist.get_rank()
    inputs_2BD, valid_B, grad_BE = torch.randn(2, 8, WIDTH), torch.arange(8) % 3 != 1, torch.randn(8, DIM)
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    share, group, num_ranks, engine = slice(0, 8), None, 1, model
    if stage == 3:
        share, group, num_ranks = slice(4 * rank, 4 * rank + 4), dist.group.WORLD, dist.get_world_size()
        deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters())
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    # two views in two passes, of which the second one's weights serve both, as a step with chunks does
    first_BD, _ = engine(inputs_2BD[0, share])
    second_BD, weights = engine(inputs_2BD[1, share])
    if stage == 3:
        assert all(parameter.numel() == 0 for parameter in model.parameters())
    projected = [project(states_BD, weights, valid_B[share], group) for states_BD in (first_BD, second_BD)]
    loss = num_ranks * sum((view_BE.square() * grad_BE[share]).sum() for view_BE in projected)
    if stage == 3:
        engine.backward(loss)
        return {name: safe_get_full_grad(parameter) for name, parameter in model.named_parameters()}
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def gradients_under_stage_3() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Under stage 3 and the true ones."""
    expected = sharded_gradients(0)
    return sharded_gradients(3), expected
