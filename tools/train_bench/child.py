"""One measurement in a process of its own (one a rank): python -m train_bench.child FOLDER RANK WORLD, started by `runner`.

FOLDER holds job.pickle, and gets RANK.pickle (an Answer) and the ranks' store.
"""

import os
import pickle
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from train_bench.points import OURS, Answer, Job, LearnJob, MemoryJob, PeerJob


def measure(job: Job) -> Answer:
    """This rank's part of the job, with what it needs imported and no more."""
    if isinstance(job, PeerJob):
        torch.set_num_threads(job.layout.threads)
        torch.set_float32_matmul_precision("medium" if job.setting == "medium" else "highest")
        if job.trainer == OURS:
            from train_bench import scaleclip_run

            return scaleclip_run.measure(job)
        from train_bench import open_clip_run

        return open_clip_run.measure(job)
    from train_bench import engine_run

    torch.set_num_threads(job.layout.threads)
    if isinstance(job, MemoryJob):
        return engine_run.measure_memory(job)
    return engine_run.learn(job) if isinstance(job, LearnJob) else engine_run.measure_steps(job)


def main() -> None:
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    job: Job = pickle.loads((folder / "job.pickle").read_bytes())
    if world > 1:
        # scaleclip.distributed asks for them; the file store takes the place of the last two
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "unused", "MASTER_PORT": "0"}
        store = dist.FileStore(str(folder / "store"), world)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    answer = measure(job)
    partial = folder / f"{rank}.partial"
    partial.write_bytes(pickle.dumps(answer))
    partial.rename(folder / f"{rank}.pickle")


if __name__ == "__main__":
    main()
