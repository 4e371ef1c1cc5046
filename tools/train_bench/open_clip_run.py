"""open_clip's trainer, whole: `open_clip_train.main.main` with its own loader, or with one batch in memory in its place.

What this needs is imported in the process that measures.
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import open_clip
import torch

# which its data sets in CSV need, and nothing here
with patch.dict(sys.modules, pandas=ModuleType("pandas")):
    from open_clip_train import data as open_clip_data
    from open_clip_train import main as open_clip_main
    from open_clip_train import train as open_clip_train

from train_bench.laps import TimedCall
from train_bench.points import BACKWARD, FORWARD, LOSS, STEP, Answer, PeerJob
from train_bench.ready_batch import ready_batch
from train_bench.towers import model_config, open_clip_config
from train_bench.window import Window

_MODEL = "bench-vit"  # with vit in its name, for open_clip's defaults of AdamW
_RUN = "run"
_PRECISIONS = {"fp32": "fp32", "bf16": "amp_bf16"}


def measure(job: PeerJob) -> Answer:
    """Times of the steps that count."""
    model, window = model_config(job.layout.towers), Window(job)
    path = job.folder / f"{_MODEL}.json"
    path.write_text(json.dumps(open_clip_config(model)))
    open_clip.add_model_config(path)
    # webdataset 1.0 marks the end of a tar with an empty entry, which open_clip, written for 0.2, does not expect
    open_clip_data.tar_file_expander = partial(open_clip_data.tar_file_expander, eof_value=None)
    num_parameters: list[int] = []
    with ExitStack() as stack:
        stack.enter_context(patch.object(open_clip_main, "get_data", _watched_data(job, window)))
        stack.enter_context(patch.object(open_clip_main, "train_one_epoch", _watched_epoch(window, num_parameters)))
        for owner, name, part in ((open_clip_train, "backward", BACKWARD), (torch.nn.utils, "clip_grad_norm_", STEP)):
            stack.enter_context(patch.object(owner, name, window.watch.timed(getattr(owner, name), part)))
        open_clip_main.main(_arguments(job))
    log = (job.folder / _RUN / "out.log").read_text()
    rates = [float(rate.replace(",", "")) for rate in re.findall(r"([0-9.e+]+)/s,", log)]
    losses = [float(loss) for loss in re.findall(r"Loss: ([0-9.e+]+) \(", log)]
    return Answer(
        steps=window.steps,
        num_parameters=num_parameters[0],
        cpu_s=window.cpu_s,
        peak_bytes=window.peak_bytes,
        # the first line is about the first step, the last one may be about the last
        logged_pairs_per_s=rates[-2] if len(rates) > 2 else None,
        losses=losses,
    )


def _arguments(job: PeerJob) -> list[str]:
    """Its command line."""
    layout = job.layout
    arguments = ["--model", _MODEL, "--device", job.device, "--precision", _PRECISIONS[layout.precision]]
    arguments += ["--logs", str(job.folder), "--name", _RUN, "--log-every-n-steps", str(job.log_every)]
    arguments += ["--batch-size", str(layout.global_batch), "--epochs", "1", "--warmup", "0", "--wd", "0.2"]
    arguments += ["--grad-clip-norm", "1.0", "--workers", str(job.workers)]
    arguments += ["--train-num-samples", str((job.warm_up + job.steps + 1) * layout.global_batch)]
    if job.source == "memory":
        arguments += ["--dataset-type", "synthetic"]
    else:
        arguments += ["--train-data", "::".join(job.shards), "--dataset-type", "webdataset"]
    return arguments + (["--torchcompile"] if job.setting == "compile" else [])


def _watched_data(job: PeerJob, window: Window) -> Any:
    """In the place of `get_data`."""
    get_data = open_clip_main.get_data

    def watched_data(*args: Any, **kwargs: Any) -> Any:
        if job.source == "memory":
            batch = ready_batch(model_config(job.layout.towers), job.layout.global_batch).open_clip()
            num_batches = job.warm_up + job.steps + 1
            info = open_clip_data.DataInfo(_Loader(_again(batch, num_batches), num_batches, job.layout.global_batch, window))
            return {"train": info}
        data = get_data(*args, **kwargs)
        loader = data["train"].dataloader
        data["train"].dataloader = _Loader(loader, loader.num_batches, job.layout.global_batch, window)
        return data

    return watched_data


class _Loader(SimpleNamespace):
    """What `train_one_epoch` asks of a loader."""

    def __init__(self, batches: Any, num_batches: int, batch: int, window: Window) -> None:
        super().__init__(num_batches=num_batches, num_samples=num_batches * batch)
        self._batches, self._window = batches, window

    def __iter__(self) -> Iterator[Any]:
        return self._window.watched(iter(self._batches))


def _again(batch: Any, times: int) -> Iterator[Any]:
    for _ in range(times):
        yield batch


def _watched_epoch(window: Window, num_parameters: list[int]) -> Any:
    """In the place of `train_one_epoch`."""
    train_one_epoch = open_clip_main.train_one_epoch

    def watched_epoch(model: Any, data: Any, loss: Any, epoch: int, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        num_parameters.append(sum(parameter.numel() for parameter in model.parameters()))
        optimizer.step = window.watch.timed(optimizer.step, STEP)
        optimizer.zero_grad = window.watch.timed(optimizer.zero_grad, STEP)
        timed_model, timed_loss = TimedCall(model, window.watch, FORWARD), TimedCall(loss, window.watch, LOSS)
        train_one_epoch(timed_model, data, timed_loss, epoch, optimizer, *args, **kwargs)

    return watched_epoch
