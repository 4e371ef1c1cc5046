"""Ranks of this machine's CPU for a function: each a fresh process, since DeepSpeed bears one engine a process.

The processes are forked from a server that has loaded torch and DeepSpeed and done nothing else, so that a rank starts in
milliseconds instead of seconds.
"""

import functools
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, TypeVar

from scaleclip.errors import ConfigError, RunError

T = TypeVar("T")

# the last one is what DeepSpeed 0.19 imports when ZeRO starts, and torch's compiler with it
PRELOADED = ["scaleclip.step", "deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.muon.muon_optimizer"]
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip
_POLL_S = 0.02


def run_ranks(job: Callable[..., T], world_size: int, *args: Any, timeout_s: float = 600, grace_s: float = 0.5) -> list[T]:
    """Each rank's `job(*args)`, in rank order, with one thread a rank and a gloo process group.

    Args:
        job: a module's function; arguments and result can be pickled.
        world_size: ranks.
        args: the job's.
        timeout_s: seconds that all may take.
        grace_s: seconds that the others have to end once one has failed.

    Raises:
        ConfigError: the one that a rank raised.
        RunError: a rank failed in another way, which its traceback on stderr says, or they took more than `timeout_s`.
    """
    _start_server()
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [context.Process(target=_rank_main, args=(job, rank, world_size, folder, args)) for rank in range(world_size)]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout_s
        try:
            while any(process.is_alive() for process in ranks) and not any(process.exitcode for process in ranks):
                if time.monotonic() > deadline:
                    raise RunError(f"{job.__name__} on {world_size} ranks took more than {timeout_s} s")
                time.sleep(_POLL_S)
            deadline = time.monotonic() + grace_s
            for process in ranks:
                process.join(max(0, deadline - time.monotonic()))
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return _results(job, [folder / f"{rank}.pickle" for rank in range(world_size)])


def _results(job: Callable[..., T], files: list[Path]) -> list[T]:
    found = {rank: pickle.loads(file.read_bytes()) for rank, file in enumerate(files) if file.exists()}
    for result in found.values():
        if isinstance(result, ConfigError):
            raise result
    if len(found) < len(files):
        failed = sorted(set(range(len(files))) - found.keys())
        raise RunError(f"{job.__name__} failed on ranks {failed} of {len(files)}: see the traceback above")
    return list(found.values())


@functools.cache
def _start_server() -> None:
    before = dict(os.environ)
    # the server would look for modules where a new interpreter does, not where this one was told to
    os.environ.update(_ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)})
    try:
        multiprocessing.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _rank_main(job: Callable[..., Any], rank: int, world_size: int, folder: Path, args: tuple[Any, ...]) -> None:
    # scaleclip.distributed asks for all of them; the file store takes the place of the address
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "unused", "MASTER_PORT": "0"}
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world_size)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    exit_code = 0
    try:
        result = job(*args)
    except ConfigError as error:
        result, exit_code = error, 2
    partial = folder / f"{rank}.partial"
    partial.write_bytes(pickle.dumps(result))
    partial.rename(folder / f"{rank}.pickle")
    sys.exit(exit_code)
