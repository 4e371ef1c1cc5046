"""What is measured: a job for one process, and its answer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Task = Literal["reader", "stages", "whole", "views"]
Format = Literal["tar", "mds"]
OURS, OPEN_CLIP, WEBDATASET, STREAMING = "scaleclip", "open_clip", "webdataset", "streaming"
READERS = {"tar": (OURS, WEBDATASET), "mds": (OURS, STREAMING)}
PIPELINES = {"tar": (OURS, OPEN_CLIP), "mds": (OURS,)}
CONTEXT_LENGTH = 77


@dataclass(frozen=True)
class Point:
    """One pipeline, or a part of it, on one set of shards."""

    task: Task
    pipeline: str
    format: Format
    size: int
    """Height and width in pixels of the stored images."""
    workers: int
    """Loader processes; 0 loads in the process itself."""

    def label(self) -> str:
        """For the progress bar."""
        return f"{self.task} of {self.pipeline}, {self.format}, {self.size} px, {self.workers} workers"


@dataclass(frozen=True)
class Job:
    """A point, once."""

    point: Point
    shards: Path
    """Folder that `shards.make` filled."""
    batch: int
    crop: int
    """Height and width of the pipeline's output."""
    least_cpu_s: float
    """Whole passes over the shards are repeated until they took this much processor time."""


@dataclass(frozen=True)
class Cost:
    """What some samples took."""

    samples: int
    cpu_s: float
    """Of the process and its children."""
    wall_s: float


Answer = dict[str, Cost]
"""By part: `whole`, or `read`, `decode`, ..."""
