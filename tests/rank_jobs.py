"""What tests run on ranks of their own (scaleclip.local_ranks). DeepSpeed bears one engine a process."""

import itertools
import math
import os
import resource
import signal
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from scaleclip import distributed, fit
from scaleclip.config import RunConfig
from scaleclip.config_io import load_config
from scaleclip.data.loader import Batch
from scaleclip.engine import Engine, deepspeed
from scaleclip.equivalence.batches import global_batch, share_chunks
from scaleclip.errors import Stopped
from scaleclip.fit import choose_micro_batch
from scaleclip.guard import BadSteps
from scaleclip.losses.objective import contrastive
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.models.towers import Encoded
from scaleclip.planning.memory import step_memory
from scaleclip.runtime import give_back_memory
from scaleclip.step import TrainStep
from scaleclip.train import train
from scaleclip_kernels import panels


def train_run(config_path: str, overrides: list[str]) -> str:
    return str(train(load_config(config_path, overrides)))


def train_and_stop(config_path: str, overrides: list[str], last_step: int) -> str:
    """A run that is asked to stop in step `last_step`."""
    _in_step(last_step, lambda: os.kill(os.getpid(), signal.SIGUSR2))
    return _error_of(config_path, overrides)


def train_with_bad_steps(config_path: str, overrides: list[str], bad: list[int]) -> str:
    """The error of a run in whose forward passes `bad`, counted from 1, a number of the last rank's image tower is none."""
    world = distributed.init()
    forward, calls = Engine.__call__, itertools.count(1)

    def spoil(engine: Engine, pixels: torch.Tensor, *args: Any) -> Any:
        features = forward(engine, pixels, *args)
        if next(calls) in bad and world.rank == world.size - 1:
            features = features._replace(image_BE=features.image_BE * torch.nan)
        return features

    Engine.__call__ = spoil
    return _error_of(config_path, overrides)


def train_with_a_hang(config_path: str, overrides: list[str], bad_rank: int) -> str:
    """A run in which a rank never ends its fifth step."""

    def hang_at_step_five() -> None:
        time.sleep(600)

    if distributed.init().rank == bad_rank:
        _in_step(5, hang_at_step_five)
    return _error_of(config_path, overrides)


def train_in_little_memory(config_path: str, overrides: list[str]) -> str:
    """The error of a run that may take 1 GiB of addresses beyond what is taken before it."""
    distributed.init()
    taken = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**30, resource.RLIM_INFINITY))
    return _error_of(config_path, overrides)


def train_in_the_memory_of(config_path: str, overrides: list[str], pairs: int) -> str:
    """A run whose last rank has room for so many pairs at once, the others for all."""
    world, config = distributed.init(), load_config(config_path, overrides)
    if world.rank == world.size - 1:
        needed_bytes = step_memory(config, world.size, pairs, "cpu").total
        fit._free_bytes = lambda _: needed_bytes / fit._USABLE["cpu"] + 1
    return str(train(config))


def _in_step(number: int, act: Callable[[], None]) -> None:
    """Have TrainStep `act` before its call `number`, counted from 1."""
    take_step, calls = TrainStep.__call__, itertools.count(1)

    def watched(*args: Any) -> Any:
        if next(calls) == number:
            act()
        return take_step(*args)

    TrainStep.__call__ = watched


def _error_of(config_path: str, overrides: list[str]) -> str:
    try:
        return str(train(load_config(config_path, overrides)))
    except (Exception, Stopped) as caught:
        return f"{type(caught).__name__}: {caught}"


def train_on_a_full_disk(config_path: str, overrides: list[str], full_rank: int) -> str:
    """The error of a run in which one rank's files may not grow beyond 300 kB."""
    world = distributed.init()
    if world.rank == full_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
    return _error_of(config_path, overrides)


def train_with_a_failing_loss(config_path: str, overrides: list[str], bad_rank: int) -> str:
    """The error of a run in which one rank's third forward pass of the loss fails."""
    world = distributed.init()
    if world.rank == bad_rank:
        calls, fold = itertools.count(), panels.fold_softmax

        def fail_at_step_three(*args: Any) -> None:
            if next(calls) >= 2 * world.size:
                raise ArithmeticError("this block does not add up")
            fold(*args)

        panels.fold_softmax = fail_at_step_three
    return _error_of(config_path, overrides)


