"""Runs the measurements: child processes in turn, round after round, and what they answered as rows of the record."""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from rich.progress import Progress

from loss_bench import summary
from loss_bench.implementations import find
from loss_bench.points import GEMM, Comparison, Job, Point, RankResult, Sample, Task
from loss_bench.records import Row
from loss_bench.summary import About, Outcome

TOOLS = Path(__file__).parent.parent


@dataclass(frozen=True)
class Plan:
    """What to measure, and how often."""

    comparisons: Sequence[Comparison]
    impls: Sequence[str]
    schedules: Sequence[str]
    precisions: Sequence[str]
    rounds: int
    repeats: int
    timeout_s: float
    command: str

    def points(self, comparison: Comparison) -> list[Point]:
        """Every implementation at the flags that are compared; then the peers at their other settings."""
        members = [
            (impl, variant, precision)
            for precision in self.precisions
            for impl in self.impls
            for variant in find(impl).variants(comparison.world, self.schedules)
        ]
        members += [
            (impl, variant, precision)
            for impl in self.impls
            if find(impl).has_settings
            for precision in PEER_PRECISIONS[comparison.device]
            for variant in find(impl).variants(comparison.world, self.schedules)
        ]
        return [Point(comparison, *member) for member in dict.fromkeys(members)]


PEER_PRECISIONS = {"cpu": ("highest", "medium"), "cuda": ("highest", "high")}
"""Among which a peer's best setting is looked for."""
_GEMM_LIBRARIES = {"cpu": ("default", "onednn"), "cuda": ("cublas",)}
# One that stays in the cache, and one that does not: which of them is faster depends on the processor.
_PANEL = (1024, 1024, 512)
_GEMM_SHAPES = {"cpu": (_PANEL, (4096, 4096, 1024)), "cuda": (_PANEL, (8192, 8192, 4096))}


def measure(plan: Plan, about: About, progress: Progress) -> Iterator[list[Row]]:
    """The rows of one comparison after another. Implementations take turns, so that a slow minute falls on all of them."""
    total = sum(plan.rounds * (len(_gemm_points(c)) + len(plan.points(c))) for c in plan.comparisons)
    bar = progress.add_task("", total=total)
    for comparison in plan.comparisons:
        points = [*_gemm_points(comparison), *plan.points(comparison)]
        outcomes: dict[Point, Outcome] = {}
        for number in range(plan.rounds):
            for point in points:
                before = outcomes.get(point)
                progress.update(bar, description=f"{comparison.title()}: round {number + 1}/{plan.rounds}, {point.name}")
                if before is None or before.first.status == "ok":
                    job = Job(point, "time", plan.repeats)
                    outcome = run_job(job, plan.timeout_s)
                    earlier = before.samples if before is not None else []
                    outcomes[point] = replace(outcome, samples=[*earlier, *outcome.samples])
                progress.advance(bar)
        yield summary.rows(list(outcomes.values()), about)


def run_job(job: Job, timeout_s: float) -> Outcome:
    """One child process a rank, to the end; none is left behind whatever happens."""
    comparison = job.point.comparison
    with tempfile.TemporaryDirectory(prefix="bench_loss-") as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "job.pickle").write_bytes(pickle.dumps(job))
        children: list[_Child] = []
        stack.callback(_end, children)
        for rank in range(comparison.world):
            children.append(_start(job.point, folder, rank, stack))
        failure = _wait(children, timeout_s)
        results = [child.answer() for child in children] if failure is None else [failure]
    samples = [_slowest(iteration) for iteration in zip(*(result.samples for result in results), strict=True)]
    return Outcome(job.point, results, samples)


def _start(point: Point, folder: Path, rank: int, stack: ExitStack) -> "_Child":
    environment = os.environ | {
        "OMP_NUM_THREADS": str(point.comparison.threads),
        "MKL_NUM_THREADS": str(point.comparison.threads),
        "PYTHONPATH": os.pathsep.join([str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])]),
        # a peer that looks for weights must not wait for a network
        "HF_HUB_OFFLINE": "1",
    }
    if point.impl == GEMM:
        environment["SCALECLIP_KERNELS_CPU_GEMM"] = "default" if point.variant.startswith("default") else "auto"
    else:
        environment |= find(point.impl).environment
    log = stack.enter_context((folder / f"{rank}.log").open("w+"))
    process = subprocess.Popen(
        [sys.executable, "-m", "loss_bench.child", str(folder), str(rank)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,  # Ctrl-C is for the parent, which then ends the children
    )
    return _Child(process, folder / f"{rank}.pickle", folder / f"{rank}.log")


@dataclass(frozen=True)
class _Child:
    process: "subprocess.Popen[bytes]"
    result: Path
    log: Path

    def answer(self) -> RankResult:
        """Its result, or the reason that there is none."""
        if self.result.exists():
            answer: RankResult = pickle.loads(self.result.read_bytes())
            return answer
        code = self.process.returncode
        if code < 0:
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            return RankResult("died", f"killed by {signal.Signals(-code).name}{hint}")
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return RankResult("died", lines[-1] if lines else f"exit code {code}")


def _wait(children: Sequence[_Child], timeout_s: float) -> RankResult | None:
    """None once all have ended well, else the answer of the first that did not."""
    deadline = time.monotonic() + timeout_s
    while True:
        codes = [child.process.poll() for child in children]
        bad = next((child for child, code in zip(children, codes, strict=True) if code), None)
        if bad is not None:
            return bad.answer()
        if all(code == 0 for code in codes):
            return None
        if time.monotonic() > deadline:
            return RankResult("died", f"took more than {timeout_s:g} s (--timeout)")
        time.sleep(0.02)


def _end(children: Sequence[_Child]) -> None:
    for child in children:
        child.process.kill()
        child.process.wait()


def _slowest(ranks: Sequence[Sample]) -> Sample:
    return Sample(
        max(sample.forward_s for sample in ranks),
        max(sample.backward_s for sample in ranks),
        max(sample.full_s for sample in ranks),
        sum(sample.cpu_s for sample in ranks),
    )


def _gemm_points(comparison: Comparison) -> list[Point]:
    """Every library and shape: the best of them is the rate that losses are measured by."""
    shapes = [shape for shape in _GEMM_SHAPES[comparison.device] if comparison.batch >= shape[0] or shape == _PANEL]
    variants = [f"{library} {'x'.join(map(str, shape))}" for shape in shapes for library in _GEMM_LIBRARIES[comparison.device]]
    return [Point(comparison, GEMM, variant, "highest") for variant in variants]


def run_each(plan: Plan, task: Task, progress: Progress, trace_folder: Path | None = None) -> list[Outcome]:
    """Every point once, untimed."""
    points = [point for comparison in plan.comparisons for point in plan.points(comparison)]
    bar = progress.add_task("", total=len(points))
    outcomes = []
    for point in points:
        progress.update(bar, description=f"{point.comparison.title()}: {task} of {point.name}")
        trace = None if trace_folder is None else trace_folder.absolute() / trace_name(point)
        outcomes.append(run_job(Job(point, task, repeats=0, trace=trace), plan.timeout_s))
        progress.advance(bar)
    return outcomes


def trace_name(point: Point) -> str:
    """Of a point's trace in the folder of --profile."""
    comparison = point.comparison
    words = [point.name, point.variant, point.precision, comparison.mode, comparison.dtype]
    words += [f"N{comparison.batch}", f"D{comparison.dim}", f"scale{comparison.scale:g}", f"W{comparison.world}"]
    return "-".join(filter(None, words)) + ".json"
