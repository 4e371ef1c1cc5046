"""What the tests of captioning run, also on ranks of their own."""

import os
from pathlib import Path
from typing import Any

import torch

from scaleclip import distributed
from scaleclip.captioning.examples import load_sources
from scaleclip.captioning.folder import CaptionFolder, Summary
from scaleclip.captioning.generation import Sampling
from scaleclip.captioning.job import Data, Task, write_texts
from scaleclip.captioning.language_model import LanguageModel
from scaleclip.captioning.prompt import TASK
from scaleclip.captioning.recaption import Recaptioning
from scaleclip.captioning.rewrite import Rewriting
from scaleclip.captioning.vision_language_model import VisionLanguageModel
from scaleclip.config import CacheConfig
from scaleclip.data.cache import ShardCache
from scaleclip.data.source import open_shards
from scaleclip.distributed import World

CPU = torch.device("cpu")
SOURCES = ("human", "mscoco")


def rewriting(model: LanguageModel, **changes: Any) -> Rewriting:
    """A task in batches of three."""
    sampling = Sampling(changes.pop("temperature", 0.9), max_tokens=changes.pop("max_tokens", 12))
    settings = {"batch": 3, **changes}
    return Rewriting(
        model, "tiny", settings.pop("digest", "d"), load_sources(SOURCES), settings.pop("task", TASK), sampling, **settings
    )


def recaptioning(model: VisionLanguageModel, **changes: Any) -> Recaptioning:
    """A task in batches of three."""
    sampling = Sampling(temperature=0, max_tokens=changes.pop("max_tokens", 12))
    return Recaptioning(model, "tiny", "d", "Describe it.", sampling, **{"batch": 3, **changes})


def write(task: Task, shards: Path, out: Path, shown: list | None = None, workers: int = 0) -> Summary:
    """What the command does, without a command."""
    cache = ShardCache(CacheConfig(folder=str(out.parent / "cache")))
    world = distributed.init() if "RANK" in os.environ else World(0, 1, 0, CPU)
    data = Data(*open_shards("--data", (f"{shards}/*.tar",), None, cache), workers)
    return write_texts(task, data, out, world, (shown if shown is not None else []).append)


def rewrite_and_tell(folder: Path, shards: Path, out: Path) -> tuple[Summary, list[str]]:
    """The summary, and the shards that this rank wrote."""
    written, really = list[str](), CaptionFolder.write

    def noting(self: CaptionFolder, name: str, *arguments: Any) -> None:
        written.append(name)
        really(self, name, *arguments)

    CaptionFolder.write = noting
    return write(rewriting(LanguageModel(folder, "auto", CPU)), shards, out), written
