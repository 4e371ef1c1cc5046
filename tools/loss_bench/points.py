"""What is measured, and what a measuring process answers: the words that parent and children share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Kind = Literal["softmax", "sigmoid"]
Mode = Literal["forward", "full"]
Device = Literal["cpu", "cuda"]
Task = Literal["time", "memory", "profile"]
Status = Literal["ok", "wrong", "cannot run", "died"]

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
GEMM = "gemm"
"""The name under which plain matrix products are measured, beside the losses."""
GEMM_FLOP = 32e9
"""In one timed iteration of them, at most."""


@dataclass(frozen=True)
class Comparison:
    """What all implementations of one table have in common."""

    batch: int
    """Pairs over all ranks."""
    dim: int
    dtype: str
    scale: float
    mode: Mode
    """full: loss and gradients; forward: the loss alone, under torch.no_grad."""
    world: int = 1
    threads: int = 1
    """A rank."""
    device: Device = "cpu"

    @property
    def pairs_per_rank(self) -> int:
        return self.batch // self.world

    @property
    def input_bytes_per_pair(self) -> float:
        """Of a rank's x and y, for each pair of the global batch."""
        return 2 * self.dim * DTYPE_BYTES[self.dtype] / self.world

    def title(self) -> str:
        ranks = "" if self.world == 1 else f", {self.world} ranks"
        return (
            f"N = {self.batch:,}, D = {self.dim}, {self.dtype}, scale {self.scale:g}, {self.mode}, "
            f"{self.device}{ranks}, {self.threads} thread{'s' * (self.threads > 1)}{' a rank' * (self.world > 1)}"
        )


@dataclass(frozen=True)
class Point:
    """One implementation in one comparison, with its settings."""

    comparison: Comparison
    impl: str
    """As in --impl, a loss of one's own included (`mine=module:function`)."""
    variant: str
    """The schedule over ranks, or the constructor's options of a peer; empty where there is but one."""
    precision: str
    """torch.set_float32_matmul_precision"""

    @property
    def name(self) -> str:
        return label_of(self.impl)

    def label(self) -> str:
        settings = " ".join(word for word in (self.name, self.variant, self.precision) if word)
        return f"{settings}, {self.comparison.title()}"


def label_of(impl: str) -> str:
    """The name in `name=module:function`, or the whole."""
    return impl.partition("=")[0]


@dataclass(frozen=True)
class Job:
    """One child process (or one a rank)."""

    point: Point
    task: Task
    repeats: int
    trace: Path | None = None
    """Where to write the profiler's trace."""


@dataclass(frozen=True)
class Errors:
    """Relative errors: |a - truth| / |truth| in the Euclidean norm."""

    loss: float
    x: float
    y: float
    scale: float
    bias: float | None = None

    def largest_gradient(self) -> float:
        return max(error for error in (self.x, self.y, self.scale, self.bias) if error is not None)


@dataclass(frozen=True)
class Sample:
    """One timed iteration on one rank, in seconds."""

    forward_s: float
    backward_s: float
    full_s: float
    cpu_s: float


@dataclass(frozen=True)
class RankResult:
    """What one rank's process found."""

    status: Status
    note: str = ""
    device_name: str = ""
    errors: Errors | None = None
    plain_errors: Errors | None = None
    """Of plain torch in the same dtype, on the same batch."""
    loss: float | None = None
    """At the measured size, to be compared between implementations."""
    added_bytes: int | None = None
    sent_bytes: float | None = None
    formula_bytes: float | None = None
    samples: list[Sample] = field(default_factory=list)
    flop: float | None = None
    """Of one iteration on this rank, where a plain matrix product is timed."""
