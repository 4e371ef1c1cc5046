"""What a run found, for the terminal."""

from collections.abc import Sequence

from rich.table import Table

from train_bench.points import BACKWARD, DATA, FIRST_PASS, FORWARD, LOSS, OURS, PARTS, STEP
from train_bench.records import (
    ADDED,
    BEST_RATIO,
    BOUND,
    CPU_RATIO,
    DIFFERENCE,
    MATCHED,
    ONE_PASS,
    PEAK,
    PER_CPU_S,
    RATE,
    RATIO,
    STEP_MS,
    Row,
    points,
)

_LIMITS = {
    "data": (DATA,),
    "towers": (FIRST_PASS, FORWARD, BACKWARD),
    "loss": (LOSS,),
    "optimizer": (STEP,),
}


def peers(rows: Sequence[Row]) -> Table:
    """Both trainers, setting by setting."""
    first = rows[0]
    made = Table(
        title=f"{first.towers} ({first.parameters:,} parameters), batch {first.global_batch}, {first.precision}, "
        f"{first.threads} threads, from {first.source}, {first.workers} loader processes",
        title_justify="left",
        caption="pairs/s: median (p20 - p80) of the rounds. x peer: round by round, at the same setting, of wall and of "
        "processor time, and of wall time at the peer's best setting. Shares are of a step's wall time: the host's.",
        caption_justify="left",
    )
    for name in ("trainer", "setting"):
        made.add_column(name, no_wrap=True)
    shares = (DATA, FORWARD, LOSS, BACKWARD, STEP, "outside")
    for name in ("pairs/s", "a CPU-second", "x peer", "CPU x peer", "x peer's best", "ms a step", *shares):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("limited by")
    on_gpu = any(PEAK in point for point in points(rows))
    if on_gpu:
        made.add_column("GPU MiB", justify="right")
    for point in points(rows):
        row = point[RATE]
        made.add_row(
            row.trainer,
            row.setting,
            _spread(row, 1),
            _spread(point[PER_CPU_S], 1),
            *(_spread(point[metric], 3) if row.trainer == OURS else "" for metric in (RATIO, CPU_RATIO, BEST_RATIO)),
            # a GPU's host runs ahead of it: its steps are the rate's
            f"{1e3 * row.global_batch / row.p50 if on_gpu else point[STEP_MS].p50:,.0f}",
            *(f"{_share(point, part):.1%}" for part in shares),
            # where the host's time goes says nothing of what a GPU waits for
            "" if on_gpu else _limit(point),
            *([f"{point[PEAK].p50:,.0f}"] if on_gpu else []),
        )
    return made


def batch(rows: Sequence[Row]) -> Table:
    """Whole batches and micro batches, over ranks."""
    made = Table(
        title=f"{rows[0].towers} ({rows[0].parameters:,} parameters), ZeRO-{rows[0].stage}, synthetic labelled pairs",
        title_justify="left",
        caption="over bound: the peak over 1.3 x (the peak of a step on one micro batch a rank + the features of a rank). "
        "difference: of the first two losses, to those on the first number of ranks.",
        caption_justify="left",
    )
    for name in (
        "ranks",
        "global batch",
        "micro batch",
        "pairs/s",
        "added MiB",
        "over bound",
        "losses",
        "difference",
        "matched",
    ):
        made.add_column(name, justify="right")
    for point in points(rows):
        row = next(iter(point.values()))
        losses = [f"{each.p50:.4f} ({metric.split()[-1]})" for metric, each in point.items() if metric.startswith("loss at")]
        made.add_row(
            str(row.world),
            f"{row.global_batch:,}",
            f"{row.micro_batch:,}",
            f"{point[RATE].p50:,.0f}" if RATE in point else "",
            f"{point[ADDED].p50:,.1f}" if ADDED in point else "",
            f"{point[BOUND].p50:.3f}" if BOUND in point else "",
            ", ".join(losses[:1] + losses[-1:] if len(losses) > 1 else losses),
            f"{point[DIFFERENCE].p50:.1e}" if DIFFERENCE in point else "",
            f"{point[MATCHED].p50:.1%}" if MATCHED in point else "",
        )
    return made


def step(rows: Sequence[Row]) -> Table:
    """Layouts of one global batch."""
    first = rows[0]
    made = Table(
        title=f"{first.towers} ({first.parameters:,} parameters), {first.global_batch} pairs on {first.world} ranks, "
        f"{first.precision}, {first.threads} threads a rank",
        title_justify="left",
        caption="milliseconds by part, medians over steps of the mean over ranks; reduce and gather: in DeepSpeed's "
        "collectives, with the wait for the other ranks. MiB: what a rank hands to them in a step.",
        caption_justify="left",
    )
    parts = [part for part in PARTS if any(f"{part} of a step" in point for point in points(rows))]
    for name in ("ZeRO", "reduced a", "micro batch", "ms a step", "x one pass", *parts, "reduced MiB", "gathered MiB"):
        made.add_column(name, justify="right")
    for point in points(rows):
        row = point[RATE]
        made.add_row(
            str(row.stage),
            row.reduce_gradients,
            str(row.micro_batch),
            f"{point[STEP_MS].p50:,.0f} ({point[STEP_MS].p20:,.0f} - {point[STEP_MS].p80:,.0f})",
            f"{point[ONE_PASS].p50:.2f}",
            *(f"{point[f'{part} of a step'].p50:,.1f}" if f"{part} of a step" in point else "" for part in parts),
            *(f"{point[f'{kind} by a rank'].p50:,.2f} ({point[f'{kind}, calls'].p50:.0f})" for kind in ("reduced", "gathered")),
        )
    return made


def _spread(row: Row, digits: int) -> str:
    return f"{row.p50:,.{digits}f} ({row.p20:,.{digits}f} - {row.p80:,.{digits}f})"


def _share(point: dict[str, Row], part: str) -> float:
    row = point.get(f"share of {part}")
    return row.p50 if row else 0.0


def _limit(point: dict[str, Row]) -> str:
    """The term that takes most of a step."""
    shares = {name: sum(_share(point, part) for part in parts) for name, parts in _LIMITS.items()}
    name = max(shares, key=lambda name: shares[name])
    return f"{name} ({shares[name]:.0%})"
