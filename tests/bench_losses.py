"""Losses and rank jobs for tests/tools/test_bench_loss.py, in a module that other processes can import."""

import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from scaleclip_kernels import distributed, sigmoid_contrastive_loss, softmax_contrastive_loss

FORWARD_S, BACKWARD_S = 0.05, 0.02
ALLOCATED_MIB = 200


def right(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Takes FORWARD_S and, backward, BACKWARD_S without computing."""
    time.sleep(FORWARD_S)
    loss = _plain(x, y, scale)
    if loss.requires_grad:
        loss.register_hook(lambda gradient: time.sleep(BACKWARD_S))
    return loss


def wrong(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The right loss; one of the pairs gets no gradient."""
    return _plain(torch.cat([x[:1].detach(), x[1:]]), y, scale)


def hungry(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Holds ALLOCATED_MIB while it runs: half at once, which the system gets back, half in pieces from malloc's heap.

    The pieces that a call freed lie below what it left behind, where malloc keeps them, to serve the next call unseen.
    """
    taken = [torch.ones(ALLOCATED_MIB << 17)]
    taken += [torch.ones(64 << 8) for _ in range(8 * ALLOCATED_MIB)]
    _left_behind.append(torch.ones(64 << 8))
    return _plain(x, y, scale) + 0 * taken[0][0]


_left_behind: list[Tensor] = []


def killed(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def failing(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    raise RuntimeError("the [first] line\nand the second")


def refusing(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    raise ValueError("not on this machine")


def endless(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    Path(os.environ["BENCH_LOSSES_FOLDER"], str(os.getpid())).touch()
    time.sleep(600)
    return _plain(x, y, scale)


def _plain(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits, labels = scale * x @ y.T, torch.arange(len(x))
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


class TrafficCase(NamedTuple):
    kind: str
    mode: str
    schedule: str
    views: int
    has_ids: bool
    positives: bool
    has_validity: bool


ROWS, DIM = 12, 20
TRAFFIC_CASES = [
    TrafficCase(kind, mode, schedule, **labels)
    for kind, mode, schedule in itertools.product(("softmax", "sigmoid"), ("forward", "full"), ("ring", "gather"))
    for labels in (
        {"views": 1, "has_ids": False, "positives": False, "has_validity": False},
        {"views": 2, "has_ids": True, "positives": True, "has_validity": True},
    )
] + [TrafficCase("softmax", "full", "ring", views=1, has_ids=True, positives=False, has_validity=True)]


def count_all() -> tuple[dict, dict]:
    return count_traffic(), count_collectives()


def count_traffic() -> dict[tuple[int, TrafficCase], tuple[float, float]]:
    """(counted, formula) of this rank by number of ranks and case, from groups of 2 ranks to all."""
    from loss_bench.formulas import sent_bytes
    from loss_bench.traffic import CountSent

    distributed.GATHERED_BYTES = 1500  # several chunks
    found = {}
    for num_ranks, group in _groups():
        rank = dist.get_rank(group)
        _step(TRAFFIC_CASES[0], group)  # the first call on a group also sets up its channels
        for case in TRAFFIC_CASES:
            with CountSent(num_ranks, rank) as counter:
                _step(case, group)
            formula = sent_bytes(
                case.kind,
                case.schedule,
                num_ranks,
                columns=case.views * ROWS,
                dim=DIM,
                feature_bytes=2,
                mode=case.mode,
                views=case.views,
                has_ids=case.has_ids,
                positives=case.positives,
            )
            found[num_ranks, case] = counter.sent_bytes, formula
    return found


def count_collectives() -> dict[int, dict[str, float]]:
    """Bytes counted for one call each of torch's collectives on 60 fp32 numbers (a part), by number of ranks."""
    from loss_bench.traffic import CountSent

    found: dict[int, dict[str, float]] = {}
    for num_ranks, group in _groups():
        rank, ranks = dist.get_rank(group), dist.get_process_group_ranks(group)
        part, whole = torch.ones(60), torch.ones(60 * num_ranks)
        calls = {
            "all_gather": lambda g=group, p=part, n=num_ranks: dist.all_gather([torch.empty(60) for _ in range(n)], p, group=g),
            "all_gather_into_tensor": lambda g=group, p=part, w=whole: dist.all_gather_into_tensor(w, p, group=g),
            "reduce_scatter_tensor": lambda g=group, p=part, w=whole: dist.reduce_scatter_tensor(p, w, group=g),
            "all_to_all_single": lambda g=group, w=whole: dist.all_to_all_single(torch.empty_like(w), w, group=g),
            "all_reduce": lambda g=group, p=part: dist.all_reduce(p, group=g),
            "scatter": lambda g=group, p=part, w=whole, r=ranks, n=num_ranks: dist.scatter(
                p, list(w.chunk(n)) if dist.get_rank() == r[0] else None, src=r[0], group=g
            ),
            "ring": lambda g=group, p=part, r=ranks, i=rank: [
                work.wait()
                for work in dist.batch_isend_irecv(
                    [
                        dist.P2POp(dist.isend, p, r[(i + 1) % len(r)], g),
                        dist.P2POp(dist.irecv, torch.empty(60), r[i - 1], g),
                    ]
                )
            ],
        }
        found[num_ranks] = {}
        for name, call in calls.items():
            with CountSent(num_ranks, rank) as counter:
                call()
            found[num_ranks][name] = counter.sent_bytes
        found[num_ranks]["is_root"] = float(rank == 0)
    return found


def _groups() -> list[tuple[int, dist.ProcessGroup]]:
    """Groups of 2 ranks to all that this rank is in: the last ones, so that a rank's number in it is not its own."""
    everyone = list(range(dist.get_world_size()))
    made = [(num, dist.new_group(everyone[-num:])) for num in range(2, len(everyone) + 1)]
    return [(num, group) for num, group in made if dist.get_rank() in everyone[-num:]]


def _step(case: TrafficCase, group: dist.ProcessGroup) -> None:
    loss = softmax_contrastive_loss if case.kind == "softmax" else sigmoid_contrastive_loss
    x, y = (normalize(torch.randn(n, DIM)).bfloat16().requires_grad_() for n in (ROWS, case.views * ROWS))
    options: dict[str, Any] = {"views": case.views, "group": group, "schedule": case.schedule}
    if case.has_ids:
        options |= {"ids": torch.arange(ROWS), "duplicates": "positive" if case.positives else "ignore"}
    if case.has_validity:
        options["valid"] = torch.arange(ROWS) % 3 > 0
    scalars = [torch.tensor(10.0, requires_grad=True), torch.tensor(-5.0, requires_grad=True)]
    with torch.set_grad_enabled(case.mode == "full"):
        value = loss(x, y, *scalars[: 2 if case.kind == "sigmoid" else 1], **options)
    if case.mode == "full":
        value.backward()
