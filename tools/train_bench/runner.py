"""Runs a job: a child process a rank, all of them to the end."""

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from train_bench.points import Answer, Job, MemoryJob, PeerJob

TOOLS = Path(__file__).parent.parent
# what is freed goes back to the system at once, so that the resident memory is what is held
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


class MeasurementFailed(Exception):
    """A measuring process ended without an answer; what it said last."""


def run_job(job: Job, timeout_s: float) -> list[Answer]:
    """Every rank's answer, in rank order.

    Raises:
        MeasurementFailed: a rank ended without an answer, or took too long.
    """
    with TemporaryDirectory(prefix="bench_train-") as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "job.pickle").write_bytes(pickle.dumps(job))
        ranks: list[subprocess.Popen[bytes]] = []
        stack.callback(_end, ranks)
        for rank in range(job.layout.world):
            log = stack.enter_context((folder / f"{rank}.log").open("wb"))
            command = [sys.executable, "-m", "train_bench.child", str(folder), str(rank), str(job.layout.world)]
            ranks.append(subprocess.Popen(command, env=_environment(job), stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        failed = _wait(job, ranks, timeout_s)
        if failed is not None:
            said = [line for line in (folder / f"{failed}.log").read_text(errors="replace").splitlines() if line.strip()]
            code = ranks[failed].returncode
            raise MeasurementFailed(f"{job.label()}, rank {failed}: {said[-1] if said and code > 0 else f'exit code {code}'}")
        return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(len(ranks))]


def _environment(job: Job) -> dict[str, str]:
    threads = str(job.layout.threads)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
    }
    if not (isinstance(job, PeerJob) and job.device == "cuda"):
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return environment | _GIVE_BACK if isinstance(job, MemoryJob) else environment


def _wait(job: Job, ranks: Sequence["subprocess.Popen[bytes]"], timeout_s: float) -> int | None:
    """None once all have ended well, else the first rank that did not."""
    deadline = time.monotonic() + timeout_s
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None or all(code == 0 for code in codes):
            return failed
        if time.monotonic() > deadline:
            raise MeasurementFailed(f"{job.label()} took more than {timeout_s:g} s (--timeout)")
        time.sleep(0.02)


def _end(ranks: Sequence["subprocess.Popen[bytes]"]) -> None:
    for rank in ranks:
        rank.kill()
        rank.wait()
