"""One run, top to bottom."""

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from scaleclip import distributed
from scaleclip.checkpoint.checkpointer import Checkpointer
from scaleclip.checkpoint.folders import saved
from scaleclip.checkpoint.state import TrainState
from scaleclip.config import RunConfig
from scaleclip.config_io import origin
from scaleclip.config_rules import validate
from scaleclip.data.cache import ShardCache
from scaleclip.data.loader import TrainBatches, TrainDataset
from scaleclip.data.source import Source, fingerprint, open_sources
from scaleclip.data.tally import Intake, Quarantine, Tally, merge
from scaleclip.data.tokenizer import load_tokenizer
from scaleclip.engine import Engine
from scaleclip.errors import ConfigError, RunError, Stopped
from scaleclip.evaluation.evaluate import evaluate
from scaleclip.evaluation.results import finished_step, write_results
from scaleclip.evaluation.splits import open_splits
from scaleclip.fit import choose_micro_batch, explain_full_memory
from scaleclip.guard import BadSteps, StopSignal, Watchdog, record_bad_steps
from scaleclip.losses.objective import check_runs_on
from scaleclip.metrics import Metrics, Row, finite, peak_memory_gib, peak_tflops
from scaleclip.models.towers import check_tokenizer
from scaleclip.planning.counting import count_flops
from scaleclip.run_folder import log_to, open_run, start_name
from scaleclip.runtime import collected_at_log_steps, traced
from scaleclip.schedule import learning_rate
from scaleclip.status import StatusFile, mark_finished
from scaleclip.step import TrainStep
from scaleclip_kernels.gemm import fp32_library

# of a share that says something
_ENOUGH_SAMPLES = 10_000


