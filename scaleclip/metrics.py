"""What a run tells while it trains: rows in metrics.jsonl, a progress bar, Weights & Biases.

One row a log step; between log steps nothing is read from the device.
"""

import contextlib
import json
import logging
import math
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from scaleclip.config import MetricsConfig
from scaleclip.errors import RunError
from scaleclip.evaluation.results import Figure
from scaleclip.evaluation.saved import drop_after, evaluations
from scaleclip.files import write_atomic
from scaleclip.run_folder import PROGRESS, wandb_id

# Dense bf16 peak in TFLOP/s by a part of the device's name, from the makers' data sheets.
_PEAK_BF16_TFLOPS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "MI300X": 1307}
# Above this share of waiting the progress line names the loader's slowest stage.
_SLOW_DATA = 0.1
_ROWS, _EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"
_SENT = "sent.jsonl"
_CHECKPOINT_STEP = "checkpoint_step"


class Row(NamedTuple):
    """A row of metrics.jsonl."""

    step: int
    """Optimizer steps done."""
    samples: int
    """Pairs seen since the run's start."""
    stage: int
    """Number of the stage, from 0 on."""
    epoch: float
    """Passes over the stage's data."""
    loss: float | None
    """Loss of this step's global batch; null where it is not finite."""
    terms: dict[str, float | None]
    """Terms of the loss by name, before their weights."""
    lr: float
    """Learning rate of this step."""
    logit_scale: float
    """Multiplier of the similarities before this step."""
    grad_norm: float | None
    """Global L2 norm of the gradients before clipping; null where it is not finite."""
    pairs_per_s: float
    """Pairs a second, all ranks, since the row before."""
    tflops: float
    """Model TFLOP/s a rank since the row before: three forward passes a step."""
    mfu: float | None
    """`tflops` as a share of the device's bf16 peak; null where that is unknown."""
    data_wait: float
    """Share of the time since the row before in which ranks waited for batches, the mean over all."""
    loader: dict[str, float]
    """Share of the loaders' time by stage since the row before, all ranks: what they wait for."""
    mix: dict[str, float]
    """Realised share of each source (`source/NAME`) and of each text in its view (`text/VIEW/NAME`) since the row before."""
    cache: dict[str, int]
    """Remote shards since the row before, all ranks: downloads, downloaded_bytes, retries, evictions."""
    lost_workers: int
    """Times that loader processes died and were replaced since this start, all ranks."""
    memory_gib: float
    """Peak memory of rank 0: allocated on the GPU, or resident without one."""
    reduced_mib: float
    """MiB of gradients that rank 0 hands to DeepSpeed's collectives in a step."""
    gathered_mib: float
    """MiB of parameters that rank 0 hands to them in a step."""
    num_chunks: int
    """Chunks of a rank's share; with more than one, each is encoded twice a step."""
    loss_scale: float
    """What fp16's loss is multiplied by for the backward pass; 1 otherwise."""
    bad_steps: int
    """Steps since the run's start that were left out, because loss or gradients were not finite."""
    mirror_failures: int
    """Failed tries to send a checkpoint to its mirror since this start; they are made again."""
    invalid: dict[str, int]
    """Samples that could not be used since the run's start, by source and cause."""
    world_size: int
    """Ranks."""
    train_s: float
    """Seconds of training since the run's start, over all starts."""


