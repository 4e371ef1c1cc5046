"""One stage of a run: from a checkpoint, or from nothing, to the checkpoint that the next stage goes on from."""

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from scaleclip import distributed
from scaleclip.checkpoint.border import Border
from scaleclip.checkpoint.checkpointer import Checkpointer, Found
from scaleclip.checkpoint.state import TrainState
from scaleclip.config import RunConfig
from scaleclip.data.batches import TrainBatches
from scaleclip.data.cache import ShardCache
from scaleclip.data.loader import TrainDataset
from scaleclip.data.source import Source
from scaleclip.data.tally import Intake, Quarantine, Tally, merge
from scaleclip.data.text_pairs import TEXT_PAIRS, TextPairs
from scaleclip.data.tokenizer import Tokenizer
from scaleclip.distributed import World
from scaleclip.engine import Engine
from scaleclip.errors import RunError, Stopped
from scaleclip.evaluation.encoder import Encoder
from scaleclip.evaluation.results import Figure, write_results
from scaleclip.evaluation.saved import evaluations
from scaleclip.evaluation.suite import OpenedSuite
from scaleclip.fit import choose_micro_batch, explain_full_memory
from scaleclip.guard import BadSteps, StopSignal, Watchdog, record_bad_steps
from scaleclip.metrics import Metrics, Row, finite, peak_memory_gib, peak_tflops
from scaleclip.models.positions import resize_positions
from scaleclip.planning.counting import count_flops
from scaleclip.runtime import collected_at_log_steps, traced
from scaleclip.schedule import learning_rate
from scaleclip.stages import Stage
from scaleclip.status import StatusFile
from scaleclip.step import TrainStep

# of a share that says something
_ENOUGH_SAMPLES = 10_000
log = logging.getLogger("scaleclip")


class StageData(NamedTuple):
    """What a stage reads."""

    sources: list[Source]
    text_pairs: TextPairs | None
    tokenizer: Tokenizer
    fingerprint: str
    """Of the samples, wherever they lie."""


@dataclass
class Run:
    """What the stages of a run share."""

    config: RunConfig
    folder: Path
    start: str
    """Name of this start."""
    world: World
    cache: ShardCache
    suite: OpenedSuite
    """What is measured of the model."""
    total_steps: int
    checkpointer: Checkpointer
    quarantine: Quarantine
    stop: StopSignal
    status: StatusFile | None
    """On rank 0."""
    profile: bool
    """Whether a trace of a few steps is to be written; the first stage of a start does."""
    metrics: Metrics | None = field(default=None, init=False)
    """On rank 0, once a stage trains."""
    has_begun: bool = field(default=False, init=False)
    bad_steps: BadSteps = field(init=False)

    def __post_init__(self) -> None:
        self.bad_steps = BadSteps(self.config.guard.max_bad_steps)

    def begin(self, state: TrainState) -> None:
        """Training begins, or goes on into a further stage. The first time threads start: loader processes come before."""
        if self.has_begun:
            return
        self.has_begun = True
        with distributed.all_or_none():
            if self.world.is_main:
                whole = self.config.model_dump(mode="json")
                self.metrics = Metrics(self.folder, self.config.metrics, whole, state.step, self.total_steps)
            if self.status:
                self.status.resume(state.step, state.samples)
        self.stop.can_save()

    def take_trace_path(self) -> Path | None:
        """Where to write a trace, once."""
        wanted, self.profile = self.profile, False
        return self.folder / "profile" / f"{self.start}-{self.world.rank}.json" if wanted else None

    def close(self) -> None:
        """End what was begun."""
        if self.metrics:
            self.metrics.close()


