"""One run, top to bottom."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scaleclip import checkpoint, distributed
from scaleclip.checkpoint import TrainState
from scaleclip.config import RunConfig
from scaleclip.config_rules import validate
from scaleclip.data.cache import ShardCache
from scaleclip.data.loader import TrainBatches, TrainDataset
from scaleclip.data.order import hash64
from scaleclip.data.source import Source, fingerprint, open_sources
from scaleclip.data.tally import Quarantine, Tally, merge
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

# of a share that says something
_ENOUGH_SAMPLES = 10_000


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
        cache = ShardCache(config.data.cache)
        sources = open_sources(config.data.sources, cache)
        splits = open_splits(config.eval.splits, cache)
        tokenizer = load_tokenizer(config.model.text.tokenizer, config.model.text.context_length)
        check_tokenizer(config.model.text, size=tokenizer.size, end_id=tokenizer.end_id, pad_id=tokenizer.pad_id)
        dataset = TrainDataset(config, sources, cache, tokenizer, world.rank, world.size)
    _check_same_shards(sources)

    folder = Path(config.run.folder)
    with distributed.all_or_none():
        check_runs_on(world.device, config.loss)
        gemm = fp32_library(world.device, config.model.embed_dim)
        held = open_run(config, world.size, fingerprint(sources), gemm) if world.is_main else None
    start, finished = distributed.gather_objects((start_name(), finished_step(folder) == config.train.steps))[0]
    log = log_to(folder, world.rank, start)
    if finished:
        log.info(f"{folder} is finished: nothing to do")
        distributed.shutdown()
        return folder
    share = -(-config.train.global_batch // world.size)
    for source in sources:
        quota = dataset.quota(source.name)
        log.info(
            f"{source.name}: {source.manifest.num_samples:,} samples in {len(source.manifest.shards):,} shards; {quota:,} of "
            f"every global batch; {config.train.steps * quota / source.manifest.num_samples:.1f} epochs"
        )
    log.info(f"global batch {config.train.global_batch:,} = {world.size} x {share:,} pairs; {config.train.steps:,} steps")

    torch.manual_seed(config.run.seed)
    model = DualEncoder(config.model)
    step_flops = 3 * share * forward_flops(model, config.model, dataset.num_tokens, len(config.data.views))
    engine = build_engine(config, model, world)
    resumed = checkpoint.find(folder, world)
    state = TrainState(world_size=world.size)
    if resumed is not None:
        state = checkpoint.load(engine, resumed, world, config.train.zero_stage)
        log.info(f"going on from {resumed}")

    steps = config.train.steps
    # loader processes first: a fork must not copy the locks of the progress bar's and wandb's threads
    local_ranks, pin_memory = distributed.ranks_on_this_node(), world.device.type == "cuda"
    batches = TrainBatches(dataset, state.step, steps, config.data, pin_memory=pin_memory, local_ranks=local_ranks)
    metrics: Metrics | None = None
    with distributed.all_or_none():
        if world.is_main:
            metrics = Metrics(folder, config.metrics, config.model_dump(mode="json"), state.step, steps)
    peak = peak_tflops(world.device)
    tally = Tally()
    with distributed.all_or_none():
        quarantine = Quarantine(folder if world.is_main else None)
    samples_an_epoch = sum(source.manifest.num_samples for source in sources)
    interval_start, wait_s, logged_step = time.perf_counter(), 0.0, state.step
    model.train()
    stop = StopSignal()
    try:
        while state.step < steps:
            asked_s = time.monotonic()
            batch = next(batches)
            received_s = time.monotonic()
            wait_s += received_s - asked_s
            tally.add(batch, asked_s, received_s)

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
                tally.lost_workers = batches.lost_workers
                tally.cache.update(cache.take_counts())
                signals, tally = _exchange(tally, stop, state)
                with distributed.all_or_none():
                    quarantine.add(tally.faults)
                _check_health(loss_now, grad_norm.item(), state, config)
                _check_data(
                    len(tally.faults), (state.step - logged_step) * config.train.global_batch, state, config, quarantine
                )
                tflops = step_flops * (state.step - logged_step) / interval_s / 1e12
                with distributed.all_or_none():
                    if metrics:
                        metrics.write(
                            Row(
                                step=state.step,
                                samples=state.samples,
                                epoch=state.samples / samples_an_epoch,
                                loss=loss_now,
                                lr=lr,
                                logit_scale=features.logit_scale.item(),
                                grad_norm=grad_norm.item(),
                                pairs_per_s=config.train.global_batch * (state.step - logged_step) / interval_s,
                                tflops=tflops,
                                mfu=None if peak is None else tflops / peak,
                                data_wait=wait_s / interval_s,
                                loader=tally.shares(),
                                mix=tally.mix(),
                                cache=dict(tally.cache),
                                lost_workers=tally.lost_workers,
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
                interval_start, wait_s, logged_step, tally = time.perf_counter(), 0.0, state.step, Tally()
        with distributed.all_or_none():
            if metrics:
                figures = evaluate(model, tokenizer, splits, config)
                metrics.write_figures(state.step, figures)
                # the last thing that a run writes
                write_results(folder, state.step, figures)
    finally:
        batches.close()
        if metrics:
            metrics.close()
        if held:
            held.close()
    distributed.shutdown()
    return folder


def _check_same_shards(sources: Sequence[Source]) -> None:
    prints = distributed.gather_objects([source.manifest.fingerprint for source in sources])
    for number, source in enumerate(sources):
        strange = [rank for rank, found in enumerate(prints) if found[number] != prints[0][number]]
        if strange:
            raise ConfigError(
                f"data.sources.{source.name} names other shards, or other sample counts, on ranks {strange} than on rank 0: "
                f"let all nodes see the same files"
            )


def _to_device(part: Tensor | tuple[Tensor, ...], world: World) -> Any:
    if isinstance(part, tuple):
        return tuple(_to_device(tensor, world) for tensor in part)
    return part.to(world.device, non_blocking=True)


def _exchange(tally: Tally, stop: StopSignal, state: TrainState) -> tuple[int, Tally]:
    """The number of a stop signal that any rank got, or 0, and all ranks' tally, whose faults are added to `state`."""
    every = distributed.gather_objects((tally, stop.received))
    whole = merge(tally for tally, _ in every)
    for fault in whole.faults:
        name = f"{fault.source}/{fault.cause}"
        state.faults[name] = state.faults.get(name, 0) + 1
    return max(int(received) for _, received in every), whole


