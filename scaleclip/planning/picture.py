"""A run on any number of devices as a picture."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from scaleclip.planning.plan import MEMORY_SHARE, STAGES, Plan

_TERMS = {
    "compute": ("compute", "#4477aa"),
    "gradients": ("adding up gradients", "#ee6677"),
    "parameters": ("gathering parameters", "#ccbb44"),
    "loss": ("passing features", "#aa3377"),
    "data": ("data (beside the step)", "#bbbbbb"),
}
_STAGE_COLOURS = ("#332288", "#117733", "#cc6677", "#ddaa33")
_DPI = 130


def draw_plan(plans: Sequence[Plan], chosen: Plan, path: Path) -> None:
    """Terms of a step, throughput and memory against the number of devices, with the chosen number marked.

    Args:
        plans: of growing numbers of devices.
        chosen: the plan that was asked for.
        path: the .png to write.
    """
    figure, (terms, throughput, memory) = plt.subplots(1, 3, figsize=(17, 5.2), layout="constrained", width_ratios=(1.25, 1, 1))
    _draw_terms(terms, plans)
    _draw_throughput(throughput, plans, chosen)
    _draw_memory(memory, plans)
    for panel in (terms, throughput, memory):
        panel.set_xlabel("devices")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in (throughput, memory):
        panel.axvline(chosen.num_ranks, color="black", linewidth=0.8, linestyle=":")
    batch = chosen.samples // chosen.steps
    model = f"{chosen.num_learning / 1e6:,.0f} M parameters, {batch:,} pairs a step, ZeRO-{chosen.stage}, {chosen.device.title}"
    figure.suptitle(f"{model}: an estimate with {chosen.assumptions.efficiency:.0%} of the peak", fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def _draw_terms(panel: Axes, plans: Sequence[Plan]) -> None:
    """Each term as a share of what all would take one after the other."""
    places = range(len(plans))
    below = [0.0] * len(plans)
    for name, (label, colour) in _TERMS.items():
        shares = [getattr(plan.terms, name) / sum(plan.terms) for plan in plans]
        panel.bar(places, shares, bottom=below, label=label, color=colour, width=0.86)
        below = [low + share for low, share in zip(below, shares, strict=True)]
    for place, plan in enumerate(plans):
        panel.text(place, 1.015, _seconds(plan.step_s), ha="center", fontsize=8)
        longest = _TERMS[plan.limit][0].split(" (")[0]
        panel.text(place, 0.02, longest, ha="center", va="bottom", rotation=90, fontsize=9, color="white")
    panel.set_xticks(list(places), [f"{plan.num_ranks:,}" for plan in plans], fontsize=8)
    panel.set_ylim(0, 1.07)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    panel.set_title("terms of a step, each alone (written: what limits; on top: the step)", loc="left", fontsize=10)
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, fontsize=8, frameon=False)


def _draw_throughput(panel: Axes, plans: Sequence[Plan], chosen: Plan) -> None:
    devices = [plan.num_ranks for plan in plans]
    panel.plot(devices, [plan.pairs_per_s for plan in plans], "o-", color="#4477aa", label="planned", markersize=4)
    first = plans[0]
    ideal = [first.pairs_per_s * plan.num_ranks / first.num_ranks for plan in plans]
    panel.plot(devices, ideal, color="#999999", linewidth=1, linestyle="--", label=f"{first.num_ranks} device times devices")
    panel.annotate(
        f"{chosen.num_ranks:,}: {chosen.pairs_per_s:,.0f} pairs/s,\n{chosen.days:,.1f} days",
        (chosen.num_ranks, chosen.pairs_per_s),
        xytext=(8, -26),
        textcoords="offset points",
        fontsize=9,
    )
    one_pass = next((plan for plan in plans if plan.num_chunks == 1), None)
    if one_pass is not None and one_pass is not plans[0]:
        place = (one_pass.num_ranks, one_pass.pairs_per_s)
        panel.annotate("one pass from here", place, xytext=(-8, 4), textcoords="offset points", fontsize=8, ha="right")
    _log_axes(panel)
    panel.set_title("pairs a second", loc="left", fontsize=10)
    panel.legend(loc="upper left", fontsize=8, frameon=False)


def _draw_memory(panel: Axes, plans: Sequence[Plan]) -> None:
    devices = [plan.num_ranks for plan in plans]
    for stage, colour in zip(STAGES, _STAGE_COLOURS, strict=True):
        own = stage == plans[0].stage
        fixed = [(plan.stages[stage].memory.total - plan.stages[stage].memory.activations) / 2**30 for plan in plans]
        panel.plot(devices, fixed, color=colour, linewidth=2.2 if own else 1.3, label=f"ZeRO-{stage}")
    limit = plans[0].device.memory_gib
    panel.axhline(limit, color="black", linewidth=1)
    panel.text(devices[0], limit * 1.04, f"{plans[0].device.name}: {limit:g} GiB, {MEMORY_SHARE:.0%} used", fontsize=8)
    _log_axes(panel)
    panel.set_title("memory of a device without activations, GiB", loc="left", fontsize=10)
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda gib, _: f"{gib:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.legend(loc="lower left", fontsize=8, frameon=False)


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.1f} s" if seconds < 10 else f"{seconds:,.0f} s"


def _log_axes(panel: Axes) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.xaxis.set_major_formatter(FuncFormatter(lambda devices, _: f"{devices:,.0f}"))
    panel.yaxis.set_major_formatter(EngFormatter())
