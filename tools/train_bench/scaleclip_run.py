"""scaleclip's trainer, whole: `scaleclip.train.train` with its own loader, or with one batch in memory in its place.

What this needs is imported in the process that measures.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from math import gcd
from typing import Any
from unittest.mock import patch

from scaleclip import engine, step, train, train_stage
from scaleclip.config import RunConfig
from scaleclip.config_io import parse_config
from scaleclip.data.batches import TrainBatches
from scaleclip.data.loader import Batch
from scaleclip.metrics import read_rows
from train_bench.points import BACKWARD, FORWARD, LOSS, STEP, Answer, PeerJob
from train_bench.ready_batch import ready_batch
from train_bench.towers import model_config, num_parameters
from train_bench.window import Window

_DEMO = "package:scaleclip/data/demo/train/*.tar"


def measure(job: PeerJob) -> Answer:
    """Times of the steps that count."""
    config, window = _config(job), Window(job)
    with ExitStack() as stack:
        for owner, name, part in (
            (engine.Engine, "__call__", FORWARD),
            (engine.Engine, "backward", BACKWARD),
            (engine.Engine, "step", STEP),
            (step, "batch_terms", LOSS),
        ):
            stack.enter_context(patch.object(owner, name, window.watch.timed(getattr(owner, name), part)))
        loader = _in_memory(config, window) if job.source == "memory" else _watched(window)
        stack.enter_context(patch.object(train_stage, "TrainBatches", loader))
        folder = train.train(config)
    rows = read_rows(folder)
    inside = [row for row in rows if job.warm_up + job.log_every <= row["step"] <= job.warm_up + job.steps]
    return Answer(
        steps=window.steps,
        num_parameters=num_parameters(config.model),
        cpu_s=window.cpu_s,
        peak_bytes=window.peak_bytes,
        logged_pairs_per_s=inside[-1]["pairs_per_s"] if inside else None,
        losses=[row["loss"] for row in rows],
    )


def _config(job: PeerJob) -> RunConfig:
    layout = job.layout
    return parse_config(
        {
            "run": {"folder": str(job.folder / "run")},
            "data": {
                # what is in memory replaces the demo's batches; its shards are opened all the same
                "sources": {"bench": {"shards": job.shards or (_DEMO,)}},
                "cache": {"folder": str(job.folder / "cache")},
                "canonical_streams": gcd(128, layout.global_batch),
                "workers": job.workers,
            },
            "model": model_config(layout.towers).model_dump(),
            "optim": {"lr": 5e-4, "weight_decay": 0.2, "betas": (0.9, 0.98), "eps": 1e-6, "clip_norm": 1.0},
            "train": {
                "global_batch": layout.global_batch,
                "micro_batch": layout.micro_batch,
                "samples": (job.warm_up + job.steps + 1) * layout.global_batch,
                "precision": layout.precision,
                "zero_stage": layout.stage,
                "compile": job.setting == "compile",
            },
            "metrics": {"log_every_steps": job.log_every},
        }
    )


def _watched(window: Window) -> type[TrainBatches]:
    """The loader, watched."""

    class Watched(TrainBatches):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._watched = window.watched(iter(super().__next__, None))

        def __next__(self) -> Batch:
            return next(self._watched)

    return Watched


def _in_memory(config: RunConfig, window: Window) -> type[TrainBatches]:
    """The same batch again and again."""
    ready = ready_batch(config.model, config.train.global_batch)

    class InMemory(TrainBatches):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.lost_workers = 0
            self._watched = window.watched(_again(ready.scaleclip()))

        def __next__(self) -> Batch:
            return next(self._watched)

        def close(self) -> None:
            pass

    return InMemory


def _again(batch: Batch) -> Iterator[Batch]:
    while True:
        yield batch
