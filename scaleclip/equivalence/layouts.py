"""Ways to lay one run out over ranks, and the steps that each takes."""

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from scaleclip import distributed
from scaleclip.config import RunConfig
from scaleclip.distributed import World
from scaleclip.engine import Engine, StepOutcome
from scaleclip.equivalence.batches import global_batch, share_chunks
from scaleclip.equivalence.record import Record, Traffic
from scaleclip.step import TrainStep

Schedule = Literal["ring", "gather"]
Stage = Literal[0, 1, 2, 3]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
STAGES: tuple[Stage, ...] = get_args(Stage)


class Layout(NamedTuple):
    """How a run is laid out; what it learns should not depend on it."""

    world_size: int
    micro_batch: int
    stage: Stage
    schedule: Schedule

    def applied(self, config: RunConfig) -> RunConfig:
        """The configuration of a run laid out like this, without offloads that its stage does not have."""
        train = {
            "micro_batch": self.micro_batch,
            "zero_stage": self.stage,
            "offload_optimizer": config.train.offload_optimizer and self.stage > 0,
            "offload_parameters": config.train.offload_parameters and self.stage == 3,
        }
        return config.model_copy(
            update={
                "train": config.train.model_copy(update=train),
                "loss": config.loss.model_copy(update={"schedule": self.schedule}),
            }
        )


def grid(
    world_sizes: Sequence[int], micro_batches: Sequence[int], stages: Sequence[Stage], schedules: Sequence[Schedule]
) -> list[Layout]:
    """Every combination; one rank alone has no use for a second schedule."""
    layouts = itertools.starmap(Layout, itertools.product(world_sizes, micro_batches, stages, schedules))
    return [layout for layout in layouts if layout.world_size > 1 or layout.schedule == schedules[0]]


def pairwise(layouts: Sequence[Layout]) -> list[Layout]:
    """A few of the layouts, in which every two values that meet in one of them meet."""

    def pairs(layout: Layout) -> set[Any]:
        return set(itertools.combinations(enumerate(layout), 2))

    missing = set().union(*map(pairs, layouts))
    chosen: list[Layout] = []
    while missing:
        chosen.append(max(layouts, key=lambda layout: len(missing & pairs(layout))))
        missing -= pairs(chosen[-1])
    return chosen


def layout_steps(config: RunConfig, num_steps: int) -> Record:
    """A run's first steps on this rank, as training takes them. Every rank calls.

    Args:
        config: the run's, laid out (`Layout.applied`).
        num_steps: optimizer steps, all with the peak learning rate.
    """
    micro_batch = config.train.micro_batch
    assert micro_batch != "auto", "a layout says its micro batch"
    world = distributed.init()
    engine = _WatchedEngine(config, world)
    take_step = TrainStep(engine, config, world, micro_batch)
    losses = []
    for step in range(num_steps):
        chunks = share_chunks(global_batch(config, engine.model, step), world.rank, world.size, micro_batch)
        losses.append(take_step(iter(chunks), step, config.optim.lr).loss.item())
    return Record(losses, engine.seen, engine.parameters(), engine.sent)


class _WatchedEngine(Engine):
    """Keeps every step's gradients, and counts what was sent without them."""

    def __init__(self, config: RunConfig, world: World) -> None:
        super().__init__(config, world)
        self.seen: list[dict[str, Tensor]] = []
        self.sent: list[Traffic] = []
        self.traffic.take()

    def step(self, loss: Tensor, lr: float) -> StepOutcome:
        sent = self.traffic.take()
        self.seen.append(self.gradients())
        self.traffic.take()
        outcome = super().step(loss, lr)
        sent += self.traffic.take()
        self.sent.append(Traffic(sent["reduced_bytes"], sent["gathered_bytes"]))
        return outcome
