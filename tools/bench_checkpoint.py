"""How long training stands still for a checkpoint, and how long the checkpoint takes.

python tools/bench_checkpoint.py                                  1 GiB of state a rank, on 1 and on 2 ranks
python tools/bench_checkpoint.py --mib 64 --rounds 2              smaller
python tools/bench_checkpoint.py --csv tools/results/checkpoint_cpu.csv

The state is cut as ZeRO-1 cuts it: a row of fp32 weights and two of moments, each a view of 300 parameters. A stall is what
`Checkpointer.save` takes; memcpy is one copy of as many bytes into memory that is in use, in the same round. Around the saves
steps of small matrix products run, which show what the writing thread takes from them. The first save comes 10 s after the
start, in which the buffer's memory is made ready.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from arguments import list_of, positive
from bounds import Row, report
from scaleclip import distributed
from scaleclip.checkpoint.checkpointer import Checkpointer
from scaleclip.checkpoint.folders import newest, step_name
from scaleclip.checkpoint.shard import Fragment, Shard
from scaleclip.checkpoint.state import TrainState
from scaleclip.config import CheckpointConfig
from scaleclip.local_ranks import run_ranks

NUM_PARAMETERS = 300
KINDS = ("weight", "exp_avg", "exp_avg_sq")
# of what the project asks for
MEMCPYS, SLACK_MS = 1.5, 50.0
STEPS_A_LOOK = 10
BEFORE_S, ALONE_S = 10.0, 1.0


class Round(NamedTuple):
    """One save of one rank."""

    memcpy_ms: float
    stall_ms: float
    published_s: float
    """From the save until its checkpoint has its name."""
    slowdown: float
    """Time of a step while it is written, by that of one before."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=list_of(positive), default=[1, 2], help="numbers of ranks")
    parser.add_argument("--mib", type=positive, default=1024, help="state of a rank")
    parser.add_argument("--rounds", type=positive, default=5, help="saves")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; else in the system's folder for such")
    parser.add_argument("--csv", type=Path, help="append the figures to this file")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    rows: list[Row] = []
    for num_ranks in options.ranks:
        with console.status(f"{num_ranks} ranks"), tempfile.TemporaryDirectory(dir=options.folder) as folder:
            ranks = run_ranks(measure, num_ranks, Path(folder), options.mib, options.rounds)
        rows += figures(f"{num_ranks} x {options.mib:,} MiB", ranks)
    return report(rows, console, options.csv)


def measure(folder: Path, mib: int, num_rounds: int) -> list[Round]:
    """This rank's saves."""
    world = distributed.init()
    shard = make_shard(mib, world.rank, world.size)
    sources = [torch.empty(0).set_(tensor.untyped_storage()) for tensor in shard.fragments[0].tensors.values()]
    targets = [source.clone() for source in sources]
    checkpointer = Checkpointer(folder, world, CheckpointConfig(keep=1), {}).attach(lambda: shard)
    path: Path | None = None

    def train() -> float:
        """Seconds of some steps, after which ranks look at the save."""
        start = time.perf_counter()
        for _ in range(STEPS_A_LOOK):
            take_step()
        checkpointer.poll()
        distributed.any_rank(path is not None and path.exists())
        return time.perf_counter() - start

    train_for(BEFORE_S, train)
    found = []
    for number in range(num_rounds):
        distributed.barrier()
        start = time.perf_counter()
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
        memcpy_s = time.perf_counter() - start
        alone_s = train_for(ALONE_S, train)
        distributed.barrier()
        path = folder / "checkpoints" / step_name(number)
        start = time.perf_counter()
        checkpointer.save(TrainState(step=number))
        stall_s = time.perf_counter() - start
        busy_s = []
        while not distributed.any_rank(path.exists()):
            busy_s.append(train())
        published_s = time.perf_counter() - start
        found.append(Round(1e3 * memcpy_s, 1e3 * stall_s, published_s, statistics.mean(busy_s) / alone_s))
        checkpointer.finish()
    assert newest(folder) is not None
    return found


def train_for(least_s: float, train: Callable[[], float]) -> float:
    """Mean seconds of calls of `train`, as many on every rank."""
    took_s: list[float] = []
    while distributed.any_rank(sum(took_s) < least_s):
        took_s.append(train())
    return statistics.mean(took_s)


def make_shard(mib: int, rank: int, world_size: int) -> Shard:
    """A rank's state; a large parameter, matrices and vectors."""
    num_elements = mib * 2**20 // 4 // len(KINDS)
    rows = [torch.randn(num_elements) for _ in KINDS]
    weights = [60.0, *(1.0 if number % 2 else 0.001 for number in range(NUM_PARAMETERS - 1))]
    ends = [int(num_elements * sum(weights[: number + 1]) / sum(weights)) for number in range(NUM_PARAMETERS)]
    fragments = []
    for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        tensors = {kind: row[begin:end] for kind, row in zip(KINDS, rows, strict=True)}
        shape = ((end - begin) * world_size,)
        fragments.append(Fragment(f"layers.{number}", shape, rank * (end - begin), tensors, replicated=False))
    return Shard(fragments, {"adam_step": torch.tensor(1.0)})


def take_step() -> None:
    """A step's stand-in: many small operations, in which an interpreter that is held by another thread would show."""
    x_NN = torch.ones(96, 96)
    for _ in range(20):
        x_NN = (x_NN @ x_NN).clamp(max=1.0)


def figures(what: str, ranks: Sequence[Sequence[Round]]) -> list[Row]:
    """The slowest rank of each round; the first save apart."""
    slowest = [Round(*(max(values) for values in zip(*saves, strict=True))) for saves in zip(*ranks, strict=True)]
    memcpy_ms = statistics.median(found.memcpy_ms for found in slowest)
    bound = f"<= {MEMCPYS * memcpy_ms + SLACK_MS:.5g}"
    stalls_ms = [found.stall_ms for found in slowest]
    published_s = statistics.median(found.published_s for found in slowest)
    slowdown = statistics.median(found.slowdown for found in slowest)

    return [
        Row(f"{what}: memcpy, median", memcpy_ms, "ms"),
        Row(f"{what}: stall of the first save", stalls_ms[0], "ms", bound),
        Row(f"{what}: stall, median of {len(stalls_ms)}", statistics.median(stalls_ms), "ms", bound),
        Row(f"{what}: stall, longest", max(stalls_ms), "ms", bound),
        Row(f"{what}: until published, median", published_s, "s"),
        Row(f"{what}: a step while it is written, median", slowdown, "x alone"),
    ]


if __name__ == "__main__":
    sys.exit(main())