class Metrics:
    """Writes rows. Rank 0 only.

    Args:
        folder: the run's folder.
        config: where else to write.
        run_config: the resolved configuration, for Weights & Biases.
        step: the step that the run goes on from; rows after it, of work that was lost, are dropped.
        steps: the step at which the run ends.
    """

    def __init__(self, folder: Path, config: MetricsConfig, run_config: dict[str, Any], step: int, steps: int) -> None:
        self._folder = folder
        self._open(step)
        self._wandb = _start_wandb(folder, config, run_config)
        self._console = Console()
        self._progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[news]}"), console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("training", completed=step, total=steps, news="")
        self._progress.start()

    def _open(self, step: int) -> None:
        self._rows, self._evaluations = (_open_dropping_lost(self._folder / name, step) for name in (_ROWS, _EVALUATIONS))
        drop_after(self._folder, step)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self._progress.update(self._task, completed=step)

    def write(self, row: Row) -> None:
        """Append a row."""
        _append(self._rows, row._asdict())
        if self._wandb is not None:
            self._wandb.log(row._asdict(), step=row.step)
        invalid = sum(row.invalid.values())
        loss = "not finite" if row.loss is None else f"{row.loss:.3f}"
        news = f"loss {loss}  {row.pairs_per_s:,.0f} pairs/s  scale {row.logit_scale:.1f}"
        news += f"  data wait {row.data_wait:.0%}"
        if row.data_wait > _SLOW_DATA and row.loader:
            news += f" ({max(row.loader, key=lambda stage: row.loader[stage])})"
        if invalid:
            news += f"  invalid {invalid} ({max(row.invalid, key=lambda cause: row.invalid[cause])})"
        news += f"  bad steps {row.bad_steps}" if row.bad_steps else ""
        self._progress.update(self._task, news=news)
        line = f"step {row.step}  {news}"
        logging.getLogger(PROGRESS).info(line)
        if not self._console.is_terminal:
            self._console.print(line, highlight=False)

    def write_figures(self, step: int, figures: Sequence[Figure]) -> None:
        """A row in evaluations.jsonl, and the figures beside the training curves in Weights & Biases."""
        _append(self._evaluations, {"step": step, "figures": [figure._asdict() for figure in figures]})
        if self._wandb is not None:
            self._wandb.log(_by_name(figures), step=step)

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`, to which the run went back."""
        for file in (self._rows, self._evaluations):
            file.close()
        self._open(step)
        self.advance(step)

    def close(self) -> None:
        """End the bar and the files."""
        self._progress.stop()
        for file in (self._rows, self._evaluations):
            with contextlib.suppress(OSError):  # a full disk was reported when the row was written
                file.close()
        if self._wandb is not None:
            self._wandb.finish()


class EvaluationLog:
    """Figures of a run's checkpoints in Weights & Biases, by a process beside the one that trains. Rank 0 only.

    They become a run of their own there, NAME evaluation, against the step of the checkpoint: a second writer of the training's
    run would have its steps refused, being behind. Nothing where the run has `metrics.wandb=disabled`. What was sent is noted
    in RUN/evaluations/sent.jsonl, so that a process that was killed in between sends it at its next start, and nothing twice.

    Args:
        folder: the run's folder.
        config: where the run logs.
    """

    def __init__(self, folder: Path, config: MetricsConfig) -> None:
        self._wandb = _start_wandb(folder, config, {}, "evaluation")
        self._note = evaluations(folder) / _SENT
        self._sent = read_whole_lines(self._note)
        if self._wandb is not None:
            self._wandb.define_metric("eval/*", step_metric=_CHECKPOINT_STEP)

    def write(self, step: int, figures: Sequence[Figure]) -> None:
        """The figures of the checkpoint after `step` optimizer steps."""
        row = _by_name(figures) | {_CHECKPOINT_STEP: step}
        if self._wandb is None or row in self._sent:
            return
        self._wandb.log(row)
        self._sent.append(row)
        self._note.parent.mkdir(exist_ok=True)
        write_atomic(self._note, "".join(json.dumps(each) + "\n" for each in self._sent))

    def close(self) -> None:
        """End it."""
        if self._wandb is not None:
            self._wandb.finish()


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; a last line that a crash cut short is left out."""
    return read_whole_lines(folder / _ROWS)


def read_evaluations(folder: Path) -> list[tuple[int, list[Figure]]]:
    """The rows of a run's evaluations.jsonl: steps, and what was measured while the run trained."""
    return [(row["step"], [Figure(**each) for each in row["figures"]]) for row in read_whole_lines(folder / _EVALUATIONS)]


def read_whole_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, none where there is no file; a last line that a crash cut short is left out."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def finite(value: float) -> float | None:
    """The value, or None where it is none that JSON knows."""
    return value if math.isfinite(value) else None


def peak_tflops(device: torch.device) -> float | None:
    """The device's dense bf16 peak, if it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_BF16_TFLOPS.items() if part in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated on the GPU, or resident without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _open_dropping_lost(path: Path, step: int) -> TextIO:
    """Open to append, without the rows after `step`: their work was lost and will be done again."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in read_whole_lines(path) if row["step"] <= step))
    return path.open("a")


def _append(file: TextIO, row: dict[str, Any]) -> None:
    try:
        file.write(json.dumps(row) + "\n")
        file.flush()
    except OSError as error:
        raise RunError(
            f"cannot write {file.name}: {error.strerror}; free some disk and start again: the run goes on from its last "
            f"checkpoint"
        ) from None


def _by_name(figures: Sequence[Figure]) -> dict[str, float]:
    return {f"eval/{figure.split} {figure.metric}": figure.value for figure in figures}


def _start_wandb(folder: Path, config: MetricsConfig, run_config: dict[str, Any], part: str = "") -> Any:
    if config.wandb == "disabled":
        return None
    import wandb  # takes a second, and few runs on one machine want it

    os.environ.setdefault("WANDB_SILENT", "true")
    name, number = (f"{folder.name} {part}", f"{wandb_id(folder)}-{part}") if part else (folder.name, wandb_id(folder))
    return wandb.init(
        project=config.wandb_project, name=name, id=number, dir=folder, config=run_config, mode=config.wandb,
        resume=None if config.wandb == "offline" else "allow",
    )  # fmt: skip
