"""How many pairs a rank encodes at once, and what to change when memory is full."""

import contextlib
import itertools
import logging
from collections.abc import Iterator

import psutil
import torch

from scaleclip import distributed
from scaleclip.config import RunConfig
from scaleclip.config_rules import validate
from scaleclip.distributed import World
from scaleclip.errors import ConfigError, RunError
from scaleclip.planning.memory import DeviceType, largest_micro_batch, step_memory

# what the allocator loses between its blocks, and what else lives on the device; on the host, loaders and the system live too
_USABLE = {"cuda": 0.92, "cpu": 0.7}
# than what did not fit, since an estimate is off by some percent
_CLEARLY_LESS = 0.8
log = logging.getLogger("scaleclip")


def choose_micro_batch(config: RunConfig, world: World) -> int:
    """`train.micro_batch`, or for `auto` the largest one that fits the memory of every rank. All ranks call, before the model
    is made.

    Raises:
        ConfigError: not even one pair fits.
    """
    share = config.train.share(world.size)
    if config.train.micro_batch != "auto":
        return min(config.train.micro_batch, share)
    device = _kind(world)
    budget_bytes = min(distributed.gather_objects(int(_free_bytes(world) * _USABLE[device])))
    with distributed.all_or_none():
        most = largest_micro_batch(config, world.size, budget_bytes, device)
    if most == 0:
        raise ConfigError(
            f"train.micro_batch=auto: not even one pair at once fits {_gib(budget_bytes)} a rank; "
            f"{_advice(config, world, budget_bytes)}"
        )
    num_chunks = -(-share // most)
    micro_batch = -(-share // num_chunks)
    needed = step_memory(config, world.size, micro_batch, device).total
    log.info(
        f"train.micro_batch=auto is {micro_batch:,}: a share of {share:,} in {num_chunks} chunk(s), which takes an estimated "
        f"{_gib(needed)} of {_gib(budget_bytes)}"
    )
    return micro_batch


@contextlib.contextmanager
def explain_full_memory(config: RunConfig, world: World, micro_batch: int) -> Iterator[None]:
    """Around what may need more memory than there is.

    Raises:
        RunError: it did; the message says which settings would fit.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # errors that quote another rank's are of other types
        on_the_host = type(error) is RuntimeError and "can't allocate memory" in str(error)
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not on_the_host:
            raise
        needed = step_memory(config, world.size, micro_batch, _kind(world)).total
        raise RunError(
            f"out of memory on rank {world.rank} ({world.device}, {_gib(_all_bytes(world))}) with {micro_batch:,} pairs at "
            f"once, which take an estimated {_gib(needed)}; {_advice(config, world, int(_CLEARLY_LESS * needed))}"
        ) from error


def _advice(config: RunConfig, world: World, most_bytes: int) -> str:
    """Settings that would fit a rank's part of its device and take at most `most_bytes`, best first."""
    device = _kind(world)
    budget_bytes = int(_all_bytes(world) * _USABLE[device] / (1 if device == "cuda" else world.local_size))
    budget_bytes = min(budget_bytes, most_bytes)
    ways = []
    for stage, checkpointing in itertools.product(dict.fromkeys((config.train.zero_stage, 2, 3)), (False, True)):
        if stage < config.train.zero_stage or checkpointing < config.model.activation_checkpointing:
            continue
        train = config.train.model_copy(update={"zero_stage": stage})
        model = config.model.model_copy(update={"activation_checkpointing": checkpointing})
        changed = config.model_copy(update={"train": train, "model": model})
        try:
            validate(changed, world.size)
            most = largest_micro_batch(changed, world.size, budget_bytes, device)
        except ConfigError:  # a tower that cannot recompute, a stage that does not go with another setting
            continue
        if most:
            keys = [f"train.micro_batch={most}"]
            keys += [f"train.zero_stage={stage}"] if stage != config.train.zero_stage else []
            keys += (
                ["model.activation_checkpointing=true"] if checkpointing and not config.model.activation_checkpointing else []
            )
            ways.append(" ".join(keys))
    if not ways:
        return "nothing that this knows of would fit: use more devices, or a smaller model"
    return f"by estimate these fit: {'; '.join(ways)}"


def _kind(world: World) -> DeviceType:
    return "cuda" if world.device.type == "cuda" else "cpu"


def _free_bytes(world: World) -> int:
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info(world.device)[0]
    return int(psutil.virtual_memory().available / world.local_size)


def _all_bytes(world: World) -> int:
    return torch.cuda.mem_get_info(world.device)[1] if world.device.type == "cuda" else int(psutil.virtual_memory().total)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