def train_stage(run: Run, stage: Stage, data: StageData, state: TrainState, found: Found | None) -> TrainState:
    """Train from `state` to the stage's end, save and evaluate; the last one writes the run's results. Every rank calls.

    Args:
        run: what the stages share.
        stage: the one that takes step `state.step`.
        data: what it reads.
        state: of `found`, or a new one.
        found: the checkpoint to go on from, of this stage or the end of the one before; None: the run begins.

    Raises:
        see scaleclip.train.train.
    """
    config, world, checkpointer = stage.config, run.world, run.checkpointer
    micro_batch = choose_micro_batch(config, world)
    with distributed.all_or_none():
        dataset = TrainDataset(
            config, data.sources, run.cache, data.tokenizer, world.rank, world.size, micro_batch, data.text_pairs
        )
    share, steps = config.train.share(world.size), config.train.steps
    for source in data.sources:
        quota = dataset.quota(source.name)
        log.info(
            f"{source.name}: {source.manifest.num_samples:,} samples in {len(source.manifest.shards):,} shards; {quota:,} of "
            f"every global batch; {steps * quota / source.manifest.num_samples:.1f} epochs"
        )
    in_chunks = "" if dataset.num_chunks == 1 else f", each in {dataset.num_chunks} chunks of up to {micro_batch:,}"
    log.info(f"global batch {config.train.global_batch:,} = {world.size} x {share:,} pairs{in_chunks}; {steps:,} steps")

    # weights that a checkpoint has need not be read from elsewhere first
    model = config.model.without_pretrained() if found else config.model
    with explain_full_memory(config, world, micro_batch):
        engine = Engine(config.model_copy(update={"model": model}), world)
        checkpointer.attach(engine.shard)
    step_flops = 3 * share * count_flops(config.model, config.data).forward
    take_step = TrainStep(engine, config, world, micro_batch)
    border = Border(stage.first_step, stage.keeps_optimizer, resize_positions) if stage.number else None
    if found:
        checkpointer.load(found, border)
    engine.refresh()
    state.world_size, state.zero_stage = world.size, config.train.zero_stage
    if state.step == stage.first_step:
        state.batches_left_out = 0  # which were the stage's before

    # Loader processes first: a fork should not copy the locks of the progress bar's and wandb's threads. Later stages cannot
    # help it, and TrainBatches replaces processes that hang at their start.
    pin_memory = world.device.type == "cuda"
    batches = TrainBatches(
        dataset, *_items(state, stage, dataset), config.data, pin_memory=pin_memory, local_ranks=world.local_size
    )
    intake = Intake(batches)

    def evaluate_model() -> list[Figure]:
        encoder = Encoder(engine.whole_model(), data.tokenizer, config.model.image.size, config.eval.batch)
        return run.suite.evaluate(encoder, evaluations(run.folder) / "features")

    run.begin(state)
    status, metrics = run.status, run.metrics
    peak = peak_tflops(world.device)
    samples_an_epoch = sum(source.manifest.num_samples for source in data.sources)
    bad_steps = run.bad_steps
    went_back_to: int | None = None
    save_is_due = False
    interval_start, logged_step = time.perf_counter(), state.step
    engine.model.train()
    with ExitStack() as at_end:
        at_end.callback(batches.close)
        with (
            Watchdog(config.guard.hang_timeout_s, run.folder / "log" / run.start / f"{world.rank}.stacks") as watchdog,
            collected_at_log_steps() as collect,
            traced(run.take_trace_path()) as trace,
        ):
            while state.step < stage.last_step:
                lr = learning_rate(state.step - stage.first_step, config.optim, config.train)
                with explain_full_memory(config, world, micro_batch):
                    result = take_step(intake, state.step, lr)
                state.step += 1
                state.samples += config.train.global_batch
                bad_steps.note(state.step, result.bad, intake.take_keys())
                watchdog.beat()
                trace.step()
                if metrics:
                    metrics.advance(state.step)

                last = state.step == stage.last_step
                save_now = last or state.step % config.checkpoint.every_steps == 0
                evaluate_now = not last and config.eval.every_steps > 0 and state.step % config.eval.every_steps == 0
                if not (state.step % config.metrics.log_every_steps == 0 or save_now or evaluate_now):
                    continue
                # the first read from the device since the last log step
                loss, grad_norm, logit_scale, loss_scale, *terms = torch.stack(
                    [*result[:3], engine.loss_scale, *result.terms.values()]
                ).tolist()
                interval_s, num_steps = time.perf_counter() - interval_start, state.step - logged_step
                state.train_s += interval_s
                traffic, tally = engine.traffic.take(), intake.take_tally()
                tally.lost_workers = batches.lost_workers
                tally.cache.update(run.cache.take_counts())
                signals, tally = _exchange(tally, run.stop, state)
                bad = bad_steps.read()
                state.bad_steps += len(bad)
                with distributed.all_or_none():
                    run.quarantine.add(tally.faults)
                    if bad and world.is_main:
                        record_bad_steps(run.folder, bad)
                        log.warning(f"left out, since loss or gradients were not finite: {[each.step for each in bad]}")
                num_slots = num_steps * config.train.global_batch * (2 if data.text_pairs else 1)
                _check_data(len(tally.faults), num_slots, state, config, run.quarantine)
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
                                stage=stage.number,
                                epoch=(state.step - stage.first_step) * config.train.global_batch / samples_an_epoch,
                                loss=finite(loss),
                                terms={name: finite(term) for name, term in zip(result.terms, terms, strict=True)},
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
                        previous = checkpointer.find_newest(ask_mirror=False)
                        state = _go_back(state, previous, went_back_to, stage)
                        assert previous is not None, "there is one to go back to"
                        checkpointer.load(previous, border)
                    went_back_to = state.step
                    engine.refresh()
                    bad_steps.forgive()
                    batches.restart(*_items(state, stage, dataset))
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
                if signals and state.step < run.total_steps:
                    with watchdog.paused():
                        checkpointer.finish()
                    raise Stopped(signals, state.step)
                if evaluate_now:
                    with watchdog.paused():
                        figures = evaluate_model()
                    with distributed.all_or_none():
                        if metrics:
                            metrics.write_figures(state.step, figures)
                collect()
                interval_start, logged_step = time.perf_counter(), state.step
        figures = evaluate_model()
        is_done = state.step == run.total_steps
        if is_done:
            checkpointer.finish()
        with distributed.all_or_none():
            if metrics:
                metrics.write_figures(state.step, figures)
                if is_done:
                    # the last thing that a run writes
                    write_results(run.folder, state.step, figures)
        checkpointer.detach()
        engine.close()
    return state


