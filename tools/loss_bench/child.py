"""One measurement, in a process of its own (one a rank): python -m loss_bench.child FOLDER RANK, started by `runner`.

FOLDER holds job.pickle, and gets RANK.pickle (a RankResult) and the ranks' store.
"""

import contextlib
import ctypes
import os
import pickle
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from loss_bench import correctness, formulas, implementations, traffic
from loss_bench.implementations import CannotRun, Implementation, Setup
from loss_bench.memory import added_bytes
from loss_bench.points import GEMM, GEMM_FLOP, Comparison, Errors, Job, RankResult, Sample
from scaleclip_kernels import RankError
from scaleclip_kernels.distributed import MAX_RING_RANKS
from scaleclip_kernels.gemm import cpu_library, fp32_products

if TYPE_CHECKING:
    from loss_bench.implementations import Loss


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    _die_with_parent()
    job: Job = pickle.loads((folder / "job.pickle").read_bytes())
    try:
        with _ranks(folder, rank, job.point.comparison):
            result = measure(job, rank)
    except Exception as error:
        _answer(folder, rank, RankResult("died", " ".join(f"{type(error).__name__}: {error}".split())))
        raise
    _answer(folder, rank, result)


def _answer(folder: Path, rank: int, result: RankResult) -> None:
    partial = folder / f"{rank}.partial"
    partial.write_bytes(pickle.dumps(result))
    partial.rename(folder / f"{rank}.pickle")


def measure(job: Job, rank: int) -> RankResult:
    """This rank's part of the job."""
    point, comparison = job.point, job.point.comparison
    if comparison.device == "cuda" and torch.cuda.device_count() < comparison.world:
        return RankResult("cannot run", f"--device cuda needs {comparison.world} GPU, here are {torch.cuda.device_count()}")
    device = torch.device("cuda", rank) if comparison.device == "cuda" else torch.device("cpu")
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    torch.set_num_threads(comparison.threads)
    torch.set_float32_matmul_precision(point.precision)
    if point.impl == GEMM:
        return _measure_gemm(job, device, device_name)

    implementation = implementations.find(point.impl)
    setup = Setup(comparison, point.variant, rank)
    try:
        loss = implementation.build(setup)
        found, plain = _check(point.impl, implementation, setup, loss, device)
    except (CannotRun, ValueError) as error:  # a ValueError is the loss's own no to these arguments
        return RankResult("cannot run", str(error), device_name)
    except RankError as error:  # the same no, heard from another rank; one that failed otherwise ends with a traceback
        return RankResult("cannot run", str(error).rpartition("ValueError: ")[2], device_name)
    faults = correctness.faults(found, plain, comparison.dtype)
    if faults:
        return RankResult("wrong", "; ".join(faults), device_name, found, plain)

    note = implementations.remark(point.impl, setup)
    inputs = correctness.make_inputs(comparison, implementation.kind, comparison.pairs_per_rank, seed=1 + rank, device=device)
    iteration = _Iteration(loss, inputs, comparison)
    _barrier(comparison)
    added = added_bytes(iteration.run, device)
    if job.task == "profile":
        iteration.trace(job.trace if rank == 0 else None)
    samples = [iteration.timed() for _ in range(job.repeats)] if job.task == "time" else []
    sent = formula = None
    if comparison.world > 1:
        with traffic.CountSent(comparison.world, rank) as counter:
            iteration.run()
        sent = counter.sent_bytes
        formula = _formula(implementation, setup) if implementation.is_ours else None
    loss_value = float(iteration.value)
    return RankResult("ok", note, device_name, found, plain, loss_value, added, sent, formula, samples)


def _check(
    name: str, implementation: Implementation, setup: Setup, loss: "Loss", device: torch.device
) -> tuple[Errors, Errors]:
    """Errors of the loss, assembled over ranks, and of plain torch; the same on all ranks, so that they agree on going on."""
    comparison, kind = setup.comparison, implementation.kind
    num_pairs = correctness.check_size(comparison)
    batch = correctness.make_inputs(comparison, kind, num_pairs, seed=0, device=device)
    part = num_pairs // comparison.world
    mine = correctness.run_step(loss, correctness.take(batch, slice(setup.rank * part, (setup.rank + 1) * part)))
    steps = [mine]
    if comparison.world > 1:
        steps = [mine] * comparison.world
        dist.all_gather_object(steps, mine)
    factor = implementations.feature_gradient_factor(name, setup)
    truth = correctness.truth_of(kind, batch)
    plain = correctness.run_step(correctness.plain_torch(kind, comparison), correctness.take(batch))
    return correctness.errors(correctness.over_ranks(steps, factor), truth), correctness.errors(plain, truth)


