"""One run, top to bottom: what it needs, its stages one after the other (scaleclip.train_stage), its end."""

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from scaleclip import distributed
from scaleclip.checkpoint.checkpointer import Checkpointer
from scaleclip.checkpoint.state import TrainState
from scaleclip.config import RunConfig, SourceConfig
from scaleclip.config_io import origin
from scaleclip.config_rules import validate
from scaleclip.data.cache import ShardCache
from scaleclip.data.source import Source, fingerprint
from scaleclip.data.tally import Quarantine
from scaleclip.data.text_pairs import open_text_pairs
from scaleclip.data.tokenizer import load_tokenizer
from scaleclip.errors import ConfigError, RunError
from scaleclip.evaluation.results import finished_step
from scaleclip.evaluation.suite import open_evaluations
from scaleclip.guard import StopSignal
from scaleclip.losses.objective import check_runs_on
from scaleclip.models.towers import check_tokenizer
from scaleclip.run_folder import log_to, open_run, start_name
from scaleclip.runtime import fixed_order_kernels, give_back_memory
from scaleclip.stages import Stage, stage_at, stages_of
from scaleclip.status import StatusFile, mark_finished
from scaleclip.train_stage import Run, StageData, train_stage
from scaleclip_kernels.gemm import fp32_library


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
    stages = stages_of(config)
    total_steps = stages[-1].last_step
    with distributed.all_or_none():
        cache = ShardCache(config.data.cache)
        # those of later stages too: what is missing shows now, not in weeks
        data = _open_data(stages, cache)
        suite = open_evaluations(config.eval, cache)
    suite.check_same_everywhere()
    _check_same_data(data)
    fingerprints = [each.fingerprint for each in data]

    folder = Path(config.run.folder)
    with distributed.all_or_none():
        for stage in stages:
            check_runs_on(world.device, stage.config.loss)
        gemm = fp32_library(world.device, config.model.embed_dim)
        lock = open_run(config, world.size, fingerprints, gemm) if world.is_main else None
    start, finished = distributed.gather_objects((start_name(), finished_step(folder) == total_steps))[0]
    log = log_to(folder, world.rank, start)
    if world.is_main:
        for warning in dict.fromkeys(each for stage in data for source in stage.sources for each in source.texts.warnings):
            log.warning(warning)
    if finished:
        log.info(f"{folder} is finished: nothing to do")
        if world.is_main:
            mark_finished(folder)
        distributed.shutdown()
        return folder

    status: StatusFile | None = None
    with distributed.all_or_none():
        if world.is_main:
            total_samples = sum(stage.samples for stage in stages)
            status = StatusFile(folder, world.size, total_steps, total_samples, config.guard.max_idle_starts)
    checkpointer = Checkpointer(folder, world, config.checkpoint, origin(config, fingerprints))
    with distributed.all_or_none():
        quarantine = Quarantine(folder if world.is_main else None)
    run = Run(config, folder, start, world, cache, suite, total_steps, checkpointer, quarantine, stop, status, profile)
    with ExitStack() as at_end:
        # cuBLAS reads its setting once, so a stage that asks for it makes all of them so
        at_end.enter_context(fixed_order_kernels(any(stage.config.train.deterministic for stage in stages)))
        if lock:
            at_end.callback(lock.close)
        at_end.callback(run.close)
        if status:
            at_end.enter_context(status.watch())
        found = checkpointer.find_newest()
        state = found.state if found else TrainState()
        while True:
            stage = stage_at(stages, state.step)
            if len(stages) > 1:
                log.info(f"stage {stage.number} of {len(stages)}: steps {stage.first_step:,} to {stage.last_step:,}")
            state = train_stage(run, stage, data[stage.number], state, found)
            if state.step == total_steps:
                break
            give_back_memory(world.device)  # the engine's, which the next one needs
            found, ended_at = checkpointer.find_newest(ask_mirror=False), state.step
            if found is None or found.state.step != ended_at:
                raise RunError(
                    f"stage {stage.number} ended at step {ended_at}, and its checkpoint is damaged, or not every node sees it: "
                    f"see the warnings before this and start again, to go on from the one before"
                )
            state = found.state
    distributed.shutdown()
    return folder


def _open_data(stages: Sequence[Stage], cache: ShardCache) -> list[StageData]:
    """What every stage reads; a source that several of them have is opened once.

    Raises:
        ConfigError: shards, texts or a tokenizer are missing, or the text tower's numbers are not the tokenizer's.
    """
    opened: list[tuple[str, SourceConfig, Source]] = []
    found = []
    for stage in stages:
        sources = []
        for name, section in stage.config.data.sources.items():
            source = next((each for *key, each in opened if key == [name, section]), None)
            if source is None:
                source = Source(name, section, cache)
                opened.append((name, section, source))
            sources.append(source)
        text = stage.config.model.text
        tokenizer = load_tokenizer(text.tokenizer, text.context_length)
        check_tokenizer(text, size=tokenizer.size, end_id=tokenizer.end_id, pad_id=tokenizer.pad_id)
        if stage.config.model.caption_decoder and tokenizer.start_id is None:
            raise ConfigError(
                f"model.text.tokenizer={text.tokenizer} has no start token, from which model.caption_decoder writes: use "
                f"another one, or no decoder"
            )
        pairs = open_text_pairs(stage.config, cache, tokenizer)
        digest = fingerprint(sources)
        if pairs:
            rows = "\n".join([digest, *(f"{key}\t{print_}" for key, print_ in pairs.fingerprints)])
            digest = hashlib.sha256(rows.encode()).hexdigest()[: len(digest)]
        found.append(StageData(sources, pairs, tokenizer, digest))
    return found


def _check_same_data(data: Sequence[StageData]) -> None:
    """Raise, on every rank alike, where ranks see other shards or other files of texts."""
    mine = [
        (key, print_)
        for stage in data
        for key, print_ in [
            *((f"data.sources.{source.name}", source.manifest.fingerprint) for source in stage.sources),
            *(stage.text_pairs.fingerprints if stage.text_pairs else ()),
        ]
    ]
    prints = distributed.gather_objects(mine)
    for number, (key, _) in enumerate(mine):
        strange = [rank for rank, found in enumerate(prints) if found[number] != prints[0][number]]
        if strange:
            raise ConfigError(
                f"{key} names other shards, or other sample counts, on ranks {strange} than on rank 0: let all nodes see the "
                f"same files"
            )
