"""Hold the planner's memory against measurements: real DeepSpeed training steps on this machine's CPU, each in fresh processes.

python tools/check_plan.py                 every case (minutes; the machine should be idle), a table
python tools/check_plan.py --only zero3    cases whose name has this in it
python tools/check_plan.py --csv tools/results/plan_cpu.csv

What is measured is the peak of the resident set above what the process held before the model was built, on the rank where it is
largest. Memory that is freed is given back at once (glibc's malloc by mmap), so the peak is what was allocated together.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from arguments import file_with
from csv_rows import read_rows, write_rows
from loss_bench.summary import About

CONFIG = "package:scaleclip/configs/demo.yaml"
LIMIT = 0.1
"""Of the measured peak, by which a plan may be off."""
STEPS = 2  # some of what ZeRO keeps is there from the second step on
TIMEOUT_S = 900
_GIVE_BACK_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}

_VIT = (
    "model=ViT-B/32", "model.image.size=96", "model.image.config.num_hidden_layers=8", "model.text.context_length=16",
    "model.text.config.num_hidden_layers=6", "model.text.config.vocab_size=49408",
)  # fmt: skip
_CONVNEXT = (
    "model=ConvNeXt-demo", "model.image.config.hidden_sizes=[128,256,512,1024]", "model.image.config.depths=[2,2,8,2]",
    "model.text.config.hidden_size=512", "model.text.config.num_hidden_layers=6", "model.text.config.num_attention_heads=8",
    "model.text.config.intermediate_size=2048",
)  # fmt: skip
_SLIP = ("model.projector={hidden: 2048, dim: 256}",)
_CLIPS = ("model.caption_decoder={queries: 64}", "data.caption={}", "data.views=[{}, {}]")
_TRIPLETS = ("data.text_pairs={num_negatives: 7, sources: {any: {files: any.jsonl}}}",)


@dataclass(frozen=True)
class Case:
    """A layout of one configuration."""

    name: str
    ranks: int
    global_batch: int
    micro_batch: int
    overrides: tuple[str, ...]

    def all_overrides(self) -> list[str]:
        return [
            *self.overrides,
            f"train.global_batch={self.global_batch}",
            f"train.samples={STEPS * self.global_batch}",
            "data.canonical_streams=1",
        ]


def _case(
    name: str, ranks: int, global_batch: int, micro_batch: int, model: tuple[str, ...], stage: int, precision: str, *more: str
) -> Case:
    return Case(
        name, ranks, global_batch, micro_batch, (*model, f"train.zero_stage={stage}", f"train.precision={precision}", *more)
    )


CASES = (
    _case("zero0 one pass fp32", 1, 64, 64, _VIT, 0, "fp32"),
    _case("zero1 one pass bf16", 1, 64, 64, _VIT, 1, "bf16"),
    _case("zero1 two passes fp32", 2, 128, 32, _VIT, 1, "fp32"),
    _case("zero2 two passes fp32", 2, 128, 32, _VIT, 2, "fp32"),
    _case("zero2 reduced once fp32", 2, 128, 32, _VIT, 2, "fp32", "train.reduce_gradients=step"),
    _case("zero3 two passes fp32", 2, 128, 32, _VIT, 3, "fp32"),
    _case("zero3 one pass bf16", 2, 64, 32, _VIT, 3, "bf16"),
    _case("zero1 convnext one pass bf16", 2, 128, 64, _CONVNEXT, 1, "bf16"),
    _case("zero0 convnext two passes fp32", 1, 96, 32, _CONVNEXT, 0, "fp32"),
    _case("zero1 checkpointing fp32", 1, 128, 128, _VIT, 1, "fp32", "model.activation_checkpointing=true"),
    _case("slip one pass fp32", 1, 64, 64, _VIT, 1, "fp32", *_SLIP),
    _case("slip two passes fp32", 2, 128, 32, _VIT, 1, "fp32", *_SLIP),
    _case("clips two passes fp32", 1, 64, 32, _VIT, 1, "fp32", *_CLIPS),
    _case("triplets two passes fp32", 1, 32, 16, _VIT, 1, "fp32", *_TRIPLETS),
)


@dataclass(frozen=True)
class Row:
    """One case, measured and planned."""

    date: str
    commit: str
    command: str
    machine: str
    torch: str
    load: float
    """Runnable processes on the machine when the run began (the 1-minute load average)."""
    case: str
    ranks: int
    global_batch: int
    micro_batch: int
    overrides: str
    moment: str
    """Of the planned peak."""
    planned_mib: float
    measured_mib: float
    ratio: float
    """Planned to measured."""


def main() -> None:
    """Measure, print, record; exit code 1 where a plan is off by more than LIMIT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the names of the cases to measure")
    parser.add_argument("--csv", type=file_with(".csv"), help="put rows into this file, each in the place of its case's")
    arguments = parser.parse_args()
    about = About.now(" ".join(["python", *sys.argv]), 1, 1)
    cases = [case for case in CASES if arguments.only in case.name]
    rows = []
    for case in track(cases, "measuring"):
        rows.append(measure(case, about))
        if arguments.csv:
            record(arguments.csv, rows[-1:])
    Console().print(table(rows))
    sys.exit(any(abs(row.ratio - 1) > LIMIT for row in rows))


