"""What a run knows of its past beside the model and the optimizer.

There is no random state: order, augmentation and dropout are functions of the seed, the step and the sample.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scaleclip.errors import RunError

STATE = "state.json"


@dataclass
class TrainState:
    """Counters of a run."""

    step: int = 0
    """Optimizer steps done, those that were left out for being bad included."""
    samples: int = 0
    """Slots of global batches seen, invalid ones included."""
    faults: dict[str, int] = field(default_factory=dict)
    """Samples that could not be used since the run's start, by source and cause (`laion/missing_shard`)."""
    train_s: float = 0.0
    """Seconds spent training, over all starts."""
    bad_steps: int = 0
    """Steps that were left out because loss or gradients were not finite."""
    batches_left_out: int = 0
    """Batches that were passed over when the run went back to a checkpoint."""
    world_size: int = 1
    """Ranks that saved, for people: any number of ranks loads."""
    zero_stage: int = 0
    """ZeRO stage that saved, for people: any stage loads."""
    origin: dict[str, Any] = field(default_factory=dict, compare=False)
    """What decides the run's updates, by configuration key: tells its checkpoints from another run's."""

    @property
    def batch(self) -> int:
        """Number of the next global batch."""
        return self.step + self.batches_left_out


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Keys that both origins have, with different values: another version of scaleclip may know more of them or fewer."""
    return [key for key, value in theirs.items() if key in ours and ours[key] != value]


def encode(state: TrainState) -> bytes:
    """The content of a state.json."""
    return json.dumps(asdict(state), indent=2).encode()


def read_state(path: Path) -> TrainState:
    """The state.json of a checkpoint.

    Raises:
        RunError: it has other fields.
    """
    try:
        return TrainState(**json.loads((path / STATE).read_text()))
    except TypeError as error:
        raise RunError(f"{path / STATE} was written by another version of scaleclip ({error}): use that one") from None
