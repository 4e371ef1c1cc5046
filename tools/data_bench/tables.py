"""What a run found, for the terminal."""

from collections.abc import Sequence

from rich.table import Table

from data_bench.records import Row, peer


def whole(found: Sequence[Row]) -> Table:
    """Pipelines and readers of one size."""
    size, density = found[0].size, found[0].bytes_per_pixel
    made = Table(title=f"JPEGs of {size} px ({density:.2f} bytes a pixel), crop {found[0].crop} px", title_justify="left")
    made.add_column("task", no_wrap=True)
    made.add_column("pipeline", no_wrap=True)
    for name in ("processes", "samples a CPU-second (worst - best)", "times the peer's", "CPU us a sample", "wall us a sample"):
        made.add_column(name, justify="right")
    for row in found:
        if row.task == "stages":
            continue
        other = peer(row, found)
        made.add_row(
            row.task,
            row.label(),
            str(row.workers),
            f"{row.per_cpu_s:,.0f} ({1e6 / row.cpu_us_max:,.0f} - {1e6 / row.cpu_us_min:,.0f})",
            f"{row.per_cpu_s / other.per_cpu_s:.2f} ({other.pipeline})" if other else "",
            f"{row.cpu_us_p50:,.0f}",
            f"{row.wall_us_p50:,.0f}",
        )
    return made


def stages(found: Sequence[Row]) -> Table | None:
    """Processor time a sample by stage, a column a pipeline."""
    rows = [row for row in found if row.task == "stages"]
    if not rows:
        return None
    made = Table(title=f"CPU us a sample by stage, {rows[0].size} px", title_justify="left")
    made.add_column("stage")
    labels = list(dict.fromkeys(row.label() for row in rows))
    for label in labels:
        made.add_column(label, justify="right")
    us = {(row.part, row.label()): row.cpu_us_p50 for row in rows}
    for part in dict.fromkeys(row.part for row in rows):
        made.add_row(part, *(f"{us[part, label]:,.0f}" if (part, label) in us else "" for label in labels))
    made.add_row("sum", *(f"{sum(value for (_, name), value in us.items() if name == label):,.0f}" for label in labels))
    return made
