"""Roofline arithmetic for GPUs: every term of a step named, nothing measured.

One step of the softmax loss, forward and backward, on one of W ranks: n = N / W rows against N columns of D bf16 features.
Peak rates are the vendors' data sheets (dense bf16 without sparsity): NVIDIA A100, H100, H200 and HGX B200, SXM versions.
What share of a peak is reached, and the latencies, are typical figures; they are printed with the result.
"""

import csv
import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loss_bench.formulas import sent_bytes
from loss_bench.points import DTYPE_BYTES

BATCHES = (32_768, 131_072, 1_048_576)
LAYOUTS = ((1, "alone"), (8, "ring"), (8, "gather"), (64, "ring"), (64, "gather"), (256, "ring"), (256, "gather"))
"""Ranks and schedule."""


@dataclass(frozen=True)
class Chip:
    """Data-sheet rates."""

    architecture: str
    bf16_flop_per_s: float
    memory_bytes_per_s: float
    num_multiprocessors: int
    clock_hz: float
    """At which the peak above is stated."""
    node_bytes_per_s: float
    """NVLink, one direction."""
    network_bytes_per_s: float
    """Network card of one GPU in the vendor's server, one direction."""


CHIPS = {
    "a100": Chip("sm80", 312e12, 2.04e12, 108, 1.41e9, 300e9, 25e9),
    "h100": Chip("sm90", 989e12, 3.35e12, 132, 1.83e9, 450e9, 50e9),
    "h200": Chip("sm90", 989e12, 4.8e12, 132, 1.83e9, 450e9, 50e9),
    "b200": Chip("sm100", 2250e12, 8e12, 148, 1.85e9, 900e9, 50e9),
}

RANKS_PER_NODE = 8
MATMUL_SHARE, MEMORY_SHARE, LINK_SHARE = 0.8, 0.9, 0.8
NODE_HOP_S, NETWORK_HOP_S = 10e-6, 25e-6
LANES = 128  # a multiprocessor: four schedulers of 32 threads
THREADS_A_WARP = 32
PANEL_ROWS, PANEL_COLUMNS = 8192, 16_384
"""Of a panel of gradients, in the Triton kernels' launches."""
MACHINE_CODE = Path(__file__).parents[1] / "results" / "kernels_aot.csv"
CHUNK_BYTES = 64 << 20
FEATURE_BYTES = DTYPE_BYTES["bf16"]


@dataclass(frozen=True)
class Term:
    """A part of a step, and the resource that it takes."""

    phase: str
    name: str
    resource: str
    formula: str
    seconds: float


def terms(chip: Chip, batch: int, dim: int, world: int, schedule: str) -> list[Term]:
    """Every part of one rank's step."""
    pairs, rows = batch / world * batch, batch / world
    matmul_rate = MATMUL_SHARE * chip.bf16_flop_per_s
    issue_rate = chip.num_multiprocessors * LANES * chip.clock_hz
    memory_rate = MEMORY_SHARE * chip.memory_bytes_per_s
    features = (rows + batch) * dim * FEATURE_BYTES
    forward, backward = (epilogue(chip.architecture, kernel) for kernel in ("softmax_sums", "softmax_gradients"))
    # a reference and a sum in fp32, written and read
    parts = f"1 / {forward.tile_rows} + 1 / {forward.tile_columns}"
    partials = 2 * 8 * pairs * (1 / forward.tile_rows + 1 / forward.tile_columns)
    panels = f"1 / {PANEL_ROWS} + 1 / {PANEL_COLUMNS}"
    accumulation = 2 * 4 * pairs * dim * (1 / PANEL_ROWS + 1 / PANEL_COLUMNS)
    local = [
        Term("forward", "logits", _TENSOR, "2 n N D", 2 * pairs * dim / matmul_rate),
        Term("forward", "epilogue", _ISSUE, f"{forward.instructions:.1f} n N", forward.instructions * pairs / issue_rate),
        Term("forward", "features read", _MEMORY, "2 (n + N) D B", features / memory_rate),
        Term("forward", "partial sums written, read", _MEMORY, f"16 n N ({parts}) B", partials / memory_rate),
        Term("backward", "logits again", _TENSOR, "2 n N D", 2 * pairs * dim / matmul_rate),
        Term("backward", "dX and dY", _TENSOR, "4 n N D", 4 * pairs * dim / matmul_rate),
        Term("backward", "epilogue", _ISSUE, f"{backward.instructions:.1f} n N", backward.instructions * pairs / issue_rate),
        Term("backward", "features read", _MEMORY, "2 (n + N) D B", features / memory_rate),
        Term("backward", "gradient panel written, read twice", _MEMORY, "6 n N B", 6 * pairs / memory_rate),
        Term("backward", "dX, dY accumulated in fp32", _MEMORY, f"8 n N D ({panels}) B", accumulation / memory_rate),
    ]
    return local if world == 1 else [*local, *_transfers(chip, batch, dim, world, schedule)]


@dataclass(frozen=True)
class Epilogue:
    """Of a kernel's tile, beside its products."""

    instructions: float
    """A logit."""
    tile_rows: int
    tile_columns: int