def make_chunks(config: RunConfig, step: int, rank: int, world_size: int, micro_batch: int) -> Iterator[Batch]:
    """A rank's share of a global batch of noise, in chunks; slots past the batch's end are invalid."""
    random = torch.Generator().manual_seed(step)
    num_pairs, length, size = config.train.global_batch, config.model.text.context_length, config.model.image.size
    pixels = torch.randint(0, 256, (num_pairs, 3, size, size), generator=random).to(torch.uint8)
    tokens = torch.randint(1, 4000, (num_pairs, length), generator=random)
    tokens[:, length // 2 :] = config.model.text.config["eos_token_id"]
    share = -(-num_pairs // world_size)
    for first in range(rank * share, (rank + 1) * share, micro_batch):
        slots = torch.arange(first, min(first + micro_batch, (rank + 1) * share))
        valid, pairs = slots < num_pairs, slots.clamp(max=num_pairs - 1)
        keys = tuple(f"step{step}pair{pair}" for pair in pairs.tolist())
        yield Batch(pixels[pairs], (tokens[pairs],), pairs, valid, pairs, keys, (), {}, {}, {}, 0.0)


def run_steps(config_path: str, overrides: list[str], num_steps: int, lr: float, bad_step: int | None = None) -> dict[str, Any]:
    """Optimizer steps on noise under ZeRO, and what a test wants to know of them. In step `bad_step` a number of the last
    rank's image tower is none."""
    config = load_config(config_path, overrides)
    world = distributed.init()

    def spoil(module: torch.nn.Module, args: Any, encoded: Encoded) -> Encoded:
        return encoded._replace(pooled_BD=encoded.pooled_BD * torch.nan) if world.rank == world.size - 1 else encoded

    engine = Engine(config, world)
    micro_batch = choose_micro_batch(config, world)
    take_step = TrainStep(engine, config, world, micro_batch)
    found: dict[str, Any] = {name: [] for name in ("losses", "norms", "log_scales", "bad", "loss_scales", "steps_of_adam")}
    for step in range(num_steps):
        spoiled = engine.model.image.register_forward_hook(spoil) if step == bad_step else None
        result = take_step(make_chunks(config, step, world.rank, world.size, micro_batch), step, lr)
        if spoiled:
            spoiled.remove()
        found["losses"].append(result.loss.item())
        found["norms"].append(result.grad_norm.item())
        found["bad"].append(result.bad.item())
        found["loss_scales"].append(engine.loss_scale.item())
        found["steps_of_adam"].append(engine.shard().scalars["adam_step"].item())
        found["log_scales"].append(engine.parameters()["logit_scale"].item())
    masters = {f.name: f.tensors["weight"].clone() for f in engine.shard().fragments}
    return found | {"parameters": engine.parameters(), "master_log_scale": masters.get("logit_scale")}


def run_steps_of_each(config_path: str, cases: list[list[str]], *args: Any) -> list[dict[str, Any]]:
    """`run_steps` with each list of overrides, one engine after another: starting a process takes longer."""
    return [run_steps(config_path, overrides, *args) for overrides in cases]


def first_parameters_of_each(config_path: str, cases: list[list[str]]) -> list[dict[str, torch.Tensor]]:
    """The parameters that an engine starts with, for each list of overrides."""
    world = distributed.init()
    return [Engine(load_config(config_path, overrides), world).parameters() for overrides in cases]


def what_outlives_engines(config_path: str, cases: list[list[str]]) -> list[list[str]]:
    """What of each engine, with a step taken, is still there once it is closed and forgotten."""
    world = distributed.init()
    found = []
    for overrides in cases:
        config = load_config(config_path, overrides)
        micro_batch = choose_micro_batch(config, world)
        engine = Engine(config, world)
        take_step = TrainStep(engine, config, world, micro_batch)
        take_step(make_chunks(config, 0, world.rank, world.size, micro_batch), 0, 1e-3)
        held = {"engine": engine, "model": engine.model, "deepspeed": engine._ds, "adamw": engine._adamw}
        held |= {f"master {number}": master for number, master in enumerate(engine._masters() if engine._zero else [])}
        references = {name: weakref.ref(each) for name, each in held.items()}
        engine.close()
        del engine, take_step, held
        give_back_memory(world.device)
        found.append([name for name, reference in references.items() if reference() is not None])
    return found


class HostReads(TorchDispatchMode):
    """Counts the operations that would make the host wait for a device."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "nonzero", "item", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in self.NAMES:
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


def count_host_reads(config_path: str, cases: list[list[str]]) -> list[dict[str, int]]:
    """Host reads in three steps after the first three (stage 3 learns the order of modules), for each list of overrides."""
    # what reads from tensors that are the host's on a GPU too: this CPU stands for a GPU
    panels.without_idle_mask = lambda side: side
    deepspeed.runtime.zero.stage3.is_invalid_grad_norm = lambda norm: False
    reads = HostReads()
    accelerator = deepspeed.accelerator.get_accelerator()
    accelerator.synchronize = lambda device_index=None: reads.seen.update(["synchronize"])
    world = distributed.init()
    counts = []
    for overrides in cases:
        config = load_config(config_path, overrides)
        # stage 3 has streams that a CPU has not
        accelerator.resolves_data_dependency = lambda stage=config.train.zero_stage: stage == 3
        micro_batch = choose_micro_batch(config, world)
        engine = Engine(config, world)
        take_step, bad_steps = TrainStep(engine, config, world, micro_batch), BadSteps(5)
        for step in range(6):
            batch = global_batch(config, engine.model, step)
            chunks = iter(share_chunks(batch, world.rank, world.size, micro_batch))
            with reads:
                result = take_step(chunks, step, 1e-3)
                bad_steps.note(step, result.bad, ())
            if step == 2:
                reads.seen.clear()
        counts.append(dict(reads.seen))
    return counts


def compare_bf16(config_path: str) -> dict[str, Any]:
    """One step's gradients in fp32, under autocast and under DeepSpeed's bf16 mode, and how each sees a logit scale of 98.5."""
    config = load_config(config_path, ["train.precision=fp32", "train.zero_stage=0"])
    distributed.init()
    [chunk] = make_chunks(config, 0, 0, 1, config.train.global_batch)
    pixels, [tokens], ids, valid = chunk[:4]

    def build() -> DualEncoder:
        torch.manual_seed(0)
        model = DualEncoder(config.model)
        torch.nn.init.constant_(model.logit_scale, math.log(98.5))
        return model

    def gradients(model: DualEncoder, autocast: bool) -> tuple[dict[str, torch.Tensor], float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            features = model(pixels, (tokens,))
        contrastive(features, ids, valid, config.loss, None).backward()
        return {name: p.grad.float() for name, p in model.named_parameters()}, features.logit_scale.item()

    truth, _ = gradients(build(), autocast=False)
    autocast, autocast_scale = gradients(build(), autocast=True)
    engine, *_ = deepspeed.initialize(
        model=build(),
        optimizer=None,
        config={
            "train_micro_batch_size_per_gpu": len(pixels),
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        },
        dist_init_required=False,
    )
    bf16, bf16_scale = gradients(engine.module, autocast=False)

    def error(found: dict[str, torch.Tensor]) -> float:
        difference = sum((found[name] - truth[name]).square().sum() for name in truth)
        return float((difference / sum(value.square().sum() for value in truth.values())).sqrt())

    return {
        "autocast_error": error(autocast),
        "bf16_error": error(bf16),
        "autocast_scale": autocast_scale,
        "bf16_scale": bf16_scale,
    }


def agree(rank_with_error: int | None) -> str:
    """What distributed.raise_together does on this rank."""
    world = distributed.init()
    error = ValueError("broken here") if world.rank == rank_with_error else None
    try:
        distributed.raise_together(error)
    except Exception as caught:
        return f"{type(caught).__name__}: {caught}"
    return f"{distributed.any_rank(world.rank == 1)} {distributed.gather_objects(world.rank)} {dist.get_world_size()}"
