"""What is measured, and what a measuring process answers: the words that parent and children share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Precision = Literal["fp32", "bf16"]
Setting = Literal["plain", "medium", "compile"]
"""plain: torch as it starts; medium: torch.set_float32_matmul_precision("medium"); compile: torch.compile of the towers."""
Source = Literal["memory", "shards"]
Device = Literal["cpu", "cuda"]
Reduction = Literal["chunk", "step"]
OURS, OPEN_CLIP = "scaleclip", "open_clip"

DATA, FORWARD, LOSS, BACKWARD, STEP, OUTSIDE = "data", "forward", "loss", "backward", "step", "outside"
FIRST_PASS, REDUCE, GATHER = "first pass", "reduce", "gather"
PARTS = (DATA, FIRST_PASS, FORWARD, LOSS, BACKWARD, REDUCE, GATHER, STEP, OUTSIDE)
"""Of a step's time; beside a GPU, the host's. `forward` is the pass that keeps activations, `step` the clip and the optimizer,
`reduce` and `gather` DeepSpeed's collectives, `outside` the rest."""

Seconds = dict[str, float]
"""By part; together a step."""


@dataclass(frozen=True)
class Layout:
    """A step and how it lies on the ranks."""

    towers: str
    global_batch: int
    micro_batch: int
    """Pairs that a rank encodes at once."""
    world: int
    stage: int
    """ZeRO's."""
    reduce_gradients: Reduction = "chunk"
    precision: Precision = "fp32"
    threads: int = 1
    """A rank."""

    @property
    def share(self) -> int:
        """Pairs of a rank."""
        return -(-self.global_batch // self.world)


@dataclass(frozen=True)
class PeerJob:
    """One trainer's run in a process of its own: `warm_up` steps, `steps` that count, and one that ends them."""

    trainer: str
    source: Source
    setting: Setting
    layout: Layout
    """On one rank, in one pass. ZeRO's stage is scaleclip's."""
    warm_up: int
    steps: int
    workers: int
    """Loader processes, with shards."""
    log_every: int
    """Steps between the trainer's own log lines."""
    shards: tuple[str, ...]
    """Tars."""
    folder: Path
    """For the run's files."""
    device: Device = "cpu"

    def label(self) -> str:
        return f"{self.trainer}, {self.setting}, {self.layout.towers} from {self.source}"


@dataclass(frozen=True)
class StepJob:
    """Optimizer steps on synthetic pairs. The first `warm_up` do not count."""

    layout: Layout
    warm_up: int
    steps: int

    def label(self) -> str:
        return (
            f"steps of {self.layout.global_batch} = {self.layout.world} x {self.layout.micro_batch}, ZeRO-{self.layout.stage}"
        )


@dataclass(frozen=True)
class MemoryJob:
    """The memory that a model, its optimizer and `steps` steps add."""

    layout: Layout
    steps: int

    def label(self) -> str:
        return f"memory of {self.layout.global_batch} = {self.layout.world} x {self.layout.micro_batch}"


@dataclass(frozen=True)
class LearnJob:
    """A run of `steps` steps on synthetic pairs."""

    layout: Layout
    steps: int
    lr: float

    def label(self) -> str:
        return f"{self.steps} steps of {self.layout.global_batch} on {self.layout.world} ranks"


Job = PeerJob | StepJob | MemoryJob | LearnJob


@dataclass(frozen=True)
class Answer:
    """What one rank's process found; what was not asked for is empty."""

    steps: Sequence[Seconds] = field(default_factory=list)
    """That count."""
    num_parameters: int = 0
    cpu_s: float = 0.0
    """Processor time of the steps that count, loader processes included."""
    logged_pairs_per_s: float | None = None
    """As the trainer says it in its own log; its last line in the steps that count."""
    added_bytes: int = 0
    """Peak of the resident memory above that before the model was made."""
    losses: Sequence[float] = field(default_factory=list)
    """Step by step."""
    matched: float = 0.0
    """Share of pairs, never seen before, whose image is nearest to a text of its class."""
    traffic: Sequence[dict[str, int]] = field(default_factory=list)
    """Of the steps that count, as `scaleclip.traffic.Traffic` counts."""
    peak_bytes: int = 0
    """Allocated on a GPU at once in the steps that count."""
