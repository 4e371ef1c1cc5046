"""Optimizer steps on synthetic pairs, driven as the trainer drives them: their parts, their memory, what they learn.

Every rank calls. Dimensions: B pairs, E the shared embedding space.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import deepspeed
import torch

from loss_bench.memory import added_bytes
from scaleclip import distributed, step
from scaleclip.config import RunConfig
from scaleclip.config_io import parse_config
from scaleclip.engine import Engine
from scaleclip.models.dual_encoder import Inputs
from scaleclip.step import StepResult, TrainStep
from scaleclip.traffic import GATHERING, REDUCING
from train_bench.laps import Stopwatch
from train_bench.pairs import Pairs
from train_bench.points import (
    BACKWARD,
    DATA,
    FIRST_PASS,
    FORWARD,
    GATHER,
    LOSS,
    REDUCE,
    STEP,
    Answer,
    Layout,
    LearnJob,
    MemoryJob,
    StepJob,
)
from train_bench.towers import model_config, num_parameters

_LR = 5e-4
_WARM_UP_STEPS = 5
_UNSEEN_PAIRS, _UNSEEN_STEP = 4096, 2**40


class Steps:
    """A model in its first state, and steps on pairs of its own.

    Args:
        layout: how a step lies on the ranks.
    """

    def __init__(self, layout: Layout) -> None:
        self.config = _config(layout)
        world = distributed.init()
        self.engine = Engine(self.config, world)
        self._train_step = TrainStep(self.engine, self.config, world, layout.micro_batch)
        self._pairs = Pairs(self.config.model)
        self._mine = range(world.rank * layout.share, (world.rank + 1) * layout.share, layout.micro_batch)

    def __call__(self, number: int, lr: float, watch: Stopwatch) -> StepResult:
        """Take step `number`, the first is 0."""
        chunks = self._pairs.batch(number, self._mine)
        return self._train_step(_watched(chunks, watch), number, lr)

    @torch.no_grad()
    def matched(self) -> float:
        """Share of some pairs that were in no step whose image is nearest to a text of its class."""
        batch = self._pairs.chunk(_UNSEEN_STEP, range(_UNSEEN_PAIRS))
        features = self.engine(Inputs(batch.pixels_BCHW, batch.tokens_BT, batch.seeds_B))
        nearest_B = (features.image_BE @ features.texts_BE[0].T).argmax(1)
        return float((batch.ids_B[nearest_B] == batch.ids_B).float().mean())


def measure_steps(job: StepJob) -> Answer:
    """Times and traffic of the steps that count."""
    steps, watch = Steps(job.layout), Stopwatch()
    traffic = []
    with _watched_engine(steps.engine, watch):
        for number in range(job.warm_up + job.steps):
            watch.next_step()
            steps(number, _LR, watch)
            traffic.append(dict(steps.engine.traffic.take()))
        watch.next_step()
    return Answer(
        steps=watch.steps[job.warm_up : -1],
        num_parameters=num_parameters(steps.config.model),
        traffic=traffic[job.warm_up :],
    )


def measure_memory(job: MemoryJob) -> Answer:
    """The peak that model, optimizer and steps add to what libraries take."""
    results: list[StepResult] = []

    def take_steps() -> None:
        steps = Steps(job.layout)
        results.extend(steps(number, _LR, Stopwatch()) for number in range(job.steps))

    added = added_bytes(take_steps, torch.device("cpu"))
    return Answer(num_parameters=num_parameters(_config(job.layout).model), added_bytes=added, losses=_losses(results))


def learn(job: LearnJob) -> Answer:
    """Loss step by step, and what came of it."""
    steps, watch = Steps(job.layout), Stopwatch()
    results = []
    for number in range(job.steps):
        watch.next_step()
        results.append(steps(number, job.lr * min(1.0, (number + 1) / _WARM_UP_STEPS), watch))
    watch.next_step()
    return Answer(
        steps=watch.steps[:-1],
        num_parameters=num_parameters(steps.config.model),
        losses=_losses(results),
        matched=steps.matched(),
    )


def _config(layout: Layout) -> RunConfig:
    return parse_config(
        {
            "model": model_config(layout.towers).model_dump(),
            "train": {
                "global_batch": layout.global_batch,
                "micro_batch": layout.micro_batch,
                "precision": layout.precision,
                "zero_stage": layout.stage,
                "reduce_gradients": layout.reduce_gradients,
            },
        }
    )


def _losses(results: list[StepResult]) -> list[float]:
    return [result.loss.item() for result in results]


def _watched(chunks: Iterator[Any], watch: Stopwatch) -> Iterator[Any]:
    """The same chunks; making one is the part DATA."""
    while True:
        with watch.part(DATA):
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk


@contextmanager
def _watched_engine(engine: Engine, watch: Stopwatch) -> Iterator[None]:
    """Every call of the engine, of the loss and of DeepSpeed's collectives as a part of its own."""
    backend = deepspeed.comm.comm.cdb
    backward = torch.autograd.backward

    def loss_backward(*args: Any, **kwargs: Any) -> None:
        # inside of Engine.backward it is the towers'
        if watch.is_outside:
            with watch.part(LOSS):
                backward(*args, **kwargs)
        else:
            backward(*args, **kwargs)

    def part_of_forward() -> str:
        return FORWARD if torch.is_grad_enabled() else FIRST_PASS

    parts: list[tuple[Any, str, str | Callable[[], str]]] = [
        (Engine, "__call__", part_of_forward),
        (Engine, "backward", BACKWARD),
        (Engine, "step", STEP),
    ]
    parts.append((step, "batch_terms", LOSS))
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.autograd, "backward", loss_backward))
        for owner, name, part in parts:
            stack.enter_context(patch.object(owner, name, watch.timed(getattr(owner, name), part)))
        for kind, names in ((REDUCE, REDUCING), (GATHER, GATHERING)):
            for name in names:
                stack.enter_context(patch.object(backend, name, _timed_work(getattr(backend, name), watch, kind)))
        yield


class _TimedWork:
    """A collective under way, the wait for it a part."""

    def __init__(self, work: Any, watch: Stopwatch, name: str) -> None:
        self._work, self.wait = work, watch.timed(work.wait, name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _timed_work(collective: Any, watch: Stopwatch, name: str) -> Any:
    def timed_collective(*args: Any, **kwargs: Any) -> Any:
        with watch.part(name):
            work = collective(*args, **kwargs)
        return work if work is None else _TimedWork(work, watch, name)

    return timed_collective
