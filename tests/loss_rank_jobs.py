"""What tests/kernels/test_ranks.py runs on ranks of its own; needs no more than scaleclip_kernels does."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

import triton_interpreter  # noqa: F401  # before anything imports triton
from scaleclip_kernels import distributed, gemm, panels, sigmoid_contrastive_loss, softmax_contrastive_loss
from storage_tracker import StorageTracker

DIM, FEATURES = 16, 8
LOSSES = {"softmax": softmax_contrastive_loss, "sigmoid": sigmoid_contrastive_loss}


@dataclass(frozen=True)
class Case:
    """A global batch and how it lies on the ranks."""

    loss: str = "softmax"
    num_pairs: int = 24
    views: int = 1
    extras: int = 0
    """Extra columns a rank."""
    labels: tuple[str, ...] = ()
    """Of valid, column_valid, ids, column_ids."""
    last_rank_invalid: bool = False
    unequal: bool = False
    dtype: torch.dtype = torch.float32
    frozen: tuple[str, ...] = ()
    """Towers that do not train."""
    options: dict[str, Any] = field(default_factory=dict)

    def sizes(self, num_ranks: int) -> list[int]:
        """Pairs a rank; unequal: 24 as 1 + 23, 1 + 0 + 23 or 1 + 0 + 2 + 21."""
        if not self.unequal:
            return [self.num_pairs // num_ranks] * num_ranks
        few = [1, 0, 2, 5][: num_ranks - 1]
        return [*few, self.num_pairs - sum(few)]


@dataclass(frozen=True)
class Batch:
    """The global batch, its columns view by view and rank by rank."""

    image: Tensor
    text: Tensor
    labels: dict[str, Tensor]


def global_batch(case: Case, sizes: list[int]) -> Batch:
    torch.manual_seed(0)
    num_rows, num_columns = sum(sizes), case.views * sum(sizes) + case.extras * len(sizes)
    valid, column_valid = torch.arange(num_rows) % 5 != 1, torch.arange(num_columns) % 7 != 2
    if case.last_rank_invalid:
        valid[num_rows - sizes[-1] :] = False
    labels = {
        "valid": valid,
        "column_valid": column_valid,
        "ids": torch.arange(num_rows) % 10,
        "column_ids": torch.arange(num_columns) % 9,
    }
    image, text = torch.randn(num_rows, DIM), torch.randn(num_columns, DIM)
    return Batch(image, text, {name: labels[name] for name in case.labels})


def local_columns(case: Case, sizes: list[int], rank: int) -> Tensor:
    """Which of the global columns (view after view, then the ranks' extras) a rank holds, in the order it holds them."""
    start, total = sum(sizes[:rank]), sum(sizes)
    views = [torch.arange(view * total + start, view * total + start + sizes[rank]) for view in range(case.views)]
    extras = case.views * total + case.extras * rank + torch.arange(case.extras)
    return torch.cat([*views, extras])


def step(case: Case, sizes: list[int], rank: int | None, group: dist.ProcessGroup | None, **options: Any) -> dict[str, Tensor]:
    """Loss and parameter gradients of a toy model on a rank's part of the batch, or (rank None) on all of it."""
    batch = global_batch(case, sizes)
    towers = nn.ModuleDict({"image": nn.Linear(DIM, FEATURES), "text": nn.Linear(DIM, FEATURES)})
    towers.add_module("logit", nn.ParameterDict({"scale": torch.tensor([14.3]), "bias": torch.tensor([-3.0])}))
    for name in case.frozen:
        towers[name].requires_grad_(False)
    rows = torch.arange(sum(sizes)) if rank is None else sum(sizes[:rank]) + torch.arange(sizes[rank])
    columns = torch.arange(len(batch.text)) if rank is None else local_columns(case, sizes, rank)
    labels = {name: value[columns if name.startswith("column") else rows] for name, value in batch.labels.items()}
    x, y = normalize(towers["image"](batch.image[rows])), normalize(towers["text"](batch.text[columns]))
    scalars = [towers["logit"]["scale"], towers["logit"]["bias"]]
    loss = LOSSES[case.loss](
        x.to(case.dtype),
        y.to(case.dtype),
        *scalars[: 2 if case.loss == "sigmoid" else 1],
        views=case.views,
        group=group,
        sizes=sizes if case.unequal and rank is not None else None,
        **labels,
        **case.options,
        **options,
    )
    loss.backward()
    gradients = {name: p.grad for name, p in towers.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def run_cases(cases: dict[str, Case]) -> dict[tuple[int, str, str], dict[str, Tensor]]:
    """This rank's results by (number of ranks, schedule, case), from groups of 2 ranks to all."""
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    panels.PANEL_ROWS, panels.PANEL_COLUMNS = 5, 7
    distributed.GATHERED_BYTES = 400  # chunks of a few rows: several a view
    world_size, results = dist.get_world_size(), {}
    for num_ranks in range(2, world_size + 1):
        # a rank's number in the group is not its own
        ranks = list(range(world_size))[-num_ranks:][::-1]
        group = dist.new_group(ranks, sort_ranks=False)
        if dist.get_rank() not in ranks:
            continue
        for schedule in ("ring", "gather"):
            for name, case in cases.items():
                sizes = case.sizes(num_ranks)
                results[num_ranks, schedule, name] = step(case, sizes, dist.get_rank(group), group, schedule=schedule)
    return results


def ring_peak_bytes(num_pairs: int, dim: int) -> dict[int, int]:
    """Bytes that a forward and backward pass over a ring holds at its peak, by number of ranks; fixed pairs a rank."""
    panels.PANEL_ROWS = panels.PANEL_COLUMNS = 32
    gemm.cpu_library(dim)  # its check, once a process, is not what is measured
    world_size, peaks = dist.get_world_size(), {}
    for num_ranks in range(2, world_size + 1):
        group = dist.new_group(list(range(num_ranks)))
        if dist.get_rank() >= num_ranks:
            continue
        x, y = (torch.randn(num_pairs, dim, requires_grad=True) for _ in range(2))
        with StorageTracker() as tracker:
            softmax_contrastive_loss(x, y, torch.tensor(5.0), group=group, schedule="ring").backward()
        peaks[num_ranks] = tracker.peak_bytes
    return peaks


def passes_in_any_order(ranks: bool) -> dict[str, dict[str, list[Tensor]]]:
    """Feature gradients of two losses whose backward passes come in other orders than their forward passes, by schedule.

    Features and sums over all ranks, in rank order; `ranks` False: the same of one process.
    """
    results = {}
    for schedule in ("ring", "gather") if ranks else ("auto",):
        torch.manual_seed(1)
        world_size, rank = (dist.get_world_size(), dist.get_rank()) if ranks else (1, 0)
        every = [torch.randn(12, FEATURES) for _ in range(4)]
        x, y, u, v = (part.chunk(world_size)[rank].clone().requires_grad_() for part in every)
        options: dict[str, Any] = {"group": dist.group.WORLD if ranks else None, "schedule": schedule}
        first = softmax_contrastive_loss(x, y, torch.tensor(3.0), **options)
        second = softmax_contrastive_loss(u, v, torch.tensor(7.0), **options)
        interleaved = [*torch.autograd.grad(second, (u, v)), *torch.autograd.grad(first, (x, y), retain_graph=True)]
        twice = list(torch.autograd.grad(first, (x, y)))
        results[schedule] = {"interleaved": interleaved, "twice": twice}
    return results


def ring_events() -> list[str]:
    """What happens on this rank in a forward pass over a ring, in order; each block is two panels high."""
    events: list[str] = []
    pass_on, wait, logits = distributed.Ring._pass_on, distributed._Transfer.wait, panels._Panel.logits

    def noted_pass_on(self: Any, leaving: Any, arriving: Any, group: Any) -> Any:
        name = "data" if group is self._channels.data else "sums"
        events.append(f"{name} leave")
        transfer = pass_on(self, leaving, arriving, group)
        transfer.name = name
        return transfer

    def noted_wait(self: Any) -> None:
        if self._works:
            events.append(f"{self.name} awaited")
        wait(self)

    def noted_logits(self: Any) -> Tensor:
        events.append("panel")
        return logits(self)

    distributed.Ring._pass_on, distributed._Transfer.wait, panels._Panel.logits = noted_pass_on, noted_wait, noted_logits
    panels.PANEL_ROWS = 4
    softmax_contrastive_loss(torch.randn(8, 4), torch.randn(8, 4), torch.tensor(2.0), group=dist.group.WORLD, schedule="ring")
    return events