def _check_health(loss: float, grad_norm: float, state: TrainState, config: RunConfig) -> None:
    """Raise, on every rank alike, when going on would waste the run or save what is spoilt."""
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise RunError(
            f"at step {state.step} the loss is {loss} and the gradients' norm {grad_norm}; it began within the last "
            f"{config.metrics.log_every_steps} steps, and checkpoints are from before. Start another run.folder with a lower "
            f"optim.lr, a longer optim.warmup_samples or train.precision=fp32"
        )


def _check_data(bad_lately: int, seen_lately: int, state: TrainState, config: RunConfig, quarantine: Quarantine) -> None:
    """Raise, on every rank alike, when too many samples could not be used, of all or of the last ones.

    A store that fails after billions of good samples would not show in the share of all.
    """
    bad_of_seen = [(sum(state.faults.values()), state.samples)]
    if seen_lately >= _ENOUGH_SAMPLES:
        bad_of_seen.append((bad_lately, seen_lately))
    for bad, seen in bad_of_seen:
        if bad <= config.data.max_bad_fraction * seen:
            continue
        raise RunError(
            f"{bad:,} of the last {seen:,} samples could not be used (of all since the run's start: {state.faults}), more than "
            f"data.max_bad_fraction={config.data.max_bad_fraction}; the worst shards: {quarantine.worst()}; the last "
            f"fault: {quarantine.last}. See to the store's address and credentials or the cache's room if it is that; mend or "
            f"replace shards, leave out what quarantine.jsonl in {config.run.folder} lists (`scaleclip data subset --drop`), "
            f"or raise the limit"
        )
