"""Layouts of a run against one process: do they take the same steps?"""

import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from scaleclip.config import RunConfig
from scaleclip.equivalence.layouts import Layout, layout_steps
from scaleclip.equivalence.record import Differences, Record, Traffic, differences, furthest
from scaleclip.equivalence.reference import draws_random_numbers, reference_steps
from scaleclip.local_ranks import run_ranks

LIMIT = 1e-5
"""What the differences of loss, gradients and parameters may be: fp32's rounding in another order, and no more."""
LATER_LIMIT = 5e-5
"""Of gradients after the first step, in which AdamW moves an element by the learning rate however small its gradient is: one
that is mostly rounding goes anywhere, and batch norm over a few pairs (SLIP) makes much of that."""


class Verdict(NamedTuple):
    """A layout's steps against the true ones."""

    layout: Layout
    differences: Differences
    """Of the rank that is furthest away, figure by figure."""
    traffic: Traffic
    """Of rank 0 in the last step."""
    gradient_bytes: int
    """Size of all gradients."""
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether every difference is within the limit."""
        found = self.differences
        first, *later = found.gradients
        at_once = all(value <= LIMIT for value in (found.loss, first, found.parameters))
        return at_once and all(value <= LATER_LIMIT for value in later)


class Verifier:
    """Runs layouts of a small configuration; the process that they are held against runs once.

    Args:
        config: small (`shrink`), in fp32.
        num_steps: optimizer steps.

    Raises:
        ConfigError: the run cannot be laid out so.
        RunError: a rank failed.
    """

    def __init__(self, config: RunConfig, num_steps: int) -> None:
        self._config, self._num_steps = config, num_steps
        self._draws: bool = run_ranks(draws_random_numbers, 1, config)[0]
        self._truths: dict[tuple[int, int], Record] = {}

    def __call__(self, layouts: Iterable[Layout]) -> Iterator[Verdict]:
        """A verdict a layout, as each is done."""
        return map(self._verdict, layouts)

    def _verdict(self, layout: Layout) -> Verdict:
        start_s = time.monotonic()
        truth = self._truth(layout)
        records = run_ranks(layout_steps, layout.world_size, layout.applied(self._config), self._num_steps)
        found = [differences(record, truth, self._config.optim.lr) for record in records]
        return Verdict(
            layout,
            furthest(found),
            records[0].traffic[-1],
            sum(gradient.nbytes for gradient in truth.gradients[0].values()),
            time.monotonic() - start_s,
        )

    def _truth(self, layout: Layout) -> Record:
        """One pass over the batch, or, where dropout draws a chunk's random numbers, the layout's own chunks."""
        chunks = (layout.world_size, layout.micro_batch) if self._draws else (1, self._config.train.global_batch)
        if chunks not in self._truths:
            self._truths[chunks] = run_ranks(reference_steps, 1, self._config, self._num_steps, *chunks)[0]
        return self._truths[chunks]
