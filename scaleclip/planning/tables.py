"""A plan as figures with where each comes from, as tables and as JSON."""

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from rich.table import Table

from scaleclip.planning.memory import StepMemory
from scaleclip.planning.plan import LINK_SHARE, MEMORY_SHARE, Plan

Unit = Literal["FLOP", "FLOP/s", "B", "B/s", "s", "1/s", "%", "", "h", "days"]
Basis = Literal["counted", "measured", "data sheet", "assumed", "estimated"]

_GIB = 2**30
_KINDS = {
    "parameters": "parameters",
    "masters": "fp32 masters",
    "optimizer": "AdamW's moments",
    "gradients": "gradients",
    "activations": "activations",
    "inputs": "pixels and tokens",
    "features": "cached features",
    "loss": "loss",
    "communication": "buckets",
}
_BASIS_STYLES = {"counted": "green", "measured": "green", "data sheet": "cyan", "assumed": "yellow", "estimated": "yellow"}
_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class Figure(NamedTuple):
    """One figure of a plan."""

    section: str
    name: str
    value: float
    unit: Unit
    basis: Basis
    how: str
    """Source or formula."""


def figures(plan: Plan) -> list[Figure]:
    """Everything that a plan says but the memory."""
    device, taken = plan.device, plan.assumptions
    arithmetic, traffic, terms = plan.arithmetic, plan.traffic, plan.terms
    zero = f"fp32, ZeRO-{plan.stage}"
    own_cores = taken.cpu_cores is not None
    gradients_when = "beside" if plan.overlaps else "after"
    sections: dict[str, list[tuple[str, float, Unit, Basis, str]]] = {
        "a step on one device": [
            ("towers", arithmetic.towers, "FLOP", "counted", f"{plan.share:,} pairs in {_passes(plan)}"),
            ("loss", arithmetic.loss, "FLOP", "counted", "products of features"),
            ("gradients sent", traffic.gradients, "B", "counted", zero),
            ("parameters sent", traffic.parameters, "B", "counted", zero),
            ("features sent", traffic.loss, "B", "counted", "for the loss"),
        ],
        "taken for granted": [
            ("peak", plan.peak_flops_per_s, "FLOP/s", device.basis, device.name),
            ("share of it", taken.efficiency, "%", "assumed", "--mfu; of all that is executed"),
            ("links in a node", device.node_gb_per_s * 1e9, "B/s", device.server_basis, f"nodes of {taken.node_size}"),
            ("network card", device.network_gb_per_s * 1e9, "B/s", device.server_basis, "one a device"),
            ("share of links", LINK_SHARE, "%", "assumed", "that messages reach"),
            ("CPU cores", plan.cpu_cores, "", "assumed" if own_cores else device.server_basis, "for a device's loader"),
            ("loader processes", plan.num_loaders, "", "counted", "data.workers, a core each"),
            (
                "pairs a core", plan.pairs_per_core_s, "1/s", "measured",
                f"JPEGs of {taken.image_px} px; data_cpu.csv",
            ),
        ],
        "time of a step": [
            ("compute", terms.compute, "s", "estimated", "FLOP / share of the peak"),
            ("adding up gradients", terms.gradients, "s", "estimated", f"{gradients_when} the backward pass"),
            ("gathering parameters", terms.parameters, "s", "estimated", "beside the towers" if plan.stage == 3 else ""),
            ("passing features", terms.loss, "s", "estimated", "beside the loss"),
            ("data", terms.data, "s", "estimated", "beside the step"),
            ("step", plan.step_s, "s", "estimated", f"{plan.limit} limits"),
        ],
        "the run": [
            ("throughput", plan.pairs_per_s, "1/s", "estimated", "pairs, all devices"),
            ("MFU", plan.mfu, "%", "estimated", "three forward passes a pair"),
            ("length", plan.days, "days", "estimated", f"{plan.steps:,} steps"),
            ("devices", plan.gpu_hours, "h", "estimated", "device-hours"),
            ("CPU cores needed", plan.cpu_cores_needed, "", "estimated", "a device, not to wait for data"),
            ("data read", plan.data_bytes_per_s, "B/s", "estimated", "a device"),
        ],
    }  # fmt: skip
    return [Figure(section, *rest) for section, rows in sections.items() for rest in rows]


def memory_table(plan: Plan) -> Table:
    """A column a ZeRO stage, in GiB on one device; the run's own stage stands out."""
    budget = MEMORY_SHARE * plan.device.memory_gib
    table = Table(title="Memory of a device at a step's peak, GiB", title_justify="left", caption_justify="left")
    table.add_column("")
    for zero in plan.stages:
        table.add_column(f"ZeRO-{zero.stage}", justify="right", style="bold" if zero.stage == plan.stage else "dim")
    table.add_row(
        "largest micro batch",
        *(f"{zero.largest_micro_batch:,}" if zero.largest_micro_batch else "none" for zero in plan.stages),
    )
    table.add_section()
    for kind, name in _KINDS.items():
        amounts = [getattr(zero.memory, kind) for zero in plan.stages]
        if any(amounts):
            table.add_row(name, *map(_gib, amounts))
    table.add_section()
    table.add_row("all", *(_fit(zero.memory, budget) for zero in plan.stages))
    table.add_row("peak while", *(zero.memory.moment for zero in plan.stages))
    if any(zero.memory.host for zero in plan.stages):
        table.add_row("offloaded, on the host", *(_gib(zero.memory.host) for zero in plan.stages))
    each = "its largest micro batch" if plan.is_auto else "train.micro_batch"
    table.caption = (
        f"Counted, each with {each}, in {budget:.1f}\nof {plan.device.memory_gib:g} GiB ({plan.device.server_basis}): "
        f"{MEMORY_SHARE:.0%} is assumed usable."
    )
    return table


