"""A process group of this process alone, and a run with it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fake_shards import LAYOUTS, blank, make_whole, write_step
from scaleclip.checkpoint.checkpointer import Checkpointer
from scaleclip.checkpoint.shard import Shard
from scaleclip.checkpoint.state import TrainState
from scaleclip.config import CheckpointConfig
from scaleclip.distributed import World


class Run:
    """A shard and its checkpoints; step X has the values of `write_step(shard, X)`."""

    def __init__(self, folder: Path, world: World, config: CheckpointConfig, origin: dict[str, Any]) -> None:
        self.folder = folder
        self.shard = blank(LAYOUTS["cut together"](make_whole(0), 0, 1))
        self.checkpointer = Checkpointer(folder, world, config, origin).attach(lambda: self.shard)

    def save(self, *steps: int) -> None:
        """Save these steps, and wait until they are published and mirrored."""
        for step in steps:
            write_step(self.shard, step)
            self.checkpointer.save(TrainState(step=step, faults={"tiny/missing": step}))
        self.checkpointer.finish()

    def expected(self, step: int) -> Shard:
        shard = blank(self.shard)
        write_step(shard, step)
        return shard

    def path(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step_{step:08d}"


@pytest.fixture
def world() -> Iterator[World]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, 0, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.fixture
def open_run(tmp_path: Path, world: World) -> Callable[..., Run]:
    """A new start of a run in tmp_path, by default of one in tmp_path / "run"."""

    def start(name: str = "run", origin: dict[str, Any] = {"optim.lr": 1.0}, **settings: object) -> Run:  # noqa: B006
        return Run(tmp_path / name, world, CheckpointConfig.model_validate(settings), origin)

    return start