def measure(case: Case, about: About) -> Row:
    """Train a few steps in a process a rank and compare the peak with the plan's."""
    from scaleclip.config_io import load_config
    from scaleclip.files import resolve_path
    from scaleclip.planning.memory import step_memory

    with tempfile.TemporaryDirectory() as folder:
        added = max(_answers(case, Path(folder)))
    plan = step_memory(load_config(resolve_path(CONFIG), case.all_overrides()), case.ranks, case.micro_batch, "cpu")
    return Row(
        date=about.date, commit=about.commit, command=about.command, machine=about.cpu, torch=about.torch, load=about.load,
        case=case.name, ranks=case.ranks, global_batch=case.global_batch, micro_batch=case.micro_batch,
        overrides=" ".join(case.overrides), moment=plan.moment, planned_mib=round(plan.total / 2**20, 1),
        measured_mib=round(added / 2**20, 1), ratio=round(plan.total / added, 3),
    )  # fmt: skip


def _answers(case: Case, folder: Path) -> Iterator[int]:
    """Bytes added on every rank."""
    environment = os.environ | _GIVE_BACK_FREED | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "plan_check", str(folder), str(case.micro_batch), json.dumps(case.all_overrides())],
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
            text=True,
            env=environment
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.ranks)}
            | {"MASTER_ADDR": "unused", "MASTER_PORT": "0"},
        )
        for rank in range(case.ranks)
    ]
    try:
        for process in ranks:
            answer, _ = process.communicate(timeout=TIMEOUT_S)
            if process.returncode:
                raise RuntimeError(f"{case.name}: a rank ended with exit code {process.returncode}; what it said is above")
            yield int(answer.split()[-1])
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def record(path: Path, rows: Sequence[Row]) -> None:
    """Put rows into a .csv file, each in the place of the one of its case."""
    old = {row.case: row for row in read_rows(path, Row, "check_plan.py")} if path.exists() else {}
    write_rows(path, Row, (old | {row.case: row for row in rows}).values())


def table(rows: Sequence[Row]) -> Table:
    """Planned beside measured."""
    made = Table(title="A rank's peak above what it held before the model, MiB", title_justify="left")
    for column in ("case", "ranks", "pairs", "micro batch", "peak while"):
        made.add_column(column)
    for column in ("planned", "measured", "planned / measured"):
        made.add_column(column, justify="right")
    for row in rows:
        style = None if abs(row.ratio - 1) <= LIMIT else "red"
        made.add_row(
            row.case, str(row.ranks), str(row.global_batch), str(row.micro_batch), row.moment, f"{row.planned_mib:,.0f}",
            f"{row.measured_mib:,.0f}", f"{row.ratio:.3f}", style=style,
        )  # fmt: skip
    return made


if __name__ == "__main__":
    main()