def _items(state: TrainState, stage: Stage, dataset: TrainDataset) -> tuple[int, int]:
    """First and last + 1 item of the dataset that a stage needs from `state` to its end."""
    batch = state.batch - stage.first_step
    return batch * dataset.num_chunks, (batch + stage.last_step - state.step) * dataset.num_chunks


def _go_back(failed: TrainState, found: Found | None, went_back_to: int | None, stage: Stage) -> TrainState:
    """The state to go on from after too many bad steps: the last checkpoint's, the batches since then left out.

    Raises:
        RunError: there is no checkpoint, or the run went back to this one before: on every rank alike.
    """
    config, previous = stage.config, found.state if found else None
    if previous is not None and previous.step < stage.first_step:
        raise RunError(
            f"too many steps up to {failed.step} were not finite, and the checkpoint of step {stage.first_step}, with which "
            f"stage {stage.number} began, is damaged: start the run again, and it goes on from step {previous.step}"
        )
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
    # those of the stage before are no longer counted
    left_out_before = 0 if previous.step == stage.first_step else previous.batches_left_out
    log.warning(
        f"{config.guard.max_bad_steps} bad steps in a row up to {failed.step}: back to step {previous.step}, leaving out the "
        f"{left_out - left_out_before} batches since"
    )
    return replace(failed, step=previous.step, samples=previous.samples, faults=previous.faults, batches_left_out=left_out)


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
    # rows of texts have slots of their own
    of_texts = sum(count for name, count in state.faults.items() if name.startswith(f"{TEXT_PAIRS}/"))
    bad_of_seen = [(of_texts, state.samples), (sum(state.faults.values()) - of_texts, state.samples)]
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
