"""Speed and memory of training: against open_clip's trainer, of large batches, and by part of a step.

python tools/bench_train.py peers --source memory               images/s of both trainers on one batch in memory
python tools/bench_train.py peers --source shards --workers 1   and end to end from JPEG shards
python tools/bench_train.py peers --device cuda --towers ViT-B/32 --batch 1024 --precision bf16
python tools/bench_train.py batch                               32,768 pairs a step on 1 and 2 ranks: loss, memory, learning
python tools/bench_train.py step --stage 0,1,2,3                a step's parts and its traffic, in one pass and in two
python tools/bench_train.py draw RECORD.csv PICTURE.png

Every measurement is a process of its own (one a rank); what is compared takes turns, round after round.
"""

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from math import lcm
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from arguments import checked, file_with, list_of, natural, one_of, positive, seconds
from data_bench import shards
from loss_bench.summary import About
from train_bench import records, summary, tables
from train_bench.points import (
    OPEN_CLIP,
    OURS,
    Answer,
    Device,
    Layout,
    LearnJob,
    MemoryJob,
    PeerJob,
    Precision,
    Reduction,
    Setting,
    Source,
    StepJob,
)
from train_bench.runner import MeasurementFailed, run_job
from train_bench.towers import NAMES, model_config, num_parameters, open_clip_config

QUIET_LOAD = 0.5
_TOWERS = {"memory": "ViT-S/32", "shards": "small"}
_BATCH = {"memory": 32, "shards": 128}
_SHARDS_A_WORKER = 4
_WARM_UP_STEPS, _TOWER_STEPS, _MEMORY_STEPS = 2, 10, 2
_BATCH_JOBS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 (a measurement failed), 2 (bad arguments)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options = parser.parse_args(arguments)
    options.command = shlex.join(["python", "tools/bench_train.py", *arguments])
    # an exit that ends the children
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        options.check(options)
        options.run(options)
    except ValueError as error:
        parser.error(str(error))
    except MeasurementFailed as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; every measuring process is ended", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _run_peers(options: argparse.Namespace) -> None:
    towers, batch = options.towers or _TOWERS[options.source], options.batch or _BATCH[options.source]
    layout = Layout(towers, batch, batch, 1, options.stage, "chunk", options.precision, options.threads)
    about, workers = _about(options), options.workers if options.source == "shards" else 0
    with TemporaryDirectory(prefix="bench_train-") as name:
        tars = _make_shards(Path(name), options, batch) if options.source == "shards" else []
        jobs = [
            PeerJob(
                trainer=trainer,
                source=options.source,
                setting=setting,
                layout=layout,
                warm_up=options.warm_up,
                steps=options.steps,
                workers=workers,
                log_every=options.log_every,
                shards=tuple(tars),
                folder=Path(name),
                device=options.device,
            )
            for setting in options.setting
            for trainer in (OURS, OPEN_CLIP)
        ]
        with _progress(options.rounds * len(jobs)) as advance:
            rounds = [{job: _peer(job, options, number, advance) for job in jobs} for number in range(options.rounds)]
    _report(summary.peers(rounds, about), options, tables.peers)


