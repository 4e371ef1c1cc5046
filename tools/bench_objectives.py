"""What a step of each system's objective takes, beside plain CLIP's: CPU time and memory on one core.

python tools/bench_objectives.py                                         into the terminal
python tools/bench_objectives.py --csv tools/results/objectives_cpu.csv

Steps of the configurations in configs/demo on pairs made up in memory, each system in a process of its own, all of them in turn
in every round. Stages count by themselves. No loader takes part; what its further crops and texts cost is not in these figures.
"""

import argparse
import resource
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from arguments import list_of, one_of, positive
from csv_rows import write_rows
from measure_systems import ROOT, SYSTEMS
from scaleclip import distributed
from scaleclip.config import RunConfig
from scaleclip.config_io import load_config
from scaleclip.engine import Engine
from scaleclip.equivalence.batches import global_batch, share_chunks
from scaleclip.local_ranks import run_ranks
from scaleclip.stages import stages_of
from scaleclip.step import TrainStep

WARM_UP = 2


@dataclass(frozen=True)
class Row:
    """A system's steps."""

    date: str
    system: str
    stage: int
    global_batch: int
    passes: int
    steps: int
    cpu_s_p20: float
    cpu_s_p50: float
    cpu_s_p80: float
    """CPU-seconds a step."""
    by_clip: float
    """Median of the rounds' ratios to CLIP's median in the same round."""
    peak_mib: float
    """Resident memory at its peak, of a process that does nothing else."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", type=list_of(one_of(*SYSTEMS)), default=list(SYSTEMS), help=", ".join(SYSTEMS))
    parser.add_argument("--rounds", type=positive, default=3, help="how often each system runs")
    parser.add_argument("--steps", type=positive, default=5, help="steps of a round, after two that do not count")
    parser.add_argument("--micro-batches", type=list_of(positive), default=[128, 32], help="pairs encoded at once")
    parser.add_argument("--csv", type=Path, help="where to write the rows")
    options = parser.parse_args()
    cases = {
        (system, stage.number, micro_batch): stage.config
        for system in dict.fromkeys(["clip", *options.systems])
        for stage in stages_of(load_config(ROOT / "configs" / "demo" / f"{system}.yaml"))
        for micro_batch in options.micro_batches
    }
    found: dict[Any, list[tuple[list[float], float]]] = {case: [] for case in cases}
    for _ in track(range(options.rounds), "rounds"):
        for case, config in cases.items():
            found[case].append(run_ranks(step_times, 1, config, case[2], options.steps)[0])
    rows = [row_of(case, config, found) for case, config in cases.items()]
    table = Table("system", "stage", "passes", "CPU-s a step, p50 (p20-p80)", "by CLIP's", "peak MiB")
    for row in rows:
        spread = f"{row.cpu_s_p50:.3f} ({row.cpu_s_p20:.3f}-{row.cpu_s_p80:.3f})"
        table.add_row(row.system, str(row.stage), str(row.passes), spread, f"{row.by_clip:.2f}", f"{row.peak_mib:,.0f}")
    Console().print(table)
    if options.csv:
        write_rows(options.csv, Row, rows)


def step_times(config: RunConfig, micro_batch: int, steps: int) -> tuple[list[float], float]:
    """CPU-seconds of each step, and the process's peak memory in MiB."""
    world = distributed.init()
    engine = Engine(config, world)
    take_step = TrainStep(engine, config, world, micro_batch)
    batch = global_batch(config, engine.model, 0)
    taken = []
    for step in range(WARM_UP + steps):
        chunks = share_chunks(batch, 0, 1, micro_batch)
        start = time.process_time()
        take_step(iter(chunks), step, config.optim.lr)
        taken.append(time.process_time() - start)
    return taken[WARM_UP:], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def row_of(case: tuple[str, int, int], config: RunConfig, found: dict[Any, list[tuple[list[float], float]]]) -> Row:
    """Of all rounds of a case."""
    system, stage, micro_batch = case
    times = sorted(seconds for round_times, _ in found[case] for seconds in round_times)
    clips = found["clip", 0, micro_batch]
    ratios = [
        statistics.median(mine) / statistics.median(clip) for (mine, _), (clip, _) in zip(found[case], clips, strict=True)
    ]
    size = config.train.global_batch
    return Row(
        date=time.strftime("%Y-%m-%d"),
        system=system,
        stage=stage,
        global_batch=size,
        passes=1 if micro_batch >= size else 2,
        steps=len(times),
        cpu_s_p20=round(times[len(times) // 5], 4),
        cpu_s_p50=round(statistics.median(times), 4),
        cpu_s_p80=round(times[len(times) * 4 // 5], 4),
        by_clip=round(statistics.median(ratios), 3),
        peak_mib=round(max(peak for _, peak in found[case]), 1),
    )


if __name__ == "__main__":
    main()