def train(config: RunConfig, *, profile: bool = False) -> Path:
    """Train the run that `config` describes, or go on with it where it stopped, and evaluate it. Every rank calls.

    Returns the run's folder. With `profile` a trace of a few steps of this start is written there.

    Raises:
        ConfigError: the configuration, the data, the devices and the run's folder do not fit together.
        Stopped: a signal asked the run to stop; everything up to then is saved.
        RunError: steps fail again and again, too many samples are invalid, memory is full, or a checkpoint cannot be written
            or read.
    """
    stop = StopSignal()
    world = distributed.init(Path(config.run.folder) / "log")
    validate(config, world.size)
    with distributed.all_or_none():
        cache = ShardCache(config.data.cache)
        sources = open_sources(config.data.sources, cache)
        splits = open_splits(config.eval.splits, cache)
        tokenizer = load_tokenizer(config.model.text.tokenizer, config.model.text.context_length)
        check_tokenizer(config.model.text, size=tokenizer.size, end_id=tokenizer.end_id, pad_id=tokenizer.pad_id)
    _check_same_shards(sources)

    folder = Path(config.run.folder)
    with distributed.all_or_none():
        check_runs_on(world.device, config.loss)
        gemm = fp32_library(world.device, config.model.embed_dim)
        lock = open_run(config, world.size, fingerprint(sources), gemm) if world.is_main else None
    start, finished = distributed.gather_objects((start_name(), finished_step(folder) == config.train.steps))[0]
    log = log_to(folder, world.rank, start)
    if finished:
        log.info(f"{folder} is finished: nothing to do")
        if world.is_main:
            mark_finished(folder)
        distributed.shutdown()
        return folder

    status: StatusFile | None = None
    with distributed.all_or_none():
        if world.is_main:
            status = StatusFile(folder, world.size, config.train.steps, config.guard.max_idle_starts)
    micro_batch = choose_micro_batch(config, world)
    with distributed.all_or_none():
        dataset = TrainDataset(config, sources, cache, tokenizer, world.rank, world.size, micro_batch)
    share, steps = config.train.share(world.size), config.train.steps
    for source in sources:
        quota = dataset.quota(source.name)
        log.info(
            f"{source.name}: {source.manifest.num_samples:,} samples in {len(source.manifest.shards):,} shards; {quota:,} of "
            f"every global batch; {steps * quota / source.manifest.num_samples:.1f} epochs"
        )
    in_chunks = "" if dataset.num_chunks == 1 else f", each in {dataset.num_chunks} chunks of up to {micro_batch:,}"
    log.info(f"global batch {config.train.global_batch:,} = {world.size} x {share:,} pairs{in_chunks}; {steps:,} steps")

    # weights that a checkpoint has need not be read from elsewhere first
    resumes = distributed.gather_objects(bool(saved(folder)))[0]
    model = config.model.without_pretrained() if resumes else config.model
    with explain_full_memory(config, world, micro_batch):
        engine = Engine(config.model_copy(update={"model": model}), world)
        checkpointer = Checkpointer(folder, world, engine.shard, config.checkpoint, origin(config, fingerprint(sources)))
    step_flops = 3 * share * count_flops(config.model, config.data).forward
    take_step = TrainStep(engine, config, world, micro_batch)
    state = checkpointer.load_newest() or TrainState()
    engine.refresh()
    state.world_size, state.zero_stage = world.size, config.train.zero_stage

    # loader processes first: a fork must not copy the locks of the progress bar's and wandb's threads
    pin_memory = world.device.type == "cuda"
    batches = TrainBatches(
        dataset, *_items(state, steps, dataset), config.data, pin_memory=pin_memory, local_ranks=world.local_size
    )
    intake = Intake(batches)
    metrics: Metrics | None = None
    with distributed.all_or_none():
        if world.is_main:
            metrics = Metrics(folder, config.metrics, config.model_dump(mode="json"), state.step, steps)
        quarantine = Quarantine(folder if world.is_main else None)
    peak = peak_tflops(world.device)
    samples_an_epoch = sum(source.manifest.num_samples for source in sources)
    bad_steps = BadSteps(config.guard.max_bad_steps)
    went_back_to: int | None = None
    save_is_due = False
    interval_start, logged_step = time.perf_counter(), state.step
    engine.model.train()
    stop.can_save()
    with ExitStack() as at_end:
        for held in (lock, metrics, batches):
            if held is not None:
                at_end.callback(held.close)
        if status:
            status.resume(state.step, state.samples)
            at_end.enter_context(status.watch())
        with (
            Watchdog(config.guard.hang_timeout_s, folder / "log" / start / f"{world.rank}.stacks") as watchdog,
            collected_at_log_steps() as collect,
            traced(folder / "profile" / f"{start}-{world.rank}.json" if profile else None) as trace,
        ):
            while state.step < steps:
                lr = learning_rate(state.step, config.optim, config.train)
                with explain_full_memory(config, world, micro_batch):
                    result = take_step(intake, state.step, lr)
                state.step += 1
                state.samples += config.train.global_batch
                bad_steps.note(state.step, result.bad, intake.take_keys())
                watchdog.beat()
                trace.step()
                if metrics:
                    metrics.advance(state.step)

                last = state.step == steps
                save_now = last or state.step % config.checkpoint.every_steps == 0
                evaluate_now = not last and config.eval.every_steps > 0 and state.step % config.eval.every_steps == 0
                if not (state.step % config.metrics.log_every_steps == 0 or save_now or evaluate_now):
                    continue
                # the first read from the device since the last log step
                loss, grad_norm, logit_scale, loss_scale = torch.stack([*result[:3], engine.loss_scale]).tolist()
                interval_s, num_steps = time.perf_counter() - interval_start, state.step - logged_step
                state.train_s += interval_s
                traffic, tally = engine.traffic.take(), intake.take_tally()
                tally.lost_workers = batches.lost_workers
                tally.cache.update(cache.take_counts())
                signals, tally = _exchange(tally, stop, state)
                bad = bad_steps.read()
                state.bad_steps += len(bad)
                with distributed.all_or_none():
                    quarantine.add(tally.faults)
                    if bad and world.is_main:
                        record_bad_steps(folder, bad)
                        log.warning(f"left out, since loss or gradients were not finite: {[each.step for each in bad]}")
                _check_data(len(tally.faults), num_steps * config.train.global_batch, state, config, quarantine)
                tflops = step_flops * num_steps / interval_s / 1e12
                pairs_per_s = config.train.global_batch * num_steps / interval_s
                with distributed.all_or_none():
                    if status:
                        status.advance(state.step, state.samples, pairs_per_s)
                    if metrics:
                        metrics.write(
                            Row(
                                step=state.step,
                                samples=state.samples,
                                epoch=state.samples / samples_an_epoch,
                                loss=finite(loss),
                                lr=lr,
                                logit_scale=logit_scale,
                                grad_norm=finite(grad_norm),
                                pairs_per_s=pairs_per_s,
                                tflops=tflops,
                                mfu=None if peak is None else tflops / peak,
                                data_wait=tally.wait_s / world.size / interval_s,
                                loader=tally.shares(),
                                mix=tally.mix(),
                                cache=dict(tally.cache),
                                lost_workers=tally.lost_workers,
                                memory_gib=peak_memory_gib(world.device),
                                reduced_mib=traffic["reduced_bytes"] / num_steps / 2**20,
                                gathered_mib=traffic["gathered_bytes"] / num_steps / 2**20,
                                num_chunks=dataset.num_chunks,
                                loss_scale=loss_scale,
                                bad_steps=state.bad_steps,
                                mirror_failures=checkpointer.mirror_failures,
                                invalid=state.faults,
                                world_size=world.size,
                                train_s=state.train_s,
                            )
                        )
                checkpointer.poll()
                if bad_steps.too_many and not signals:
                    with watchdog.paused():
                        previous = checkpointer.load_newest(ask_mirror=False)
                    state = _go_back(state, previous, went_back_to, config)
                    went_back_to = state.step
                    engine.refresh()
                    bad_steps.forgive()
                    batches.restart(*_items(state, steps, dataset))
                    with distributed.all_or_none():
                        if metrics:
                            metrics.rewind(state.step)
                    save_is_due, interval_start, logged_step = False, time.perf_counter(), state.step
                    continue
                save_is_due |= save_now
                # what failing steps leave behind is no good place to go back to
                if signals or last or (save_is_due and not bad_steps.in_a_row):
                    save_is_due = False
                    with watchdog.paused():
                        checkpointer.save(state)
                if signals and not last:
                    with watchdog.paused():
                        checkpointer.finish()
                    raise Stopped(signals, state.step)
                if evaluate_now:
                    with watchdog.paused():
                        figures = evaluate(engine.whole_model(), tokenizer, splits, config)
                    with distributed.all_or_none():
                        if metrics:
                            metrics.write_figures(state.step, figures)
                collect()
                interval_start, logged_step = time.perf_counter(), state.step
        checkpointer.finish()
        figures = evaluate(engine.whole_model(), tokenizer, splits, config)
        with distributed.all_or_none():
            if metrics:
                metrics.write_figures(state.step, figures)
                # the last thing that a run writes
                write_results(folder, state.step, figures)
    distributed.shutdown()
    return folder


