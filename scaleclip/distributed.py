"""Ranks: who they are (torchrun, srun or a single process), their process group, and what all of them agree on."""

import contextlib
import datetime
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from scaleclip.errors import ConfigError, RunError

T = TypeVar("T")

# longer than an evaluation on rank 0, which the others wait for
_TIMEOUT = datetime.timedelta(minutes=30)
PATIENT = datetime.timedelta(days=30)
"""Where a rank may be done long before another."""
_RECORDED = 2000  # collectives
# ports below the usual ephemeral range, one for each of the last 10,000 jobs of a cluster
_FIRST_PORT, _NUM_PORTS = 20_000, 10_000


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    local_size: int = 1
    """Ranks that share this machine."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0


def init(records: Path | None = None, timeout: datetime.timedelta = _TIMEOUT) -> World:
    """Join the process group that the environment describes: srun's step, torchrun's variables, or this process alone.

    Args:
        records: folder where NCCL's flight recorder leaves each rank's last collectives when one of them times out.
        timeout: of collectives; of a rank that died the others learn at once.

    Raises:
        ConfigError: the environment is incomplete, or has more ranks a node than devices.
    """
    rank, size, local_rank = _ranks()
    cuda = torch.cuda.is_available()
    if cuda and "SLURM_STEP_ID" in os.environ and torch.cuda.device_count() == 1:
        # srun --gpus-per-task=1 shows each task its own GPU only
        local_rank = 0
    if cuda and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} are visible; start one rank a GPU at most"
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        if records is not None:
            _record_collectives(records)
    if not dist.is_initialized():
        # deepspeed reads these as well
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local_rank)}
        store = dist.HashStore() if size == 1 else None  # type: ignore[attr-defined]
        placed: dict[str, Any] = {"store": store, "rank": 0, "world_size": 1} if store else {"init_method": "env://"}
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout, **placed)
    host = socket.gethostname()
    return World(rank, size, local_rank, device, gather_objects(host).count(host))


def shutdown() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank; every rank must call. Runs on the CPU: the device is not synchronised."""
    value = torch.tensor([int(flag)])
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value.item())


def gather_objects(value: Any) -> list[Any]:
    """Every rank's picklable `value`, in rank order, on every rank; this process alone is a rank too."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def array_share(world: World) -> tuple[int, int]:
    """(number, count): this rank among those of all tasks of SLURM's job array, of which each is a job of its own.

    Outside of an array these are the rank and the number of ranks. Every task must have as many ranks.

    Raises:
        ConfigError: the array's numbers are no even range, so that this task's place among them is not known.
    """
    env = os.environ
    if "SLURM_ARRAY_TASK_ID" not in env:
        return world.rank, world.size
    task, first, last, count = (int(env[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "MAX", "COUNT"))
    step = (last - first) // (count - 1) if count > 1 else 1
    place, rest = divmod(task - first, step)
    if rest or first + (count - 1) * step != last:
        raise ConfigError(
            f"the job array has {count} tasks from {first} to {last}, not at even steps: give sbatch a range, such as "
            f"--array=0-7"
        )
    return place * world.size + world.rank, count * world.size


def barrier() -> None:
    """Wait for every rank, on the CPU."""
    any_rank(False)


def raise_together(error: Exception | None) -> None:
    """Raise on every rank when any has an error: its own where there is one, else the first rank's message.

    A rank that raises alone would leave the others waiting in their next collective until it times out.
    """
    messages = gather_objects(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise RunError(f"rank {rank} failed: {message}")


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """What every rank does inside succeeds on all or raises on all (see `raise_together`). No collectives inside."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_together(error)


def on_main(compute: Callable[[], T]) -> T:
    """Rank 0's `compute()` on every rank; what it raises is raised on all. No collectives inside."""
    value: T | None = None
    with all_or_none():
        if not dist.is_initialized() or dist.get_rank() == 0:
            value = compute()
    found: T = gather_objects(value)[0]
    return found


def _record_collectives(folder: Path) -> None:
    for name, value in (
        ("TORCH_FR_BUFFER_SIZE", str(_RECORDED)),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "1"),
        ("TORCH_FR_DUMP_TEMP_FILE", f"{folder}/nccl_rank_"),
    ):
        os.environ.setdefault(name, value)


def _ranks() -> tuple[int, int, int]:
    """(rank, world size, local rank)."""
    env = os.environ
    # The batch shell has SLURM_PROCID=0 and SLURM_NTASKS too; only a task that srun started has a step.
    if "SLURM_STEP_NUM_TASKS" in env and "RANK" not in env:
        rank, size, local_rank = (int(env[f"SLURM_{name}"]) for name in ("PROCID", "STEP_NUM_TASKS", "LOCALID"))
        if size > 1 and "MASTER_ADDR" not in env:
            env["MASTER_ADDR"] = _first_host(env["SLURM_STEP_NODELIST"])
        env.setdefault("MASTER_PORT", str(_FIRST_PORT + int(env["SLURM_JOB_ID"]) % _NUM_PORTS))
        return rank, size, local_rank
    if "RANK" not in env:
        return 0, 1, 0
    missing = [name for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing:
        raise ConfigError(
            f"RANK={env['RANK']} is set but {', '.join(missing)} is not: start ranks with torchrun or srun, or unset RANK"
        )
    return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"])


def _first_host(nodes: str) -> str:
    """First host of SLURM's compressed list, `node[03-07,11]`."""
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"the first host of {nodes} is unknown ({error}): set MASTER_ADDR to it") from None
    return listed.stdout.split()[0]
