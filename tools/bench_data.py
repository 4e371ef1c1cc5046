"""Processor time of the data loader, against open_clip's training pipeline and plain webdataset on the same shards.

python tools/bench_data.py                                      readers, stages, pipelines, SimCLR's views at 256, 512, 1024 px
python tools/bench_data.py --workers 0,1,2 --csv data.csv --plot data.png
python tools/bench_data.py --format tar,mds --task whole        MosaicML's shards too
python tools/bench_data.py --from-csv data.csv --plot data.png  only draw

Pictures are synthetic, with a photograph's spectrum, as JPEG of quality 90. Every measurement is a process of its own with one
thread a process; the pipelines take turns, round after round. A sample's cost is processor time, of loader processes too.
"""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from arguments import file_with, list_of, natural, one_of, positive, seconds
from data_bench import records, runner, tables
from data_bench.points import Format, Task
from loss_bench.summary import About

QUIET_LOAD = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 (a measurement failed), 2 (bad arguments)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        _check(options)
        if options.from_csv:
            _draw(records.read(options.from_csv), options.plot)
            return 0
    except ValueError as error:
        parser.error(str(error))
    # an exit that ends the children
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with TemporaryDirectory(prefix="bench_data-") as folder:
            _measure(options, Path(folder), shlex.join(["python", "tools/bench_data.py", *arguments]))
    except runner.MeasurementFailed as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; every measuring process is ended", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _measure(options: argparse.Namespace, folder: Path, command: str) -> None:
    if os.getloadavg()[0] > QUIET_LOAD:
        print(f"the load average is {os.getloadavg()[0]:.2f}: processes that share caches slow each other", file=sys.stderr)
    plan = runner.Plan(
        options.size,
        options.workers,
        options.format,
        options.task,
        options.samples,
        options.batch,
        options.crop,
        options.rounds,
        options.least_cpu,
        options.timeout,
        folder,
    )
    console = Console(markup=False, width=None if sys.stdout.isatty() else 160)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    found: list[records.Row] = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for rows in runner.measure(plan, About.now(command, options.rounds, repeats=1), progress):
            found += rows
            # after every size: a long run that is ended keeps what it has
            if options.csv:
                records.record(options.csv, rows)
            console.print(tables.whole(rows))
            by_stage = tables.stages(rows)
            if by_stage:
                console.print(by_stage)
    if options.plot:
        _draw(records.read(options.csv) if options.csv else found, options.plot)


def _draw(rows: Sequence[records.Row], path: Path) -> None:
    from data_bench import figure  # matplotlib takes a second to import

    figure.draw(rows, path)


def _check(options: argparse.Namespace) -> None:
    """What argparse cannot see in one option alone."""
    if options.from_csv and not options.plot:
        raise ValueError("argument --from-csv: give --plot PATH to say where to draw")
    if options.from_csv and not options.from_csv.exists():
        raise ValueError(f"argument --from-csv: {options.from_csv} does not exist")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what is measured (lists are separated by commas)")
    what.add_argument(
        "--task",
        type=list_of(one_of(*get_args(Task))),
        default=list(get_args(Task)),
        metavar="NAMES",
        help="reader: samples as bytes; stages: a pipeline's parts; whole: a training pipeline; "
        "views: one with SimCLR's two further views of each image (default: all four)",
    )
    what.add_argument(
        "--size", type=list_of(positive), default=[256, 512, 1024], metavar="PIXELS", help="(default: 256,512,1024)"
    )
    what.add_argument("--crop", type=positive, default=224, metavar="PIXELS", help="the model's input (default: 224)")
    what.add_argument("--format", type=list_of(one_of(*get_args(Format))), default=["tar"], help="tar, mds (default: tar)")
    what.add_argument("--workers", type=list_of(natural), default=[0], metavar="NUMBERS", help="loader processes (default: 0)")
    what.add_argument("--batch", type=positive, default=128, help="samples a batch (default: 128)")
    effort = parser.add_argument_group("effort")
    effort.add_argument("--samples", type=positive, default=1024, help="pictures of each size, at least (default: 1024)")
    effort.add_argument("--rounds", type=positive, default=5, help="times that every pipeline gets its turn (default: 5)")
    effort.add_argument(
        "--least-cpu", type=seconds, default=2.0, metavar="SECONDS", help="of processor time a measurement (default: 2)"
    )
    effort.add_argument("--timeout", type=seconds, default=900, metavar="SECONDS", help="for one process (default: 900)")
    output = parser.add_argument_group("where it goes, beside the tables")
    output.add_argument("--csv", type=file_with(".csv"), metavar="PATH", help="measuring a point again replaces its rows")
    output.add_argument(
        "--plot", type=file_with(".png", ".pdf", ".svg"), metavar="PATH", help="samples a CPU-second, and stages"
    )
    output.add_argument("--from-csv", type=Path, metavar="PATH", help="only draw --plot, from the .csv of earlier runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
