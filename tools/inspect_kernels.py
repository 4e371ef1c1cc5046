"""Machine code of every Triton kernel, compiled ahead of time: no GPU is needed, nothing is fetched.

python tools/inspect_kernels.py                                            every kernel on every architecture
python tools/inspect_kernels.py --architecture sm90 --kernel softmax_sums  some of them
python tools/inspect_kernels.py --check                                    the gate of CI
python tools/inspect_kernels.py --csv tools/results/kernels_aot.csv        record what --check compares with
python tools/inspect_kernels.py --peer inf_cl                              beside Inf-CL's kernels
python tools/inspect_kernels.py --markdown                                 the record as a table of kernels/README.md

What is compiled is what a run launches: the rows of kernels/scaleclip_kernels/launches.csv, or, where an architecture has no
row for a kernel, those for other architectures, marked (other). Exit codes: 0, 1 where --check finds a fault, 2 for bad
arguments.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)  # jit functions bind when they are imported

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kernel_inspection import baseline, fold, gate, markdown, peer_inf_cl, pool, tables
from kernel_inspection.compiled import Report, Resources, inspect
from kernel_inspection.variants import Variant, variants
from scaleclip_kernels.tuning import ARCHITECTURES, KERNELS

Task = TypeVar("Task")
Result = TypeVar("Result")
KERNEL_NAMES = (*KERNELS, fold.KERNEL)
BASELINE = Path(__file__).parent / "results" / "kernels_aot.csv"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    recorded: Mapping[baseline.VariantKey, baseline.Row] = {}
    try:
        _check(options)
        if options.check or options.markdown:
            recorded = baseline.read(options.baseline)
    except ValueError as error:
        parser.error(str(error))
    if options.markdown:
        print(markdown.table(recorded.values()))
        return 0
    # brackets in a message are no markup
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 240)
    return _compare(options, console) if options.peer else _inspect(options, recorded, console)


def _inspect(options: argparse.Namespace, recorded: Mapping[baseline.VariantKey, baseline.Row], console: Console) -> int:
    chosen = [v for name in options.architecture for v in variants(name) if v.kernel in options.kernel]
    num_sums = fold.NUM_SUMS if fold.KERNEL in options.kernel else ()
    folds = [fold.Fold(name, number) for name, number in itertools.product(options.architecture, num_sums)]
    found = _compiled("kernels", inspect, chosen, options)
    folds_found = _compiled("fold_sums", fold.inspect_fold, folds, options)
    for name in options.architecture:
        of_name = {variant: report for variant, report in found.items() if variant.architecture == name}
        console.print(tables.of_variants(name, of_name)) if of_name else None
    console.print(tables.of_folds(folds_found)) if folds_found else None
    if options.check:
        code = _gate(found, folds_found, recorded, console)
    else:
        code = 0
        _say_failures({**found, **folds_found}, console)
    if options.csv:
        rows = baseline.rows(report for report in found.values() if isinstance(report, Report))
        baseline.write(options.csv, rows, set(itertools.product(options.architecture, options.kernel)))
        console.print(f"{len(rows)} rows in {options.csv}", soft_wrap=True)
    return code


def _gate(
    found: Mapping[Variant, Report | pool.Failure],
    folds: Mapping[fold.Fold, Resources | pool.Failure],
    recorded: Mapping[baseline.VariantKey, baseline.Row],
    console: Console,
) -> int:
    faults = [
        f"{variant.name}: {fault}"
        for variant, report in found.items()
        for fault in gate.variant_faults(variant, report, recorded.get(baseline.VariantKey.of(variant)))
    ]
    faults += [
        f"{one.name}: {fault}"
        for one, resources in folds.items()
        for fault in gate.resource_faults(one.architecture, resources)
    ]
    for fault in faults:
        console.print(f"FAULT {fault}", soft_wrap=True)
    console.print(f"gate: {len(faults)} faults in {len(found) + len(folds)} kernels" if faults else "gate: passed")
    return 1 if faults else 0


def _compare(options: argparse.Namespace, console: Console) -> int:
    theirs = [peer_inf_cl.PeerKernel(*both) for both in itertools.product(options.architecture, peer_inf_cl.KERNELS)]
    ours = [v for name in options.architecture for v in variants(name) if v.options == "plain" and v.kernel in options.kernel]
    found = _compiled("ours", inspect, ours, options)
    peers_found = _compiled("inf_cl", peer_inf_cl.inspect_peer, theirs, options)
    for name in options.architecture:
        of_name = {variant: report for variant, report in found.items() if variant.architecture == name}
        of_peer = {peer: resources for peer, resources in peers_found.items() if peer.architecture == name}
        console.print(tables.beside_inf_cl(name, of_name, of_peer))
    _say_failures({**found, **peers_found}, console)
    return 0


def _compiled(
    title: str, work: Callable[..., Result], tasks: Sequence[Task], options: argparse.Namespace
) -> dict[Task, Result | pool.Failure]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task(title, total=len(tasks))
        found = pool.work_on(functools.partial(work, dump=options.dump), tasks, options.jobs, lambda: progress.advance(bar))
    return dict(zip(tasks, found, strict=True))


def _say_failures(found: Mapping[Any, object], console: Console) -> None:
    for task, result in found.items():
        if isinstance(result, pool.Failure):
            console.print(f"{task.name} does not compile: {result.reason}", soft_wrap=True)


def _check(options: argparse.Namespace) -> None:
    """What argparse cannot see in one option alone."""
    if (options.check or options.csv) and (options.peer or options.markdown):
        raise ValueError("argument --peer or --markdown: neither is checked or recorded: leave out --check and --csv")
    if options.peer and not peer_inf_cl.is_installed():
        raise ValueError(f"argument --peer: the package of {options.peer} is not installed: pip install inf-cl")
    if (options.check or options.markdown) and not options.baseline.exists():
        command = f"python tools/inspect_kernels.py --csv {options.baseline}"
        raise ValueError(f"argument --baseline: there is no {options.baseline}: write it with {command}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="inspect_kernels.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_argument_group("what is compiled (lists are separated by commas)")
    which.add_argument(
        "--architecture", type=_list(ARCHITECTURES), default=list(ARCHITECTURES), metavar="NAMES",
        help=f"of {', '.join(ARCHITECTURES)} (default: all)",
    )  # fmt: skip
    which.add_argument(
        "--kernel", type=_list(KERNEL_NAMES), default=list(KERNEL_NAMES), metavar="NAMES",
        help=f"of {', '.join(KERNEL_NAMES)} (default: all)",
    )  # fmt: skip
    which.add_argument("--jobs", type=_positive, default=os.cpu_count(), metavar="NUMBER",
        help="compilations at once (default: the processors, %(default)s)",
    )  # fmt: skip
    output = parser.add_argument_group("what is done with it, beside the tables")
    output.add_argument(
        "--check",
        action="store_true",
        help="exit with 1, a line a fault, where a kernel spills, does not fit, multiplies with other instructions than it "
        f"should, exceeds a bound, or has an epilogue ratio more than {(gate.GROWTH - 1) * 100:.0f} %% above the baseline's",
    )
    output.add_argument(
        "--baseline", type=Path, default=BASELINE, metavar="PATH", help="of --check and --markdown (default: %(default)s)"
    )
    output.add_argument(
        "--csv", type=_csv, metavar="PATH", help="a row a variant; rows of what is inspected again are replaced"
    )
    output.add_argument("--dump", type=Path, metavar="FOLDER", help="all that the compiler leaves: IR, assembly, machine code")
    instead = parser.add_argument_group("instead").add_mutually_exclusive_group()
    instead.add_argument("--peer", choices=["inf_cl"], help="the resources of a peer's kernels beside ours")
    instead.add_argument("--markdown", action="store_true", help="the baseline as kernels/README.md shows it, nothing compiled")
    return parser


def _list(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(word.strip() for word in text.split(",")))
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(allowed)}")
        return names

    return parse


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _csv(text: str) -> Path:
    if not text.endswith(".csv"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a path that ends in .csv")
    return Path(text)


if __name__ == "__main__":
    sys.exit(main())
