"""What tests run on ranks of their own (tests/ranks.py). DeepSpeed bears one engine a process."""

import itertools
import math
import resource
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch.utils._python_dispatch import TorchDispatchMode

from scaleclip import distributed
from scaleclip.config_io import load_config
from scaleclip.engine import build_engine, clip_gradients
from scaleclip.losses.objective import contrastive
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.optim import set_learning_rate
from scaleclip.train import train
from scaleclip_kernels import panels


def train_run(config_path: str, overrides: list[str]) -> str:
    return str(train(load_config(config_path, overrides)))


def train_on_a_full_disk(config_path: str, overrides: list[str], full_rank: int) -> str:
    """The error of a run in which one rank's files may not grow beyond 300 kB."""
    world = distributed.init()
    if world.rank == full_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
    try:
        return str(train(load_config(config_path, overrides)))
    except Exception as caught:
        return f"{type(caught).__name__}: {caught}"


def train_with_a_failing_loss(config_path: str, overrides: list[str], bad_rank: int) -> str:
    """The error of a run in which one rank's third forward pass of the loss fails."""
    world = distributed.init()
    if world.rank == bad_rank:
        calls, fold = itertools.count(), panels.fold_softmax

        def fail_at_step_three(*args: Any) -> None:
            if next(calls) >= 2 * world.size:
                raise MemoryError("no room for this block")
            fold(*args)

        panels.fold_softmax = fail_at_step_three
    try:
        return str(train(load_config(config_path, overrides)))
    except Exception as caught:
        return f"{type(caught).__name__}: {caught}"


def make_batch(config: Any, step: int) -> tuple[torch.Tensor, ...]:
    """A global batch of noise: pixels, tokens, ids, valid, seeds."""
    random = torch.Generator().manual_seed(step)
    size, length = config.train.global_batch, config.model.text.context_length
    pixels = torch.randint(0, 256, (size, 3, config.model.image.size, config.model.image.size), generator=random)
    tokens = torch.randint(1, 4000, (size, length), generator=random)
    tokens[:, length // 2 :] = config.model.text.config["eos_token_id"]
    seeds = torch.arange(size)
    return pixels.to(torch.uint8), tokens, torch.arange(size), torch.ones(size, dtype=torch.bool), seeds


def run_steps(config_path: str, overrides: list[str], num_steps: int, lr: float) -> dict[str, Any]:
    """Optimizer steps on noise under ZeRO; what a test wants to know of them."""
    config = load_config(config_path, overrides)
    world = distributed.init()
    torch.manual_seed(0)
    model = DualEncoder(config.model)
    engine = build_engine(config, model, world)
    share = config.train.global_batch // world.size
    losses, norms, scales, masters = [], [], [], []
    for step in range(num_steps):
        mine = [part[world.rank * share : (world.rank + 1) * share] for part in make_batch(config, step)]
        pixels, tokens, ids, valid, seeds = mine
        set_learning_rate(engine.optimizer, lr)
        features = engine(pixels, (tokens,), seeds)
        loss = contrastive(features, ids, valid, config.loss)
        engine.backward(loss)
        norms.append(clip_gradients(engine, config.optim).item())
        engine.step()
        losses.append(loss.item())
        scales.append(model.logit_scale.item())
        master = safe_get_full_fp32_param(model.logit_scale) if config.train.zero_stage else model.logit_scale
        masters.append(master.item())
    return {
        "losses": losses,
        "norms": norms,
        "log_scales": scales,
        "master_log_scales": masters,
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
    }


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


def count_host_reads(config_path: str, overrides: list[str]) -> dict[str, int]:
    """Host reads in three steps after the first."""
    panels.without_idle_mask = lambda side: side  # a look at the mask that only the CPU takes: this CPU stands for a GPU
    config = load_config(config_path, overrides)
    world = distributed.init()
    model = DualEncoder(config.model)
    engine = build_engine(config, model, world)
    share = config.train.global_batch // world.size
    reads = HostReads()
    for step in range(4):
        pixels, tokens, ids, valid, seeds = (part[:share] for part in make_batch(config, step))
        set_learning_rate(engine.optimizer, 1e-3)
        with reads:
            features = engine(pixels, (tokens,), seeds)
            loss = contrastive(features, ids, valid, config.loss)
            engine.backward(loss)
            clip_gradients(engine, config.optim)
            engine.step()
        if step == 0:
            reads.seen.clear()
    return dict(reads.seen)


def compare_bf16(config_path: str) -> dict[str, Any]:
    """One step's gradients in fp32, under autocast and under DeepSpeed's bf16 mode, and how each sees a logit scale of 98.5."""
    import deepspeed

    config = load_config(config_path, ["train.precision=fp32", "train.zero_stage=0"])
    distributed.init()
    pixels, tokens, ids, valid, seeds = make_batch(config, 0)

    def build() -> DualEncoder:
        torch.manual_seed(0)
        model = DualEncoder(config.model)
        torch.nn.init.constant_(model.logit_scale, math.log(98.5))
        return model

    def gradients(model: DualEncoder, autocast: bool) -> tuple[dict[str, torch.Tensor], float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            features = model(pixels, (tokens,), seeds)
        contrastive(features, ids, valid, config.loss).backward()
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