class _Iteration:
    """One step on fixed inputs."""

    def __init__(self, loss: "Loss", inputs: correctness.Inputs, comparison: Comparison) -> None:
        self._loss, self._inputs, self._comparison = loss, inputs, comparison
        self.value = torch.tensor(float("nan"))

    def run(self) -> None:
        """As it is timed, untimed."""
        self.timed()

    def timed(self) -> Sample:
        for leaf in self._inputs:
            if leaf is not None:
                leaf.grad = None
        _barrier(self._comparison)
        clock = _Clock(self._comparison.device)
        if self._comparison.mode == "forward":
            with torch.no_grad():
                value = self._loss(*self._inputs)
            clock.mark()
        else:
            value = self._loss(*self._inputs)
            clock.mark()
            value.backward()  # type: ignore[no-untyped-call]
        clock.mark()
        self.value = value.detach()
        return clock.sample()

    def trace(self, path: Path | None) -> None:
        """A step under torch's profiler, written for chrome://tracing or Perfetto; only taken part in where path is None."""
        if path is None:
            self.run()
            return
        with torch.profiler.profile(profile_memory=True, record_shapes=True) as profiler:
            self.run()
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))


class _Clock:
    """Wall time at marks, the device's own on a GPU, and the processor time of all threads."""

    def __init__(self, device: str) -> None:
        self._is_cuda = device == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._seconds: list[float] = []
        if self._is_cuda:
            torch.cuda.synchronize()
        self._cpu_s = time.process_time()
        self.mark()

    def mark(self) -> None:
        if self._is_cuda:
            self._events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            self._events[-1].record()
        else:
            self._seconds.append(time.perf_counter())

    def sample(self) -> Sample:
        if self._is_cuda:
            torch.cuda.synchronize()
            self._seconds = [self._events[0].elapsed_time(event) / 1e3 for event in self._events]
        start, middle, end = self._seconds
        return Sample(middle - start, end - middle, end - start, time.process_time() - self._cpu_s)


def _measure_gemm(job: Job, device: torch.device, device_name: str) -> RankResult:
    """Plain matrix products by the library and of the shape that the variant names: all ranks at once, as in a step."""
    comparison = job.point.comparison
    library, shape = job.point.variant.split()
    rows, columns, inner = map(int, shape.split("x"))
    if device.type == "cpu" and library != cpu_library(inner):
        return RankResult("cannot run", f"fp32 products through {library} are not fp32 on this processor")
    dtype = torch.float32 if device.type == "cpu" else correctness.DTYPES[comparison.dtype]
    random = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, inner, generator=random, device=device).to(dtype) for size in (rows, columns))
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    flop = 2.0 * rows * columns * inner
    # long enough to be timed well, yet no longer than the step that it is compared with
    count = max(1, int(min(GEMM_FLOP, 8.0 * comparison.batch**2 * comparison.dim) / flop))
    samples = []
    with fp32_products(device, inner):
        for _ in range(1 + job.repeats):
            _barrier(comparison)
            clock = _Clock(comparison.device)
            for _ in range(count):
                torch.mm(left, right.T, out=out)
            clock.mark()
            clock.mark()
            samples.append(clock.sample())
    return RankResult("ok", f"{count} in a row" if count > 1 else "", device_name, samples=samples[1:], flop=flop * count)


def _formula(implementation: Implementation, setup: Setup) -> float:
    comparison, schedule = setup.comparison, setup.variant
    if schedule == "auto":
        schedule = "ring" if comparison.world <= MAX_RING_RANKS else "gather"
    element = correctness.DTYPES[comparison.dtype].itemsize
    columns, dim = comparison.pairs_per_rank, comparison.dim
    return formulas.sent_bytes(implementation.kind, schedule, comparison.world, columns, dim, element, comparison.mode)


@contextlib.contextmanager
def _ranks(folder: Path, rank: int, comparison: Comparison) -> Iterator[None]:
    if comparison.world == 1:
        yield
        return
    if comparison.device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if comparison.device == "cuda" else "gloo"
    store = dist.FileStore(  # type: ignore[attr-defined]
        str(folder / "store"), comparison.world
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=comparison.world)
    yield
    dist.barrier()
    dist.destroy_process_group()


def _barrier(comparison: Comparison) -> None:
    if comparison.world > 1:
        dist.barrier()


def _die_with_parent() -> None:
    """So that nothing goes on measuring where the parent was killed outright."""
    parent_died = 1  # PR_SET_PDEATHSIG
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(parent_died, signal.SIGKILL)
        if os.getppid() == 1:
            sys.exit("the parent is gone")


if __name__ == "__main__":
    main()