def _make_shards(folder: Path, options: argparse.Namespace, batch: int) -> list[str]:
    """Tars of whole batches, as many for each loader process."""
    num_shards = _SHARDS_A_WORKER * max(1, options.workers)
    step = lcm(num_shards, batch)
    samples = -(-options.samples // step) * step
    print(f"making {samples:,} pictures of {options.size} px", file=sys.stderr)
    shards.make(folder, options.size, samples, num_shards, ("tar",))
    return shards.tars(folder, num_shards)


def _peer(job: PeerJob, options: argparse.Namespace, number: int, advance: Callable[[str], None]) -> Answer:
    """A trainer's turn.

    Raises:
        MeasurementFailed: the trainers have other towers.
    """
    advance(f"round {number + 1}/{options.rounds}: {job.label()}")
    with TemporaryDirectory(prefix="run-", dir=job.folder) as folder:
        answer = run_job(replace(job, folder=Path(folder)), options.timeout)[0]
    expected = num_parameters(model_config(job.layout.towers))
    if answer.num_parameters != expected:
        raise MeasurementFailed(f"{job.label()} has {answer.num_parameters:,} parameters, and not {expected:,}")
    return answer


def _run_batch(options: argparse.Namespace) -> None:
    about = _about(options)
    rows: list[records.Row] = []
    learned: list[Sequence[Answer]] = []
    with _progress(_BATCH_JOBS * len(options.world)) as advance:
        for world in options.world:
            layout = Layout(
                options.towers, options.batch, options.micro_batch, world, options.stage, "chunk", options.precision,
                options.threads,
            )  # fmt: skip
            small = replace(layout, global_batch=options.micro_batch * world)
            jobs = (
                MemoryJob(small, _MEMORY_STEPS),
                MemoryJob(layout, _MEMORY_STEPS),
                StepJob(small, _WARM_UP_STEPS, _TOWER_STEPS),
                LearnJob(layout, options.steps, options.lr),
            )
            answers = []
            for job in jobs:
                advance(job.label())
                answers.append(run_job(job, options.timeout))
            micro, whole, towers, steps = answers
            learned.append(steps)
            rows += summary.towers_alone(small, towers, about)
            rows += summary.memory(layout, whole, micro, about)
            rows += summary.learning(layout, steps, about)
            rows.append(summary.difference(layout, steps, learned[0], about))
    _report(rows, options, tables.batch)


def _run_step(options: argparse.Namespace) -> None:
    about = _about(options)
    layouts = [layout for stage in options.stage for layout in _layouts(options, stage)]
    rounds: list[dict[Layout, Sequence[Answer]]] = []
    with _progress(options.rounds * len(layouts)) as advance:
        for number in range(options.rounds):
            found: dict[Layout, Sequence[Answer]] = {}
            for layout in layouts:
                job = StepJob(layout, options.warm_up, options.steps)
                advance(f"round {number + 1}/{options.rounds}: {job.label()}")
                found[layout] = run_job(job, options.timeout)
            rounds.append(found)
    rows = []
    for layout in layouts:
        one_pass = replace(layout, micro_batch=layout.share, reduce_gradients="chunk")
        rows += summary.steps(layout, [each[layout] for each in rounds], [each[one_pass] for each in rounds], about)
    _report(rows, options, tables.step)


def _layouts(options: argparse.Namespace, stage: int) -> list[Layout]:
    """One pass, then every micro batch; where a stage can reduce a chunk or a step, both."""
    whole = Layout(
        options.towers, options.batch, options.batch, options.world, stage, "chunk", options.precision, options.threads
    )
    one_pass = replace(whole, micro_batch=whole.share)
    reductions: Sequence[Reduction] = get_args(Reduction) if stage >= 2 else ("chunk",)
    chunked = [replace(whole, micro_batch=size, reduce_gradients=when) for size in options.micro_batch for when in reductions]
    return list(dict.fromkeys([one_pass, *(layout for layout in chunked if layout.micro_batch < whole.share)]))


def _run_draw(options: argparse.Namespace) -> None:
    _draw(records.read(options.record), options.picture)


def _report(rows: Sequence[records.Row], options: argparse.Namespace, table: Callable[[Sequence[records.Row]], object]) -> None:
    Console(markup=False, width=None if sys.stdout.isatty() else 240).print(table(rows))
    if options.csv:
        records.record(options.csv, rows)
    if options.plot:
        _draw(records.read(options.csv) if options.csv else rows, options.plot)


def _draw(rows: Sequence[records.Row], path: Path) -> None:
    from train_bench import figure  # matplotlib takes a second to import

    figure.draw(rows, path)


def _about(options: argparse.Namespace) -> About:
    about = About.now(options.command, getattr(options, "rounds", 1), repeats=1)
    if getattr(options, "device", "cpu") == "cuda":
        about = replace(about, cpu=torch.cuda.get_device_name())
    if about.load > QUIET_LOAD:
        print(f"the load average is {about.load}: times are of use only on a quiet machine", file=sys.stderr)
    return about


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar; what it yields says which measurement begins."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar, numbers = progress.add_task("", total=total), count()
        yield lambda description: progress.update(bar, completed=next(numbers), description=description)


def _check_peers(options: argparse.Namespace) -> None:
    model = model_config(options.towers or _TOWERS[options.source])
    open_clip_config(model)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("argument --device: cuda needs a GPU, and torch finds none")
    if options.source == "shards" and model.text.tokenizer != "clip":
        raise ValueError(f"argument --towers: {options.towers} reads another vocabulary than open_clip's tokenizer writes")


def _check_batch(options: argparse.Namespace) -> None:
    for world in options.world:
        if options.batch % world or options.batch <= world * options.micro_batch:
            raise ValueError(
                f"argument --batch: {options.batch} pairs are to be split evenly over {world} ranks, each with more than "
                f"--micro-batch {options.micro_batch}"
            )


def _check_step(options: argparse.Namespace) -> None:
    if options.batch % options.world:
        raise ValueError(f"argument --batch: {options.batch} pairs cannot be split evenly over --world {options.world}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench_train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(check=lambda options: None)
    benches = parser.add_subparsers(required=True, metavar="BENCH")
    _add_peers(benches.add_parser("peers", help="images/s of scaleclip and of open_clip, the same towers, batch and flags"))
    _add_batch(benches.add_parser("batch", help="large batches on few ranks: loss, memory, learning"))
    _add_step(benches.add_parser("step", help="a step's parts and its traffic, by ZeRO stage and micro batch"))
    draw = benches.add_parser("draw", help="the picture of a record")
    draw.add_argument("record", type=checked(Path, Path.exists, "a file that exists"), metavar="RECORD.csv")
    draw.add_argument("picture", type=file_with(".png", ".pdf", ".svg"), metavar="PICTURE.png")
    draw.set_defaults(run=_run_draw)
    return parser


def _add_peers(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_run_peers, check=_check_peers)
    parser.add_argument(
        "--source",
        choices=get_args(Source),
        default="memory",
        help="memory: one batch again and again; shards: synthetic JPEGs in tars, by each trainer's loader (default: memory)",
    )
    parser.add_argument("--towers", choices=NAMES, metavar="NAME", help="(default: ViT-S/32 from memory, small from shards)")
    parser.add_argument(
        "--setting",
        type=list_of(one_of(*get_args(Setting))),
        default=["plain"],
        metavar="NAMES",
        help="plain, medium (torch.set_float32_matmul_precision), compile (torch.compile), for both trainers (default: plain)",
    )
    parser.add_argument("--device", choices=get_args(Device), default="cpu", help="(default: cpu)")
    parser.add_argument("--stage", type=int, choices=range(4), default=1, help="scaleclip's train.zero_stage (default: 1)")
    parser.add_argument("--batch", type=positive, help="pairs a step (default: 32 from memory, 128 from shards)")
    parser.add_argument("--workers", type=natural, default=1, help="loader processes, from shards (default: 1)")
    parser.add_argument("--size", type=positive, default=512, metavar="PIXELS", help="of the JPEGs (default: 512)")
    parser.add_argument("--samples", type=positive, default=2048, help="in the shards, at least (default: 2048)")
    parser.add_argument("--log-every", type=positive, default=10, metavar="STEPS", help="of both trainers (default: 10)")
    _add_effort(parser, warm_up=2, steps=8, rounds=5, timeout_s=900)


def _add_batch(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_run_batch, check=_check_batch)
    parser.add_argument("--towers", choices=NAMES, default="digits", metavar="NAME", help="(default: digits)")
    parser.add_argument("--batch", type=positive, default=32_768, help="pairs a step, over all ranks (default: 32768)")
    parser.add_argument("--micro-batch", type=positive, default=512, help="pairs a rank encodes at once (default: 512)")
    parser.add_argument("--world", type=list_of(positive), default=[1, 2], metavar="NUMBERS", help="ranks (default: 1,2)")
    parser.add_argument("--stage", type=int, choices=range(4), default=1, help="train.zero_stage (default: 1)")
    parser.add_argument(
        "--lr", type=checked(float, lambda lr: lr > 0, "a number above 0"), default=3e-3, help="(default: 3e-3)"
    )
    parser.add_argument("--steps", type=positive, default=50, help="of the run that learns (default: 50)")
    _add_layout_and_output(parser, timeout_s=3600)


def _add_step(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_run_step, check=_check_step)
    parser.add_argument("--towers", choices=NAMES, default="ViT-S/32", metavar="NAME", help="(default: ViT-S/32)")
    parser.add_argument("--batch", type=positive, default=128, help="pairs a step, over all ranks (default: 128)")
    parser.add_argument(
        "--micro-batch",
        type=list_of(positive),
        default=[32, 16, 8],
        metavar="NUMBERS",
        help="beside the whole share, which goes in one pass (default: 32,16,8)",
    )
    parser.add_argument("--world", type=positive, default=2, help="ranks (default: 2)")
    parser.add_argument(
        "--stage", type=list_of(checked(int, lambda stage: stage in range(4), "0, 1, 2 or 3")), default=[0, 1, 2, 3],
        metavar="NUMBERS", help="train.zero_stage (default: 0,1,2,3)",
    )  # fmt: skip
    _add_effort(parser, warm_up=1, steps=3, rounds=3, timeout_s=900)


def _add_effort(parser: argparse.ArgumentParser, *, warm_up: int, steps: int, rounds: int, timeout_s: float) -> None:
    parser.add_argument("--warm-up", type=positive, default=warm_up, metavar="STEPS", help=f"a turn (default: {warm_up})")
    parser.add_argument("--steps", type=positive, default=steps, help=f"that count, a turn (default: {steps})")
    parser.add_argument("--rounds", type=positive, default=rounds, help=f"turns of everything (default: {rounds})")
    _add_layout_and_output(parser, timeout_s)


def _add_layout_and_output(parser: argparse.ArgumentParser, timeout_s: float) -> None:
    parser.add_argument("--precision", choices=get_args(Precision), default="fp32", help="bf16: autocast (default: fp32)")
    parser.add_argument("--threads", type=positive, default=1, help="of each process or rank (default: 1)")
    parser.add_argument("--timeout", type=seconds, default=timeout_s, metavar="SECONDS", help=f"a job (default: {timeout_s})")
    parser.add_argument("--csv", type=file_with(".csv"), metavar="PATH", help="measuring a point again replaces its rows")
    parser.add_argument(
        "--plot", type=file_with(".png", ".pdf", ".svg"), metavar="PATH", help="of the whole record, where there is --csv"
    )


if __name__ == "__main__":
    sys.exit(main())
