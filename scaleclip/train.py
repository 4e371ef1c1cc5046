"""One run, top to bottom."""

import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scaleclip import checkpoint, distributed
from scaleclip.checkpoint import TrainState
from scaleclip.config import RunConfig, validate
from scaleclip.data.loader import Batch, TrainDataset, train_batches
from scaleclip.data.manifest import Manifest, load_manifest
from scaleclip.data.order import hash64
from scaleclip.data.tokenizer import load_tokenizer
from scaleclip.distributed import World
from scaleclip.engine import build_engine, clip_gradients
from scaleclip.errors import ConfigError, RunError, Stopped
from scaleclip.evaluation.evaluate import evaluate
from scaleclip.evaluation.results import finished_step, write_results
from scaleclip.evaluation.splits import open_splits
from scaleclip.guard import StopSignal
from scaleclip.losses.objective import check_runs_on, contrastive
from scaleclip.metrics import Metrics, Row, peak_memory_gib, peak_tflops
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.models.flops import forward_flops
from scaleclip.models.towers import check_tokenizer
from scaleclip.optim import set_learning_rate
from scaleclip.run_folder import log_to, open_run, start_name
from scaleclip.schedule import learning_rate
from scaleclip_kernels.gemm import fp32_library


def train(config: RunConfig) -> Path:
    """Train the run that `config` describes, or go on with it where it stopped, and evaluate it. Every rank calls.

    Returns the run's folder.

    Raises:
        ConfigError: the configuration, the data, the devices and the run's folder do not fit together.
        Stopped: a signal asked the run to stop; everything up to then is saved.
        RunError: the loss is not finite, too many samples are invalid, or a checkpoint cannot be written or read.
    """
    world = distributed.init()
    validate(config, world.size)
    with distributed.all_or_none():
        manifest = load_manifest(config.data.shards, config.data.manifest)
        splits = open_splits(config.eval.splits)
        tokenizer = load_tokenizer(config.model.text.tokenizer, config.model.text.context_length)
        check_tokenizer(config.model.text, size=tokenizer.size, end_id=tokenizer.end_id, pad_id=tokenizer.pad_id)
        dataset = TrainDataset(config, manifest, tokenizer, world.rank, world.size)
    _check_same_shards(manifest)

    folder = Path(config.run.folder)
    with distributed.all_or_none():
        check_runs_on(world.device, config.loss)
        gemm = fp32_library(world.device, config.model.embed_dim)
        held = open_run(config, world.size, manifest.fingerprint, gemm) if world.is_main else None
    start, finished = distributed.gather_objects((start_name(), finished_step(folder) == config.train.steps))[0]
    log = log_to(folder, world.rank, start)
    if finished:
        log.info(f"{folder} is finished: nothing to do")
        distributed.shutdown()
        return folder
    share = -(-config.train.global_batch // world.size)
    log.info(
        f"{manifest.num_samples:,} samples in {len(manifest.shards):,} shards; global batch {config.train.global_batch:,} = "
        f"{world.size} x {share:,} pairs; {config.train.steps:,} steps = "
        f"{config.train.samples / manifest.num_samples:.1f} epochs"
    )

    torch.manual_seed(config.run.seed)
    model = DualEncoder(config.model)
    step_flops = 3 * share * forward_flops(model, config.model)
    engine = build_engine(config, model, world)
    resumed = checkpoint.find(folder, world)
    state = TrainState(world_size=world.size)
    if resumed is not None:
        state = checkpoint.load(engine, resumed, world, config.train.zero_stage)
        log.info(f"going on from {resumed}")

    steps = config.train.steps
    # loader processes first: a fork must not copy the locks of the progress bar's and wandb's threads
    batches = train_batches(dataset, state.step, steps, config, pin_memory=world.device.type == "cuda")
    metrics: Metrics | None = None
    with distributed.all_or_none():
        if world.is_main:
            metrics = Metrics(folder, config.metrics, config.model_dump(mode="json"), state.step, steps)
    peak = peak_tflops(world.device)
    faults: Counter[str] = Counter()
    interval_start, wait_s, logged_step = time.perf_counter(), 0.0, state.step
    model.train()
    stop = StopSignal()
    try:
        while state.step < steps:
            wait_start = time.perf_counter()
            batch: Batch = next(batches)
            wait_s += time.perf_counter() - wait_start
            faults.update(batch.faults)

            lr = learning_rate(state.step, config.optim, config.train)
            set_learning_rate(engine.optimizer, lr)
            # dropout's numbers depend on the step and the rank alone, so there is no random state to save
            torch.manual_seed(int(hash64(config.run.seed, state.step, world.rank)[0]))
            pixels, tokens, ids, valid, seeds = (_to_device(part, world) for part in batch[:5])
            features = engine(pixels, tokens, seeds)
            loss = contrastive(features, ids, valid, config.loss)
            engine.backward(loss)
            grad_norm = clip_gradients(engine, config.optim)
            engine.step()
            state.step += 1
            state.samples += config.train.global_batch
            if metrics:
                metrics.advance(state.step)

            last = state.step == steps
            save_now = last or state.step % config.checkpoint.every_steps == 0
            evaluate_now = not last and config.eval.every_steps > 0 and state.step % config.eval.every_steps == 0
            if state.step % config.metrics.log_every_steps == 0 or save_now or evaluate_now:
                # the first read from the device since the last log step
                loss_now = loss.item()
                interval_s = time.perf_counter() - interval_start
                state.train_s += interval_s
                signals = _exchange(faults, stop, state)
                _check_health(loss_now, grad_norm.item(), state, config)
                tflops = step_flops * (state.step - logged_step) / interval_s / 1e12
                with distributed.all_or_none():
                    if metrics:
                        metrics.write(
                            Row(
                                step=state.step,
                                samples=state.samples,
                                epoch=state.samples / manifest.num_samples,
                                loss=loss_now,
                                lr=lr,
                                logit_scale=features.logit_scale.item(),
                                grad_norm=grad_norm.item(),
                                pairs_per_s=config.train.global_batch * (state.step - logged_step) / interval_s,
                                tflops=tflops,
                                mfu=None if peak is None else tflops / peak,
                                data_wait=wait_s / interval_s,
                                memory_gib=peak_memory_gib(world.device),
                                invalid=state.faults,
                                world_size=world.size,
                                train_s=state.train_s,
                            )
                        )
                if save_now or signals:
                    checkpoint.save(engine, folder, state, world, config.checkpoint.keep)
                if signals and not last:
                    raise Stopped(signals, state.step)
                with distributed.all_or_none():
                    if evaluate_now and metrics:
                        metrics.write_figures(state.step, evaluate(model, tokenizer, splits, config))
                interval_start, wait_s, logged_step = time.perf_counter(), 0.0, state.step
        with distributed.all_or_none():
            if metrics:
                figures = evaluate(model, tokenizer, splits, config)
                metrics.write_figures(state.step, figures)
                # the last thing that a run writes
                write_results(folder, state.step, figures)
    finally:
        if metrics:
            metrics.close()
        if held:
            held.close()
    distributed.shutdown()
    return folder


def _check_same_shards(manifest: Manifest) -> None:
    fingerprints = distributed.gather_objects(manifest.fingerprint)
    strange = [rank for rank, found in enumerate(fingerprints) if found != fingerprints[0]]
    if strange:
        raise ConfigError(
            f"data.shards names other shards, or other sample counts, on ranks {strange} than on rank 0: "
            f"let all nodes see the same files"
        )


def _to_device(part: Tensor | tuple[Tensor, ...], world: World) -> Any:
    if isinstance(part, tuple):
        return tuple(_to_device(tensor, world) for tensor in part)
    return part.to(world.device, non_blocking=True)


def _exchange(faults: Counter[str], stop: StopSignal, state: TrainState) -> int:
    """Add every rank's faults since the last exchange to `state`; the number of a stop signal that any rank got, or 0."""
    every = distributed.gather_objects((dict(faults), stop.received))
    faults.clear()
    for counted, _ in every:
        for cause, number in counted.items():
            state.faults[cause] = state.faults.get(cause, 0) + number
    return max(int(received) for _, received in every)


def _check_health(loss: float, grad_norm: float, state: TrainState, config: RunConfig) -> None:
    """Raise, on every rank alike, when going on would waste the run or save what is spoilt."""
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise RunError(
            f"at step {state.step} the loss is {loss} and the gradients' norm {grad_norm}; it began within the last "
            f"{config.metrics.log_every_steps} steps, and checkpoints are from before. Start another run.folder with a lower "
            f"optim.lr, a longer optim.warmup_samples or train.precision=fp32"
        )
    bad = sum(state.faults.values())
    if bad > config.data.max_invalid_fraction * state.samples:
        raise RunError(
            f"{bad:,} of {state.samples:,} samples could not be used ({state.faults}), more than "
            f"data.max_invalid_fraction={config.data.max_invalid_fraction}: mend the shards or raise the limit"
        )
