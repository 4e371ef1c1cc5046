"""What the tests of checkpoints run on ranks of their own (scaleclip.local_ranks)."""

import resource
import time
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from fake_shards import KINDS, LAYOUTS, SHAPES, assert_equal, blank, load_newest, make_whole, tensors_of
from scaleclip import distributed
from scaleclip.checkpoint import checkpointer as checkpointer_module
from scaleclip.checkpoint.border import Border
from scaleclip.checkpoint.checkpointer import Checkpointer
from scaleclip.checkpoint.folders import first_fault
from scaleclip.checkpoint.shard import Fragment, Shard
from scaleclip.checkpoint.state import TrainState
from scaleclip.config import CheckpointConfig


class Found(NamedTuple):
    """What two ranks found, one thing after the other: starting a process costs more than all of it."""

    hashed: list[str]
    """Files that this rank read to check them."""
    one_element: float
    """What was loaded of a state with fewer elements than ranks."""
    full_disk: tuple[str, bool]
    """See `save_on_a_full_disk`."""


def exercise(folder: Path) -> Found:
    """Save and load on the ranks that call."""
    save(folder / "whole", "cut each", 3, 9)
    hashed = verify_shares(folder / "whole")
    save_one_element(folder / "small")
    return Found(hashed, load_one_element(folder / "small"), save_on_a_full_disk(folder / "full", 1))


def save(folder: Path, layout: str, seed: int, step: int) -> None:
    """Save make_whole(seed) as `layout` cuts it."""
    world = distributed.init()
    shard = LAYOUTS[layout](make_whole(seed), world.rank, world.size)
    checkpointer = Checkpointer(folder, world, CheckpointConfig(), {}).attach(lambda: shard)
    checkpointer.save(TrainState(step=step, world_size=world.size))
    checkpointer.finish()


def load(folder: Path, layout: str, seed: int) -> Any:
    """The state found, once the shard is that of make_whole(seed) bit for bit."""
    world = distributed.init()
    expected = LAYOUTS[layout](make_whole(seed), world.rank, world.size)
    shard = blank(expected)
    state = load_newest(Checkpointer(folder, world, CheckpointConfig(), {}).attach(lambda: shard))
    assert_equal(shard, expected)
    return state


def save_on_a_full_disk(folder: Path, full_rank: int) -> tuple[str, bool]:
    """The error of a second save, of which one rank can write 10 kB, and whether the shard is as it was."""
    world = distributed.init()
    whole = make_whole(0, {"weight": (100, 100)})
    shard, before = (LAYOUTS["cut each"](whole, world.rank, world.size) for _ in range(2))
    checkpointer = Checkpointer(folder, world, CheckpointConfig(), {}).attach(lambda: shard)
    checkpointer.save(TrainState(step=1))
    checkpointer.finish()
    if world.rank == full_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    checkpointer.save(TrainState(step=2))
    try:
        while True:
            checkpointer.poll()
            time.sleep(0.01)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    checkpointer.poll()
    return error, all(torch.equal(a, b) for (_, a), (_, b) in zip(tensors_of(shard), tensors_of(before), strict=True))


def verify_shares(folder: Path) -> list[str]:
    """The files that this rank hashes while it loads."""
    world = distributed.init()
    shard = blank(LAYOUTS["cut each"](make_whole(0), world.rank, world.size))
    with mock.patch.object(checkpointer_module, "first_fault", wraps=first_fault) as watched:
        load_newest(Checkpointer(folder, world, CheckpointConfig(), {}).attach(lambda: shard))
    return [name for call in watched.call_args_list for name in call.args[1]]


def _one_element(value: float) -> Shard:
    return Shard([Fragment("scale", (1,), 0, {"weight": torch.tensor([value])}, replicated=True)], {})


def save_one_element(folder: Path) -> None:
    """Save a state with fewer elements than ranks."""
    shard = _one_element(5.0)
    checkpointer = Checkpointer(folder, distributed.init(), CheckpointConfig(), {}).attach(lambda: shard)
    checkpointer.save(TrainState(step=1))
    checkpointer.finish()


def load_one_element(folder: Path) -> float:
    """The element's value."""
    shard = _one_element(0.0)
    load_newest(Checkpointer(folder, distributed.init(), CheckpointConfig(), {}).attach(lambda: shard))
    return shard.fragments[0].tensors["weight"].item()


def cross(folder: Path, seed: int, step: int) -> str:
    """Go on from make_whole(seed) with another model; what the log says of it."""
    world = distributed.init()
    shapes = {name: shape for name, shape in SHAPES.items() if name != "pair"} | {"conv": (2, 2), "extra": (9,)}
    shard = LAYOUTS["cut together"](make_whole(8, shapes), world.rank, world.size)
    border = Border(step, True, lambda name, whole, shape: whole[:, :2, 0, 0])
    checkpointer = Checkpointer(folder, world, CheckpointConfig(), {}).attach(lambda: shard)
    with mock.patch.object(checkpointer_module.log, "info") as info:
        assert load_newest(checkpointer, border=border) is not None
    whole = make_whole(seed)
    whole["conv"] = {kind: tensor[:, :2, 0, 0] for kind, tensor in whole["conv"].items()}
    whole["conv"]["exp_avg_sq"] = whole["conv"]["exp_avg_sq"].clamp(min=0)
    extra = {kind: torch.zeros(9) for kind in KINDS} | {"weight": make_whole(8, shapes)["extra"]["weight"]}
    expected = {name: (extra if name == "extra" else whole[name]) for name in make_whole(8, shapes)}
    assert_equal(shard._replace(scalars={}), LAYOUTS["cut together"](expected, world.rank, world.size)._replace(scalars={}))
    return str(info.call_args_list[0].args[0] % info.call_args_list[0].args[1:])