def _items(state: TrainState, steps: int, dataset: TrainDataset) -> tuple[int, int]:
    """First and last + 1 item of the dataset that a run needs from `state` to its end."""
    return state.batch * dataset.num_chunks, (state.batch + steps - state.step) * dataset.num_chunks


def _go_back(failed: TrainState, previous: TrainState | None, went_back_to: int | None, config: RunConfig) -> TrainState:
    """The state to go on from after too many bad steps: the last checkpoint's, the batches since then left out.

    Raises:
        RunError: there is no checkpoint, or the run went back to this one before: on every rank alike.
    """
    if previous is None or previous.step == went_back_to:
        again = (
            "and there is no checkpoint to go back to" if previous is None else "again after going back and leaving them out"
        )
        raise RunError(
            f"the loss or its gradients were not finite in {config.guard.max_bad_steps} steps in a row, up to step "
            f"{failed.step}, {again}: the model diverges. bad_steps.jsonl in {config.run.folder} has the steps and their "
            f"samples' keys. Start another run.folder with a lower optim.lr, a longer optim.warmup_samples, optim.clip_norm or "
            f"train.precision=fp32"
        )
    left_out = failed.batch - previous.step
    logging.getLogger("scaleclip").warning(
        f"{config.guard.max_bad_steps} bad steps in a row up to {failed.step}: back to step {previous.step}, leaving out the "
        f"{left_out - previous.batches_left_out} batches since"
    )
    return replace(failed, step=previous.step, samples=previous.samples, faults=previous.faults, batches_left_out=left_out)


def _check_same_shards(sources: Sequence[Source]) -> None:
    prints = distributed.gather_objects([source.manifest.fingerprint for source in sources])
    for number, source in enumerate(sources):
        strange = [rank for rank, found in enumerate(prints) if found[number] != prints[0][number]]
        if strange:
            raise ConfigError(
                f"data.sources.{source.name} names other shards, or other sample counts, on ranks {strange} than on rank 0: "
                f"let all nodes see the same files"
            )


def _exchange(tally: Tally, stop: StopSignal, state: TrainState) -> tuple[int, Tally]:
    """The number of a stop signal that any rank got, or 0, and all ranks' tally, whose faults are added to `state`."""
    every = distributed.gather_objects((tally, stop.received))
    whole = merge(tally for tally, _ in every)
    for fault in whole.faults:
        name = f"{fault.source}/{fault.cause}"
        state.faults[name] = state.faults.get(name, 0) + 1
    return max(int(received) for _, received in every), whole


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
