"""Chooses how each Triton kernel is launched and writes kernels/scaleclip_kernels/launches.csv.

python tools/tune_kernels.py --by machine-code --architecture sm90    compiled ahead of time, no GPU needed
python tools/tune_kernels.py --by time                                measured, on the GPU that is here

By machine code: of the launches without spills whose tiles fit, the one with the fewest estimated cycles a logit (the formula
is printed). By time: of those without spills that agree with the panels, the one with the least median time of the GPU. The
rows of what was chosen are replaced, and those for all other architectures; those chosen by time give way to machine code only
where --architecture names theirs. Without --write the choice is only printed.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)  # jit functions bind when they are imported

import argparse
import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields, replace
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

import scaleclip_kernels
from kernel_inspection.chips import CHIPS
from kernel_inspection.compiled import Report, inspect
from kernel_inspection.timing import fault_of, time_launch
from kernel_inspection.variants import DIM, Dtype, Options, Variant
from scaleclip_kernels.tuning import ARCHITECTURES, KERNELS, OTHER, PRODUCTS, Kernel, Key, Launch, Products, architecture

PATH = Path(scaleclip_kernels.__file__).parent / "launches.csv"
KEY_FIELDS = Key._fields
LAUNCH_FIELDS = tuple(field.name for field in fields(Launch))
CHOSEN_BY = "chosen_by"
BY_MACHINE_CODE, BY_TIME = "machine code", "time"

# Rows, columns and warps of a tile. A warp's share of more than 128 x 128 / 4 logits does not fit its registers.
TILES_16_BITS = ((128, 256, 8), (256, 128, 8), (128, 128, 4), (128, 128, 8), (64, 128, 4), (128, 64, 4), (64, 64, 4))
TILES_FP32 = ((128, 128, 8), (64, 128, 4), (128, 64, 4), (64, 64, 4), (64, 64, 8))
# For every architecture that is not in the table, and for rows that are not aligned: no kernel needs 48 KiB of shared memory
# or spills on any that is. The sums of fp32 features would, in longer steps.
OTHER_LAUNCH = Launch(64, 64, 32, num_warps=4, num_stages=2, tma=False)
OTHER_FP32_SUMS = replace(OTHER_LAUNCH, block_dim=16)
GROUPS = (8, 64)
"""Tried by time."""
L2_BYTES_A_CYCLE = 32
"""From the second-level cache to one multiprocessor, all of them at work: an assumption, half of what its port is wide."""
FORMULA = (
    f"max(main, rest) + min(main, rest) / blocks on a multiprocessor, for a tile at D = {DIM}: main = max(matrix units, issue "
    f"of the main loop, {L2_BYTES_A_CYCLE} bytes of features a cycle), rest = the busiest pipe beside the main loop"
)


def candidates(architecture: str, products: Products, groups: Sequence[int] = (8,)) -> Iterator[Launch]:
    """Launches worth a try. Groups differ in what the second-level cache holds, which machine code does not show."""
    is_nvidia = architecture.startswith("sm")
    has_tma = is_nvidia and int(architecture[2:]) >= 90
    dims = (16, 32) if products == "tf32x3" else (32,) if products == "ieee" else (64,) if has_tma else (32, 64)
    for rows, columns, warps in TILES_16_BITS if products == "16 bits" else TILES_FP32:
        for block_dim in dims:
            for stages in (3, 4) if is_nvidia else (2,):
                # the FMA units read shared memory as TMA lays it out with an address calculation an element
                tma = has_tma and products != "ieee"
                for group in groups:
                    yield Launch(rows, columns, block_dim, warps, stages, tma, group)


def spellings(products: Products, kernel: Kernel, positives: bool) -> Sequence[Options]:
    """Options whose code a launch must fit; the first is the one that counts."""
    if positives:
        return ("positive",)
    if products != "16 bits":
        return ("plain",)
    return ("plain", "ignore") if kernel == "sigmoid" else ("plain", "ignore", "one way")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--by", choices=("machine-code", "time"), required=True, help="an estimate, or a measurement")
    parser.add_argument("--architecture", help=f"by machine code: which (default: {','.join(ARCHITECTURES)})")
    parser.add_argument("--kernel", default=",".join(KERNELS), help="which (default: %(default)s)")
    parser.add_argument("--products", default=",".join(PRODUCTS), help="of what features (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16_384, help="by time: pairs (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at once (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="replace the rows of launches.csv")
    options = parser.parse_args(arguments)
    for name in ("jobs", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} must be at least 1")
    architectures = options.architecture.split(",") if options.architecture else list(ARCHITECTURES)
    for name, values, allowed in (
        ("architecture", architectures, ARCHITECTURES),
        ("kernel", options.kernel.split(","), KERNELS),
        ("products", options.products.split(","), PRODUCTS),
    ):
        for value in values:
            if value not in allowed:
                parser.error(f"--{name} {value} is not one of {', '.join(allowed)}")
    console = Console(width=None if sys.stdout.isatty() else 200)
    if options.by == "time":
        import torch

        if not torch.cuda.is_available():
            parser.error("--by time needs a GPU, and torch finds none; --by machine-code needs none")
        device = torch.device("cuda")
        chosen_by = f"{BY_TIME} on {torch.cuda.get_device_name()}, torch {torch.__version__}, N = {options.batch}, D = {DIM}"
        architectures = [architecture(device)]
    else:
        chosen_by = BY_MACHINE_CODE
    console.print(FORMULA, markup=False) if options.by == "machine-code" else None
    keys = [
        Key(OTHER, kernel, products, positives) for kernel in KERNELS for products in PRODUCTS for positives in (False, True)
    ]
    rows = {}
    for key in keys:
        is_long = key.kernel == "softmax_sums" and key.products != "16 bits"
        rows[key] = OTHER_FP32_SUMS if is_long else OTHER_LAUNCH, "what fits everywhere"
    chosen = [
        key._replace(architecture=name)
        for name in architectures
        for key in keys
        # Triton has no products in three TF32 parts on AMD
        if key.products != "tf32x3" or name.startswith("sm")
        if key.kernel in options.kernel.split(",") and key.products in options.products.split(",")
    ]
    faults = _faults(console, chosen, options.jobs) if options.by == "time" else {}
    for key in chosen:
        found = _by_time(console, key, options.batch, faults) if faults else _by_code(console, key, options.jobs)
        if found is not None:
            rows[key] = found, chosen_by
    if options.write:
        _write(rows, keep_timed=options.by == "machine-code" and not options.architecture)
        console.print(f"{len(rows)} rows of {PATH.name} replaced")
    return 0


def estimated_cycles(report: Report) -> float:
    """A logit, by FORMULA."""
    launch = report.variant.launch
    feature_bytes = (launch.block_rows + launch.block_columns) * DIM * (4 if report.variant.dtype == "fp32" else 2)
    main_cycles = max(report.matrix_cycles, report.loop_cycles, feature_bytes / L2_BYTES_A_CYCLE)
    rest = report.pipe_cycles[report.busiest_pipe]
    overlapped = max(main_cycles, rest) + min(main_cycles, rest) / report.blocks
    return overlapped / (launch.block_rows * launch.block_columns)


def _by_code(console: Console, key: Key, jobs: int) -> Launch | None:
    tried = [_variants(key, launch) for launch in candidates(key.architecture, key.products)]
    with ProcessPoolExecutor(jobs) as pool:
        work = pool.map(_inspect_all, tried)
        results = list(track(work, f"{key}", total=len(tried), console=console, transient=True))
    table = Table(
        "launch", "registers", "spills", "shared KiB", "blocks", "cycles a logit", title=str(key), title_justify="left"
    )
    best: tuple[float, Launch] | None = None
    for variants, reports in zip(tried, results, strict=True):
        launch = variants[0].launch
        if isinstance(reports, str):
            table.add_row(_shown(launch), reports)
            continue
        spills = max(report.spills + report.stack_bytes for report in reports)
        shared = max(report.shared_bytes for report in reports)
        fits = _fits(reports)
        cycles = estimated_cycles(reports[0]) if fits else float("inf")
        first = reports[0]
        table.add_row(_shown(launch), str(first.registers), str(spills), str(shared >> 10), str(first.blocks), f"{cycles:.4f}")
        if fits and spills == 0 and (best is None or cycles < best[0]):
            best = cycles, launch
    console.print(table)
    console.print(f"  -> {'none without spills' if best is None else _shown(best[1])}")
    return None if best is None else best[1]


def _variants(key: Key, launch: Launch) -> list[Variant]:
    """What a launch must fit; the first is the one that counts."""
    dtype: Dtype = "bf16" if key.products == "16 bits" else "fp32"
    return [
        Variant(key.architecture, key.kernel, dtype, key.products, options, launch)
        for options in spellings(key.products, key.kernel, key.positives)
    ]


def _fits(reports: Sequence[Report]) -> bool:
    chip = CHIPS[reports[0].variant.architecture]
    return all(report.shared_bytes <= chip.shared_bytes for report in reports)


def _inspect_all(variants: Sequence[Variant]) -> list[Report] | str:
    try:
        return [inspect(variant) for variant in variants]
    except Exception as error:
        return f"does not compile: {type(error).__name__}"


def _faults(console: Console, keys: Sequence[Key], jobs: int) -> dict[tuple[Key, Launch], str]:
    """What is wrong with each launch, empty where nothing is; all are compiled, side by side in processes of their own."""
    tried = [(key, launch) for key in keys for launch in candidates(key.architecture, key.products, GROUPS)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        work = pool.map(fault_of, *zip(*tried, strict=True))
        return dict(zip(tried, track(work, "compiled and checked", total=len(tried), console=console), strict=True))


def _by_time(console: Console, key: Key, batch: int, faults: Mapping[tuple[Key, Launch], str]) -> Launch | None:
    """The fastest that spills with none of the options in bf16 or fp32."""
    table = Table("launch", "ms", title=str(key), title_justify="left")
    timed = []
    for launch in candidates(key.architecture, key.products, GROUPS):
        fault = faults[key, launch]
        if not fault:
            try:
                timed.append((time_launch(key, launch, batch), launch))
            except RuntimeError as error:  # memory that is not there among them: what was chosen so far is kept
                fault = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        table.add_row(_shown(launch), fault or f"{timed[-1][0]:.3f}")
    console.print(table)
    for milliseconds, launch in sorted(timed, key=lambda each: each[0]):
        reason = _spills(key, launch)
        if not reason:
            console.print(f"  -> {_shown(launch)}: {milliseconds:.3f} ms")
            return launch
        console.print(f"  {_shown(launch)}: {milliseconds:.3f} ms, but {reason}", markup=False)
    return None


def _spills(key: Key, launch: Launch) -> str:
    """With which options; empty: with none, or of a chip whose machine code is not read here."""
    if key.architecture not in CHIPS:
        return ""
    reports = _inspect_all(_variants(key, launch))
    if isinstance(reports, str):
        return reports
    found = [report.variant.options for report in reports if report.spills + report.stack_bytes or not _fits([report])]
    return f"spills with the options {', '.join(found)}" if found else ""


def _shown(launch: Launch) -> str:
    path = "TMA" if launch.tma else "pointers"
    tile = f"{launch.block_rows} x {launch.block_columns} x {launch.block_dim}"
    return f"{tile}, {launch.num_warps} warps, {launch.num_stages} stages, {path}, groups of {launch.group}"


def _write(rows: Mapping[Key, tuple[Launch, str]], *, keep_timed: bool) -> None:
    """Put rows in the place of those with the same key; every other row stays as it is, and so do measured ones if wanted."""
    kept: dict[tuple[str, ...], dict[str, str]] = {}
    if PATH.exists():
        with PATH.open(newline="") as file:
            kept = {tuple(row[name] for name in KEY_FIELDS): row for row in csv.DictReader(file)}
    for key, (launch, chosen_by) in rows.items():
        values = {**key._asdict(), **asdict(launch), CHOSEN_BY: chosen_by}
        row = {
            name: {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value) for name, value in values.items()
        }
        place = tuple(row[name] for name in KEY_FIELDS)
        if not (keep_timed and place in kept and kept[place][CHOSEN_BY].startswith(BY_TIME)):
            kept[place] = row
    listed = sorted(kept.values(), key=_place)
    with PATH.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*KEY_FIELDS, *LAUNCH_FIELDS, CHOSEN_BY], lineterminator="\n")
        writer.writeheader()
        writer.writerows(listed)


def _place(row: dict[str, str]) -> tuple[int, int, int, str]:
    """In the order of the table; an architecture that is new comes before the row for all others."""
    known = ARCHITECTURES.index(row["architecture"]) if row["architecture"] in ARCHITECTURES else len(ARCHITECTURES)
    known += row["architecture"] == OTHER
    return known, KERNELS.index(row["kernel"]), PRODUCTS.index(row["products"]), row["positives"]


if __name__ == "__main__":
    sys.exit(main())