@functools.cache
def epilogue(architecture: str, kernel: str) -> Epilogue:
    """As `tools/inspect_kernels.py` recorded it, for bf16 features and no options."""
    with MACHINE_CODE.open(newline="") as file:
        wanted = {"architecture": architecture, "kernel": kernel, "dtype": "bf16", "options": "plain"}
        (row,) = (row for row in csv.DictReader(file) if wanted.items() <= row.items())
    tile_rows, tile_columns = int(row["block_rows"]), int(row["block_columns"])
    instructions = int(row["path_instructions"]) * int(row["num_warps"]) * THREADS_A_WARP
    return Epilogue(instructions / (tile_rows * tile_columns), tile_rows, tile_columns)


_TENSOR, _ISSUE, _MEMORY, _LINK = "tensor cores", "instruction issue", "HBM", "link"


def _transfers(chip: Chip, batch: int, dim: int, world: int, schedule: str) -> list[Term]:
    is_one_node = world <= RANKS_PER_NODE
    link_rate = LINK_SHARE * (chip.node_bytes_per_s if is_one_node else chip.network_bytes_per_s)
    hop_s = NODE_HOP_S if is_one_node else NETWORK_HOP_S
    columns = math.ceil(batch / world)
    forward, step = (sent_bytes("softmax", schedule, world, columns, dim, FEATURE_BYTES, mode) for mode in ("forward", "full"))
    # A ring's hops follow one another. A collective takes log2(W) of them, and each chunk of gathered columns has its own:
    # features, validity and sums forward; features, validity, log-sum-exps and gradients backward.
    num_chunks = math.ceil(batch * dim * FEATURE_BYTES / CHUNK_BYTES)
    collectives = num_chunks * math.log2(world)
    if schedule == "ring":
        sent = "sent around the ring", ("n ((2 D + 1) (W - 1) + 8 W) B", "n ((2 D + 5) (W - 1) + 4 D W) B")
        waits = "latency of hops", (("W", float(world)), ("W", float(world)))
    else:
        sent = "sent by collectives", ("n (2 D + 9) (W - 1) B", "n (6 D + 5) (W - 1) B")
        waits = "latency of collectives", (("3 C log2 W", 3 * collectives), ("4 C log2 W", 4 * collectives))
    parts = []
    for phase, formula, num_bytes, (hops_formula, num_hops) in zip(
        ("forward", "backward"), sent[1], (forward, step - forward), waits[1], strict=True
    ):
        parts.append(Term(phase, sent[0], _LINK, formula, num_bytes / link_rate))
        parts.append(Term(phase, waits[0], _LINK, f"{hops_formula} hops", num_hops * hop_s))
    return parts


def by_resource(parts: Sequence[Term]) -> dict[str, float]:
    """Seconds that each resource is busy."""
    busy: dict[str, float] = defaultdict(float)
    for term in parts:
        busy[term.resource] += term.seconds
    return dict(busy)


def show(console: Console, name: str, batch: int, dim: int) -> None:
    """Print the terms, a column a number of ranks and schedule."""
    chip = CHIPS[name]
    estimates = [terms(chip, batch, dim, *layout) for layout in LAYOUTS]
    table = Table(
        title=f"ESTIMATE, not measured: {name}, N = {batch:,}, D = {dim}, bf16, ms on one of W ranks", title_justify="left"
    )
    for column in ("phase", "term", "takes", "formula"):
        table.add_column(column, no_wrap=True)
    for world, schedule in LAYOUTS:
        table.add_column(f"W = {world}\n{schedule}", justify="right")
    by_name = [{(term.phase, term.name): term for term in parts} for parts in estimates]
    for key in dict.fromkeys(key for named in by_name for key in named):
        there = next(named[key] for named in by_name if key in named)
        table.add_row(
            *key, there.resource, there.formula, *(_ms(named[key].seconds if key in named else None) for named in by_name)
        )
    table.add_section()
    sums = [sum(term.seconds for term in parts) for parts in estimates]
    table.add_row("both", "nothing overlapped", "", "sum of all terms", *map(_ms, sums), style="bold")
    busiest = [max(by_resource(parts).items(), key=lambda item: item[1]) for parts in estimates]
    table.add_row("both", "all overlapped", "", "busiest resource", *(_ms(s) for _, s in busiest), style="bold")
    table.add_row("", "bound by", "", "", *(resource for resource, _ in busiest))
    table.caption = _assumptions(chip)
    table.caption_justify = "left"
    console.print(table)


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3g}"


def _assumptions(chip: Chip) -> str:
    tera, giga = 1e12, 1e9
    shares = f"{MATMUL_SHARE:.0%} of the matrix peak, {MEMORY_SHARE:.0%} of HBM's, {LINK_SHARE:.0%} of the links'"
    return (
        f"Data sheet: {chip.bf16_flop_per_s / tera:g} TFLOP/s dense bf16, {chip.memory_bytes_per_s / tera:g} TB/s, "
        f"{chip.num_multiprocessors} multiprocessors at {chip.clock_hz / giga:g} GHz, "
        f"NVLink {chip.node_bytes_per_s / giga:g} GB/s and network {chip.network_bytes_per_s / giga:g} GB/s one way.\n"
        f"Taken for granted: {shares}; NVLink up to {RANKS_PER_NODE} ranks, the network beyond; "
        f"{NODE_HOP_S * 1e6:g} or {NETWORK_HOP_S * 1e6:g} us a hop.\n"
        f"n = N / W rows on a rank, C chunks of {CHUNK_BYTES >> 20} MiB. Instructions: counted in the Triton kernels "
        f"compiled for {chip.architecture} (tools/results/{MACHINE_CODE.name}), {LANES} an issue cycle and multiprocessor.\n"
        "A step lies between the two totals. Nothing here was measured."
    )
