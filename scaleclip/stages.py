"""A run as a list of stages, each trained as an ordinary run that goes on with the weights before it.

Schedules that need it: CLIPA (arXiv:2306.15658) and CLIPS (arXiv:2411.16828) raise the resolution, Recap-CLIP
(arXiv:2406.08478) lowers the learning rate with it, Jina-CLIP (arXiv:2405.20204) changes data, text length and objective.
Steps and samples are counted over the whole run.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from scaleclip.config import RunConfig
from scaleclip.config_io import stage_config


class Stage(NamedTuple):
    """A stretch of a run between two steps."""

    number: int
    """From 0 on."""
    config: RunConfig
    """Its own, without stages; `run.seed` is another in each, so that each has an order of samples of its own."""
    first_step: int
    """Optimizer steps of the run before it."""
    keeps_optimizer: bool
    """Whether it goes on with the moments and the step counter of the stage before."""

    @property
    def last_step(self) -> int:
        """Optimizer steps of the run at its end, which is the next one's `first_step`."""
        return self.first_step + self.config.train.steps

    @property
    def samples(self) -> int:
        """Slots of its global batches."""
        return self.config.train.steps * self.config.train.global_batch


def stages_of(config: RunConfig) -> list[Stage]:
    """The stages of a run; one, the run itself, where it names none.

    Raises:
        ConfigError: see `stage_config`; not for a configuration that was parsed.
    """
    if not config.stages:
        return [Stage(0, config, 0, keeps_optimizer=True)]
    stages: list[Stage] = []
    for number, section in enumerate(config.stages):
        laid = stage_config(config, number)
        run = laid.run.model_copy(update={"seed": _seed(laid.run.seed, number)})
        first_step = stages[-1].last_step if stages else 0
        stages.append(Stage(number, laid.model_copy(update={"run": run}), first_step, section.optimizer == "keep"))
    return stages


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that takes step `step` (the first is 0): a border belongs to the stage it begins, the run's end to the last."""
    return next(stage for stage in reversed(stages) if stage.first_step <= step)


def stage_before(stages: Sequence[Stage], step: int) -> Stage:
    """The stage after whose updates a checkpoint of `step` was saved: a border belongs to the stage that it ends."""
    return stage_at(stages, max(step - 1, 0))


def _seed(seed: int, number: int) -> int:
    """63 bits; the run's own for the first stage. A contract with the runs that exist, as the order of samples is."""
    if number == 0:
        return seed
    digest = hashlib.sha256(f"stage {number} of {seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
