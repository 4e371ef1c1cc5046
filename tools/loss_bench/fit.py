"""The largest batch within a memory budget, from what was measured at a few sizes."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from loss_bench.points import Point
from loss_bench.summary import MIB, Outcome

BATCHES = {"cpu": (2048, 4096, 8192), "cuda": (32_768, 65_536, 131_072)}
"""By device, where no --batch is given: large enough that panels have their full size."""

# A bend of less than this, or less than this share of the largest measurement, is the allocator's, not the algorithm's: the
# same point measured five times gave 61 to 81 MiB.
_NOISE_BYTES, _NOISE_SHARE = 16 << 20, 0.03


@dataclass(frozen=True)
class MemoryModel:
    """Bytes on a rank for a global batch of N pairs: constant + linear N + quadratic N^2, inputs included."""

    constant: float
    linear: float
    quadratic: float

    def bytes_at(self, batch: int) -> float:
        return self.constant + self.linear * batch + self.quadratic * batch**2


def fit_memory(batches: Sequence[int], added_bytes: Sequence[int], input_bytes_per_pair: float) -> MemoryModel:
    """Through what was measured at three sizes or more; a bend within the measurement's noise is none."""
    if len(set(batches)) < 3:
        raise ValueError(f"a fit of three terms needs three batch sizes, got {list(batches)}")
    sizes, added = np.array(batches, dtype=np.float64), np.array(added_bytes, dtype=np.float64)
    largest = sizes.max()
    noise = max(_NOISE_BYTES, _NOISE_SHARE * added.max())
    # in units of the largest size, or the squares drown the rest
    straight = _without_negatives(sizes / largest, added, (0, 1))
    bent = _without_negatives(sizes / largest, added, (0, 1, 2))
    constant, linear, quadratic = (straight if straight.residual <= noise else bent).coefficients
    return MemoryModel(constant, linear / largest + input_bytes_per_pair, quadratic / largest**2)


class _Fit(NamedTuple):
    residual: float
    """The largest."""
    coefficients: tuple[float, float, float]


def _without_negatives(sizes: NDArray[np.float64], added: NDArray[np.float64], powers: tuple[int, ...]) -> _Fit:
    """The least-squares polynomial of these powers of which no coefficient is negative."""
    fits = []
    for used in (c for length in range(1, len(powers) + 1) for c in itertools.combinations(powers, length)):
        terms = np.stack([sizes**power for power in used], axis=1)
        found = np.linalg.lstsq(terms, added)[0]
        if (found >= 0).all():
            by_power = dict(zip(used, found.tolist(), strict=True))
            coefficients = by_power.get(0, 0.0), by_power.get(1, 0.0), by_power.get(2, 0.0)
            fits.append(_Fit(float(np.abs(terms @ found - added).max()), coefficients))
    return min(fits)


def largest_batch(model: MemoryModel, budget_bytes: float, step: int) -> int:
    """The largest multiple of `step` that fits: by doubling, then halving the interval. 0 if not even `step` does."""
    if model.linear <= 0 and model.quadratic <= 0:
        raise ValueError(f"memory does not grow with the batch in {model}: measure larger batches")
    fits, too_many = 0, 1
    while model.bytes_at(too_many * step) <= budget_bytes:
        fits, too_many = too_many, 2 * too_many
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if model.bytes_at(middle * step) <= budget_bytes:
            fits = middle
        else:
            too_many = middle
    return fits * step


def table(outcomes: Sequence[Outcome], budget_bytes: int) -> Table:
    """What fits of every implementation, and from which measurements that is known."""
    made = Table(
        title=f"Largest batch in {budget_bytes / MIB:,.0f} MiB a rank: A FIT through the measured sizes, not a measurement",
        title_justify="left",
        caption="added MiB: the peak above inputs and libraries, gradients included. The model includes a rank's inputs. "
        "Libraries and the towers are not in it.",
        caption_justify="left",
    )
    for name in ("implementation", "setting", "comparison", "added MiB at N =", "bytes on a rank for N pairs"):
        made.add_column(name)
    made.add_column("largest N", justify="right")
    groups: dict[Point, list[Outcome]] = {}
    for outcome in outcomes:
        point = outcome.point
        groups.setdefault(replace(point, comparison=replace(point.comparison, batch=0)), []).append(outcome)
    for group in groups.values():
        made.add_row(*_cells(group, budget_bytes))
    return made


def _cells(group: Sequence[Outcome], budget_bytes: int) -> list[str]:
    point, comparison = group[0].point, group[0].point.comparison
    about = f"D = {comparison.dim}, {comparison.dtype}, {comparison.mode}, W = {comparison.world}"
    cells = [point.name, " ".join(filter(None, [point.variant, point.precision])), about]
    failed = next((outcome.first for outcome in group if outcome.first.status != "ok"), None)
    if failed is not None:
        return [*cells, f"{failed.status}: {failed.note}", "", "-"]
    batches = [outcome.point.comparison.batch for outcome in group]
    added = [max(result.added_bytes or 0 for result in outcome.results) for outcome in group]
    model = fit_memory(batches, added, comparison.input_bytes_per_pair)
    largest = largest_batch(model, budget_bytes, batch_step(comparison.world))
    measured = ", ".join(f"{batch:,}: {size / MIB:,.1f}" for batch, size in zip(batches, added, strict=True))
    return [*cells, measured, f"{model.constant:,.0f} + {model.linear:,.1f} N + {model.quadratic:.3g} N^2", f"{largest:,}"]


def batch_step(world: int) -> int:
    """Batches are multiples of 1024 that every rank has an equal part of."""
    return math.lcm(1024, world)
