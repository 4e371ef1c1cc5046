"""Time, memory, traffic and error of contrastive losses, each measurement in a process of its own.

python tools/bench_loss.py                                      panels against open_clip at N = 8192
python tools/bench_loss.py --batch 8192,16384 --csv loss.csv --plot loss.png
python tools/bench_loss.py --world 4 --schedule ring,gather     over four ranks on this machine
python tools/bench_loss.py --impl mine=module:function          a loss of your own: function(x, y, logit_scale)
python tools/bench_loss.py --fit 80GiB                          the largest batch in a budget
python tools/bench_loss.py --estimate h100                      arithmetic, nothing measured

Every loss is first compared with fp64. One that is wrong gets no speed, and the exit code is 1 (2: bad arguments).
"""

import argparse
import itertools
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from arguments import checked, file_with, list_of, one_of, positive, seconds
from loss_bench import estimate, fit, records, runner, summary
from loss_bench.implementations import REGISTRY, find
from loss_bench.points import DTYPE_BYTES, Comparison, label_of

QUIET_LOAD = 0.5
UNITS = {"MiB": 1 << 20, "GiB": 1 << 30, "MB": 10**6, "GB": 10**9}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        _check(options)
    except ValueError as error:
        parser.error(str(error))
    # brackets in a message are no markup
    console = Console(markup=False, width=None if sys.stdout.isatty() else 240)
    # an exit that ends the children
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return _run(options, shlex.join(["python", "tools/bench_loss.py", *arguments]), console)
    except KeyboardInterrupt:
        print("interrupted; every measuring process is ended", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(options: argparse.Namespace, command: str, console: Console) -> int:
    if options.estimate:
        for batch in options.batch or estimate.BATCHES:
            for dim in options.dim:
                estimate.show(console, options.estimate, batch, dim)
        return 0
    if options.from_csv:
        _draw(records.read(options.from_csv), options.plot)
        return 0
    plan = _plan(options, command)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        if options.fit:
            return _fit(plan, options.fit, progress, console)
        if options.profile:
            return _profile(plan, options.profile, progress, console)
        return _measure(plan, options, progress, console)


def _measure(plan: runner.Plan, options: argparse.Namespace, progress: Progress, console: Console) -> int:
    found = []
    about = summary.About.now(plan.command, plan.rounds, plan.repeats)
    if about.load > QUIET_LOAD:
        # threads that wait for each other after every operation lose a time slice each time another process has the core
        print(f"the load average is {about.load}: times are of use only on a quiet machine", file=sys.stderr)
    for comparison, rows in zip(plan.comparisons, runner.measure(plan, about, progress), strict=True):
        console.print(summary.table(comparison, rows))
        found += rows
        # after every comparison: a long run that is ended keeps what it has
        for path in filter(None, (options.csv, options.json)):
            records.record(path, rows)
    if options.plot:
        _draw(records.read(options.csv) if options.csv else found, options.plot)
    return 1 if any(row.status == "wrong" for row in found) else 0


def _fit(plan: runner.Plan, budget_bytes: int, progress: Progress, console: Console) -> int:
    outcomes = runner.run_each(plan, "memory", progress)
    console.print(fit.table(outcomes, budget_bytes))
    return 1 if any(outcome.first.status == "wrong" for outcome in outcomes) else 0


def _profile(plan: runner.Plan, folder: Path, progress: Progress, console: Console) -> int:
    outcomes = runner.run_each(plan, "profile", progress, folder)
    for outcome in outcomes:
        is_there = outcome.first.status == "ok"
        console.print(
            f"{outcome.point.label()}: {folder / runner.trace_name(outcome.point)}"
            if is_there
            else f"{outcome.point.label()}: {outcome.first.status}: {outcome.first.note}",
            soft_wrap=True,
        )
    return 1 if any(outcome.first.status == "wrong" for outcome in outcomes) else 0


def _draw(rows: Sequence[records.Row], path: Path) -> None:
    from loss_bench import figure  # matplotlib takes a second to import

    for message in figure.draw(rows, path):
        print(message, file=sys.stderr)


def _plan(options: argparse.Namespace, command: str) -> runner.Plan:
    batches = options.batch or (fit.BATCHES[options.device] if options.fit else [8192])
    comparisons = [
        Comparison(batch, dim, dtype, scale, mode, options.world, options.threads, options.device)
        for dim, dtype, mode, scale, batch in itertools.product(
            options.dim, options.dtype, options.mode, options.scale, batches
        )
    ]
    return runner.Plan(
        comparisons,
        options.impl,
        options.schedule or ["auto"],
        options.matmul_precision,
        options.rounds,
        options.repeats,
        options.timeout,
        command,
    )


def _check(options: argparse.Namespace) -> None:
    """What argparse cannot see in one option alone."""
    for batch in options.batch or []:
        if batch % options.world:
            raise ValueError(f"argument --batch: {batch} pairs cannot be split evenly over --world {options.world}")
    if options.schedule and options.world == 1:
        raise ValueError("argument --schedule: there is no schedule on one rank: give --world 2 or more")
    if options.from_csv and not options.plot:
        raise ValueError("argument --from-csv: give --plot PATH to say where to draw")
    if options.from_csv and not options.from_csv.exists():
        raise ValueError(f"argument --from-csv: {options.from_csv} does not exist")
    if options.fit and options.batch and len(set(options.batch)) < 3:
        raise ValueError(f"argument --fit: needs three batch sizes to fit, --batch gives {len(set(options.batch))}")
    names = [label_of(impl) for impl in options.impl]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"argument --impl: {', '.join(doubled)} is the name of two losses: rows could not be told apart")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench_loss.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = parser.add_argument_group("what is measured (lists are separated by commas)")
    sizes.add_argument(
        "--impl",
        type=list_of(_impl),
        default=["panels", "open_clip"],
        metavar="NAMES",
        help=f"of {', '.join(REGISTRY)}, or name=module:function[:sigmoid] (default: panels,open_clip)",
    )
    sizes.add_argument("--batch", type=list_of(positive), metavar="NUMBERS", help="pairs over all ranks (default: 8192)")
    sizes.add_argument("--dim", type=list_of(positive), default=[512], metavar="NUMBERS", help="feature dims (default: 512)")
    sizes.add_argument("--dtype", type=list_of(one_of(*DTYPE_BYTES)), default=["fp32"], help="fp32, bf16, fp16 (default: fp32)")
    sizes.add_argument("--scale", type=list_of(_scale), default=[14.3], metavar="NUMBERS", help="logit scales (default: 14.3)")
    sizes.add_argument(
        "--mode",
        type=list_of(one_of("forward", "full")),
        default=["full"],
        help="full: loss and gradients; forward: the loss alone, without autograd (default: full)",
    )
    sizes.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    sizes.add_argument("--threads", type=positive, default=2, help="of each process or rank (default: 2)")
    sizes.add_argument(
        "--matmul-precision",
        type=list_of(one_of("highest", "high", "medium")),
        default=["highest"],
        help="torch.set_float32_matmul_precision, the same for all that is compared; peers also run at their other settings, "
        "of which the fastest is marked (default: highest)",
    )
    ranks = parser.add_argument_group("over ranks on this machine (gloo, or nccl with --device cuda)")
    ranks.add_argument("--world", type=positive, default=1, help="ranks (default: 1)")
    ranks.add_argument(
        "--schedule", type=list_of(one_of("auto", "ring", "gather")), metavar="NAMES", help="of our losses (default: auto)"
    )
    effort = parser.add_argument_group("effort")
    effort.add_argument("--rounds", type=positive, default=3, help="times that every implementation gets its turn (default: 3)")
    effort.add_argument("--repeats", type=positive, default=3, help="timed iterations a turn, after one warm-up (default: 3)")
    effort.add_argument("--timeout", type=seconds, default=900, metavar="SECONDS", help="for one process (default: 900)")
    output = parser.add_argument_group("where it goes, beside the table")
    output.add_argument(
        "--csv", type=file_with(".csv"), metavar="PATH", help="a row a point; measuring a point again replaces its row"
    )
    output.add_argument("--json", type=file_with(".json"), metavar="PATH", help="the same as JSON")
    output.add_argument(
        "--plot", type=file_with(".png", ".pdf", ".svg"), metavar="PATH", help="time and memory against the batch"
    )
    instead = parser.add_argument_group("instead of timing").add_mutually_exclusive_group()
    instead.add_argument("--from-csv", type=Path, metavar="PATH", help="only draw --plot, from a .csv or .json of earlier runs")
    instead.add_argument(
        "--fit", type=_memory, metavar="80GiB", help="the largest batch in this much memory a rank, from a fit"
    )
    instead.add_argument(
        "--profile", type=Path, metavar="FOLDER", help="a torch.profiler trace of one step of each, for Perfetto"
    )
    instead.add_argument("--estimate", choices=list(estimate.CHIPS), help="roofline arithmetic for a GPU, nothing measured")
    return parser


_scale = checked(float, lambda value: 0 < value < float("inf"), "a finite number above 0")


def _impl(text: str) -> str:
    try:
        find(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _memory(text: str) -> int:
    found = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]+)", text)
    if found is None or found[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 80GiB (units: {', '.join(UNITS)})")
    return int(float(found[1]) * UNITS[found[2]])


if __name__ == "__main__":
    sys.exit(main())
