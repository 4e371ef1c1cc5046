"""Makes the shards and runs the measurements: a child process each, all points in turn, round after round."""

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.progress import Progress

from data_bench import records, shards
from data_bench.points import OURS, PIPELINES, READERS, Answer, Format, Job, Point, Task
from loss_bench.summary import About

TOOLS = Path(__file__).parent.parent
_LEAST_SHARDS = 4


class MeasurementFailed(Exception):
    """A measuring process ended without an answer; what it said last."""


@dataclass(frozen=True)
class Plan:
    """What to measure, and how often."""

    sizes: Sequence[int]
    workers: Sequence[int]
    formats: Sequence[Format]
    tasks: Sequence[Task]
    samples: int
    batch: int
    crop: int
    rounds: int
    least_cpu_s: float
    timeout_s: float
    folder: Path
    """Where the shards are made."""

    def points(self, size: int) -> list[Point]:
        """All that is compared on images of one size."""
        found = []
        for task in self.tasks:
            for form in self.formats:
                pipelines = {"reader": READERS[form], "views": (OURS,)}.get(task, PIPELINES[form])
                for workers in self.workers if task in ("whole", "views") else (0,):
                    found += [Point(task, pipeline, form, size, workers) for pipeline in pipelines]
        return found

    @property
    def num_shards(self) -> int:
        """As many for each loader process."""
        processes = lcm(*(max(1, workers) for workers in self.workers))
        return processes * -(-_LEAST_SHARDS // processes)

    @property
    def num_samples(self) -> int:
        """`samples` or a little more: whole batches from every shard."""
        step = self.num_shards * self.batch
        return -(-self.samples // step) * step


def measure(plan: Plan, about: About, progress: Progress) -> Iterator[list[records.Row]]:
    """The rows of one size after another. Points take turns, so that a slow minute falls on all of them."""
    bar = progress.add_task("", total=sum(plan.rounds * len(plan.points(size)) for size in plan.sizes))
    for size in plan.sizes:
        progress.update(bar, description=f"making {plan.num_samples} pictures of {size} px")
        folder = plan.folder / str(size)
        made = shards.make(folder, size, plan.num_samples, plan.num_shards, plan.formats)
        answers: dict[Point, list[Answer]] = {point: [] for point in plan.points(size)}
        for number in range(plan.rounds):
            for point, found in answers.items():
                progress.update(bar, description=f"round {number + 1}/{plan.rounds}: {point.label()}")
                found.append(run_job(Job(point, folder, plan.batch, plan.crop, plan.least_cpu_s), made, plan.timeout_s))
                progress.advance(bar)
        yield [
            row for point, found in answers.items() for row in records.rows(point, found, made, plan.batch, plan.crop, about)
        ]


def run_job(job: Job, made: shards.Made, timeout_s: float) -> Answer:
    """One child process, to its end.

    Raises:
        MeasurementFailed: it ended without an answer, or took too long.
    """
    with TemporaryDirectory(prefix="bench_data-") as name:
        question, reply = Path(name) / "job.pickle", Path(name) / "answer.pickle"
        question.write_bytes(pickle.dumps((job, made)))
        path = os.pathsep.join([str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])])
        # one thread, as each loader process of a training run has
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "data_bench.child", str(question), str(reply)]
        try:
            ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:
            raise MeasurementFailed(f"{job.point.label()} took more than {timeout_s:g} s (--timeout)") from None
        if not reply.exists():
            said = [line for line in ended.stderr.splitlines() if line.strip()]
            raise MeasurementFailed(f"{job.point.label()}: {said[-1] if said else f'exit code {ended.returncode}'}")
        answer: Answer = pickle.loads(reply.read_bytes())
        return answer