def figures_table(plan: Plan) -> Table:
    """Every figure with its basis."""
    table = Table(title="Step and run", title_justify="left", caption_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("figure", justify="right", no_wrap=True)
    table.add_column("basis", no_wrap=True)
    table.add_column("")
    for section, rows in itertools.groupby(figures(plan), key=lambda figure: figure.section):
        table.add_row(f"[bold]{section}[/]")
        for figure in rows:
            style = _BASIS_STYLES[figure.basis]
            table.add_row(f"  {figure.name}", shown(figure), f"[{style}]{figure.basis}[/]", figure.how)
        table.add_section()
    table.caption = f"{plan.device.title}: {plan.device.source}."
    return table


def headline(plan: Plan) -> str:
    """The plan in one sentence."""
    return (
        f"{plan.num_ranks:,} x {plan.device.name}, ZeRO-{plan.stage}, {plan.share:,} pairs each in {_passes(plan)}: "
        f"{_seconds(plan.step_s)} a step, {plan.pairs_per_s:,.0f} pairs/s, {_days(plan.days)}, {_hours(plan.gpu_hours)} "
        f"device-hours; {plan.limit} limits"
    )


def totals(plans: Sequence[Plan]) -> str:
    """All stages of a run in one sentence."""
    days, gpu_hours = sum(plan.days for plan in plans), sum(plan.gpu_hours for plan in plans)
    return (
        f"{len(plans)} stages: {sum(plan.steps for plan in plans):,} steps, {sum(plan.samples for plan in plans):,} pairs, "
        f"{_days(days)}, {_hours(gpu_hours)} device-hours"
    )


def data_advice(plan: Plan) -> str | None:
    """What to change where devices would wait for data."""
    if plan.limit != "data":
        return None
    needed = math.ceil(plan.cpu_cores_needed)
    if needed <= plan.cpu_cores:
        return f"Steps wait for data: set data.workers={needed} instead of {plan.num_loaders}"
    return (
        f"Steps wait for data: {plan.cpu_cores_needed:,.1f} cores a device are needed, there are {plan.cpu_cores:g}: set "
        f"data.workers={math.floor(plan.cpu_cores)} and store smaller images"
    )


def shown(figure: Figure) -> str:
    """A figure with its unit, short."""
    match figure.unit:
        case "s":
            return _seconds(figure.value)
        case "1/s":
            return f"{figure.value:,.0f} /s"
        case "%":
            return f"{figure.value:.0%}"
        case "days":
            return _days(figure.value)
        case "h":
            return f"{_hours(figure.value)} h"
        case "":
            return f"{figure.value:,.4g}"
        case unit:
            return _with_prefix(figure.value, unit)


def to_json(plans: Sequence[Plan]) -> str:
    """The plan for other programs; of several stages, a list of theirs with what they take together."""
    if len(plans) == 1:
        return json.dumps(_tree(plans[0]), indent=2)
    tree = {
        "stages": [_tree(plan) for plan in plans],
        "steps": sum(plan.steps for plan in plans),
        "samples": sum(plan.samples for plan in plans),
        "days": sum(plan.days for plan in plans),
        "device_hours": sum(plan.gpu_hours for plan in plans),
    }
    return json.dumps(tree, indent=2)


def _tree(plan: Plan) -> dict[str, Any]:
    memory = [
        {"stage": zero.stage, "largest_micro_batch": zero.largest_micro_batch, "total": zero.memory.total}
        | zero.memory._asdict()
        for zero in plan.stages
    ]
    return {
        "devices": plan.num_ranks,
        "device": plan.device._asdict(),
        "stage": plan.stage,
        "share": plan.share,
        "micro_batch": plan.micro_batch,
        "limit": plan.limit,
        "memory_bytes": memory,
        "figures": [figure._asdict() for figure in figures(plan)],
    }


def _seconds(value: float) -> str:
    return f"{value * 1e3:,.1f} ms" if value < 1 else f"{value:,.2f} s"


def _days(value: float) -> str:
    if value >= 1:
        return f"{value:,.1f} days"
    hours = 24 * value
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:,.1f} minutes"


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _passes(plan: Plan) -> str:
    return f"2 passes of {plan.num_chunks:,} chunks" if plan.num_chunks > 1 else "one pass"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:,.2f}" if num_bytes else ""


def _fit(memory: StepMemory, budget_gib: float) -> str:
    fits = memory.total <= budget_gib * _GIB
    return _gib(memory.total) if fits else f"[red]{_gib(memory.total)}[/]"


def _with_prefix(value: float, unit: str) -> str:
    for factor, prefix in _PREFIXES:
        if value >= factor:
            return f"{value / factor:,.2f} {prefix}{unit}"
    return f"{value:,.0f} {unit}"
