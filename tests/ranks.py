"""Run a function on several gloo ranks, each a fresh process (DeepSpeed bears one engine a process)."""

import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_ranks(job: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 240) -> list[Any]:
    """Each rank's `job(*args)`, in rank order; `job` lies in tests/rank_jobs.py. Raises if a rank fails."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            context.Process(target=_rank_main, args=(job, rank, world_size, folder, args), daemon=False)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout_s
        try:
            while any(process.is_alive() for process in ranks):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{job.__name__} on {world_size} ranks took more than {timeout_s} s")
                if any(process.exitcode for process in ranks):
                    break
                time.sleep(0.05)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        failed = [rank for rank in range(world_size) if not (folder / f"{rank}.pickle").exists()]
        if failed:
            raise RuntimeError(f"{job.__name__} failed on ranks {failed} of {world_size}: see the captured output")
        return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(world_size)]


def _rank_main(job: Callable[..., Any], rank: int, world_size: int, folder: Path, args: tuple[Any, ...]) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RANK": str(rank), "WORLD_SIZE": str(world_size)}
    # scaleclip.distributed asks for them; the file store below takes their place
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "unused", "MASTER_PORT": "0"}
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), world_size), rank=rank, world_size=world_size)
    result = job(*args)
    partial = folder / f"{rank}.partial"
    partial.write_bytes(pickle.dumps(result))
    partial.rename(folder / f"{rank}.pickle")
