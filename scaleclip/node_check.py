"""What must hold on a node before a job trains there."""

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from scaleclip.config import CacheConfig, RunConfig, SourceConfig
from scaleclip.data.cache import ShardCache
from scaleclip.data.sample import SampleError
from scaleclip.data.source import Source
from scaleclip.data.text_pairs import open_text_pairs
from scaleclip.data.tokenizer import load_tokenizer
from scaleclip.errors import ConfigError
from scaleclip.planning.counting import count_memory
from scaleclip.run_folder import check_same_run
from scaleclip.stages import stages_of

_PROBE_BYTES = 64 * 2**20
_GIB = 2**30
# weights and AdamW's two moments, fp32
_BYTES_LEARNING, _BYTES_FROZEN = 12, 4
_ONES = 1024
_FREE_SHARE = 0.9
_RELEASE_S = 30.0


class Fault(NamedTuple):
    """A check that failed."""

    message: str
    of_node: bool
    """Whether the job may do better on another node."""


def check_node(config: RunConfig, ranks: int, local_ranks: int, grace_s: float) -> Iterator[Fault]:
    """Every check that fails on this node, in seconds; with remote shards also the time that one a source takes to come.

    Args:
        config: the run's, validated.
        ranks: of the whole job.
        local_ranks: of them on this node.
        grace_s: seconds that the run has to save when SLURM warns it.
    """
    try:
        check_same_run(config)
    except ConfigError as error:
        yield Fault("; ".join(line.strip() for line in str(error).splitlines()), of_node=False)
    yield from _check_devices(local_ranks)
    stages = [stage.config for stage in stages_of(config)]
    every = [count_memory(stage.model, stage.data, stage.train.precision) for stage in stages]
    checkpoint_bytes = max(_BYTES_LEARNING * sum(counts.learning) + _BYTES_FROZEN * sum(counts.frozen) for counts in every)
    yield from _check_folder(config, checkpoint_bytes, local_ranks / ranks, grace_s)
    seen: list[tuple[str, SourceConfig]] = []
    for stage in stages:
        new = [named for named in stage.data.sources.items() if named not in seen]
        yield from _check_data(new, config.data.cache)
        yield from _check_texts(stage)
        seen += new


def _check_devices(local_ranks: int) -> Iterator[Fault]:
    given = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen < min(given, local_ranks) or 0 < seen < local_ranks:
        yield Fault(f"{local_ranks} ranks and {given} GPUs of SLURM's, but torch sees {seen}", of_node=True)
    for number in range(min(seen, local_ranks)):
        try:
            free, whole = _free_memory(number)
            ones = torch.ones(_ONES, _ONES, device=f"cuda:{number}")
            wrong = int((ones @ ones != _ONES).sum())
        except RuntimeError as error:
            yield Fault(f"GPU {number}: {error}".splitlines()[0], of_node=True)
            continue
        if wrong:
            yield Fault(f"GPU {number}: {wrong} of {_ONES**2} sums of ones are wrong", of_node=True)
        if free < _FREE_SHARE * whole:
            yield Fault(f"GPU {number}: {(whole - free) / _GIB:.1f} GiB are in use by another process", of_node=True)


def _free_memory(number: int) -> tuple[int, int]:
    """Free and whole bytes of a GPU; a job that has just ended there has some seconds to give back its memory."""
    deadline = time.monotonic() + _RELEASE_S
    while True:
        free, whole = torch.cuda.mem_get_info(number)
        if free >= _FREE_SHARE * whole or time.monotonic() > deadline:
            return free, whole
        time.sleep(1.0)


def _check_folder(config: RunConfig, checkpoint_bytes: int, share: float, grace_s: float) -> Iterator[Fault]:
    folder = Path(config.run.folder)
    # a new run's folder is not made here: another node may be looking at the same time
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    probe = existing / f".probe-{socket.gethostname()}-{os.getpid()}"
    try:
        content = os.urandom(_PROBE_BYTES)
        begin_s = time.monotonic()
        with probe.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        probe_s = time.monotonic() - begin_s
        free_bytes = shutil.disk_usage(existing).free
    except OSError as error:
        yield Fault(f"run.folder={folder} cannot be written: {error.strerror}", of_node=False)
        return
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    # what is kept, and the one that is being written
    needed_bytes = (config.checkpoint.keep + 1) * checkpoint_bytes
    taken_bytes = sum(file.stat().st_size for file in (folder / "checkpoints").glob("step_*/*"))
    if free_bytes + taken_bytes < needed_bytes:
        yield Fault(
            f"run.folder={folder} has {free_bytes / _GIB:.1f} GiB free, and {config.checkpoint.keep} checkpoints of "
            f"{checkpoint_bytes / _GIB:.1f} GiB with one that is being written need {needed_bytes / _GIB:.1f}: free some, or "
            f"lower checkpoint.keep",
            of_node=False,
        )
    save_s = checkpoint_bytes * share * probe_s / _PROBE_BYTES
    if save_s > grace_s:
        yield Fault(
            f"saving takes this node an estimated {save_s:.0f} s ({checkpoint_bytes * share / _GIB:.1f} GiB at "
            f"{_PROBE_BYTES / probe_s / 2**20:.0f} MiB/s), and SLURM's warning comes {grace_s:.0f} s before the end: give "
            f"sbatch --signal=USR2@{2 * save_s:.0f} and SCALECLIP_GRACE_S={2 * save_s:.0f}, or a faster disk",
            of_node=False,
        )


def _check_data(sources: Iterable[tuple[str, SourceConfig]], cache_config: CacheConfig) -> Iterator[Fault]:
    cache = ShardCache(cache_config)
    for name, section in sources:
        try:
            Source(name, section, cache).reader(0, 0)
        except (ConfigError, SampleError) as error:
            yield Fault(f"data.sources.{name}: {error}".replace(f"data.sources.{name}: data", "data"), of_node=False)


def _check_texts(config: RunConfig) -> Iterator[Fault]:
    try:
        tokenizer = load_tokenizer(config.model.text.tokenizer, config.model.text.context_length)
        pairs = open_text_pairs(config, ShardCache(config.data.cache), tokenizer)
        if pairs:
            pairs.read(0, 0, 1)
    except ConfigError as error:
        yield Fault(str(error), of_node=False)
