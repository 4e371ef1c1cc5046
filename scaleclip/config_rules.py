"""Rules between the fields of a configuration and the number of ranks."""

import itertools
import re

from scaleclip.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from scaleclip.errors import ConfigError
from scaleclip.stages import stages_of


def validate(config: RunConfig, world_size: int) -> None:
    """Rules between fields, of every stage and between stages, and the number of ranks. Pure: raises ConfigError or returns.

    Rules that need the towers or the shards are checked where these are built, with the same kind of error.
    """
    stages = stages_of(config)
    for stage in stages:
        try:
            _validate_stage(stage.config, world_size)
        except ConfigError as error:
            if not config.stages:
                raise
            raise ConfigError(f"stages.{stage.number}: {error}") from None
    for before, after in itertools.pairwise(stages):
        _validate_border(before.config.model, after.config.model, after.number)


def _validate_border(before: ModelConfig, after: ModelConfig, number: int) -> None:
    """What comes with weights may appear or go at a border, but those that stay keep their shape and their value."""
    olds, news = _parts(before), _parts(after)
    for key, old in olds.items():
        new = news[key]
        if old is not None and new is not None and old != new:
            raise ConfigError(
                f"stages.{number}.model.{key}={new}: the stage before trains it with {old}, and its weights go on as they are: "
                f"give both the same, or set model.{key.partition('.')[0]}=null in one of them"
            )


def _parts(model: ModelConfig) -> dict[str, int | float | None]:
    """By key what decides shapes, or first values, of parts that a model may lack; None for one that it lacks."""
    projector, decoder = model.projector, model.caption_decoder
    return {
        "projector.hidden": projector.hidden if projector else None,
        "projector.dim": projector.dim if projector else None,
        "caption_decoder.queries": decoder.queries if decoder else None,
        "init_logit_bias": model.init_logit_bias,
    }


def _validate_stage(config: RunConfig, world_size: int) -> None:
    train, data, optim = config.train, config.data, config.optim
    _validate_sources(data)
    _validate_sharding(train)
    if not train.samples:
        raise ConfigError("train.samples is not set: say how many pairs to train on, for example train.samples=12_800_000_000")
    if train.global_batch % data.canonical_streams:
        raise ConfigError(
            f"train.global_batch={train.global_batch} is not a multiple of data.canonical_streams={data.canonical_streams}: "
            f"every stream gives the same number of pairs to a batch; change one of the two"
        )
    if world_size > train.global_batch:
        raise ConfigError(
            f"train.global_batch={train.global_batch} gives {world_size} ranks less than a pair each: "
            f"use fewer ranks or a larger batch"
        )
    if optim.warmup_samples > train.samples:
        raise ConfigError(
            f"optim.warmup_samples={optim.warmup_samples} is more than train.samples={train.samples}: lower it, or the peak is "
            f"never reached"
        )
    if optim.final_lr > optim.lr:
        raise ConfigError(f"optim.final_lr={optim.final_lr} is above the peak optim.lr={optim.lr}")
    for key, bounds in (("data.crop_scale", data.crop_scale), ("data.crop_ratio", data.crop_ratio)):
        if not 0 < bounds[0] <= bounds[1]:
            raise ConfigError(f"{key}={list(bounds)}: both must be positive, the first not above the second")
    if data.crop_scale[1] > 1:
        raise ConfigError(f"data.crop_scale={list(data.crop_scale)}: a crop cannot cover more than the image (1.0)")
    if config.loss.duplicates != "negative" and all(source.concept is None for source in data.sources.values()):
        raise ConfigError(
            f"loss.duplicates={config.loss.duplicates} needs data.sources.NAME.concept: without it every pair is a concept of "
            f"its own"
        )
    for number, view in enumerate(data.views):
        if (view.max_tokens or 0) > config.model.text.context_length:
            raise ConfigError(
                f"data.views[{number}].max_tokens={view.max_tokens} is above "
                f"model.text.context_length={config.model.text.context_length}"
            )
    _validate_objective(config)
    widest = data.num_tokens(config.model.text.context_length)
    if config.model.text.type == "siglip_text_model" and widest < config.model.text.context_length:
        raise ConfigError(
            f"data.views.max_tokens={widest} is below model.text.context_length={config.model.text.context_length}, and "
            f"siglip_text_model reads its last token: set model.text.context_length={widest}"
        )
    if config.loss.backend == "reference" and world_size > 1:
        raise ConfigError(
            f"loss.backend=reference stores the whole matrix in one process and cannot run on {world_size} ranks: choose auto"
        )
    if config.loss.kind == "sigmoid" and config.model.init_logit_bias is None:
        raise ConfigError("loss.kind=sigmoid needs model.init_logit_bias: SigLIP starts at -10")
    if config.model.init_logit_bias is not None and config.loss.kind == "softmax":
        raise ConfigError("model.init_logit_bias is set, but a softmax loss does not depend on a bias: unset it")
    for key, tower in (("image", config.model.image), ("text", config.model.text)):
        if config.model.pretrained is not None and tower.pretrained is not None:
            raise ConfigError(
                f"model.{key}.pretrained={tower.pretrained}, but model.pretrained={config.model.pretrained} has that tower's "
                f"weights too: unset one of the two"
            )
    if config.model.init_logit_scale > config.model.max_logit_scale:
        raise ConfigError(
            f"model.init_logit_scale={config.model.init_logit_scale} is above "
            f"model.max_logit_scale={config.model.max_logit_scale}"
        )


def _validate_objective(config: RunConfig) -> None:
    data, loss, decoder = config.data, config.loss, config.model.caption_decoder
    if decoder and data.caption is None:
        raise ConfigError("model.caption_decoder needs data.caption: say which text it learns to write")
    if data.caption and decoder is None:
        raise ConfigError("data.caption is set, but nothing learns to write it: set model.caption_decoder, for example to {}")
    if data.caption and (data.caption.max_tokens or data.caption.keep != "first"):
        raise ConfigError("data.caption is cut to model.caption_decoder.queries tokens: unset max_tokens and keep")
    if loss.kind == "sigmoid" and loss.weights != (0.5, 0.5):
        raise ConfigError(f"loss.weights={list(loss.weights)}: the sigmoid loss has one direction only; unset it")
    augment = data.augment
    for key, bounds in (
        ("crop_scale", augment.crop_scale),
        ("crop_ratio", augment.crop_ratio),
        ("blur_sigma", augment.blur_sigma),
    ):
        if not 0 < bounds[0] <= bounds[1]:
            raise ConfigError(f"data.augment.{key}={list(bounds)}: both must be positive, the first not above the second")
    if augment.crop_scale[1] > 1:
        raise ConfigError(f"data.augment.crop_scale={list(augment.crop_scale)}: a crop cannot cover more than the image (1.0)")
    if not (min(augment.jitter) >= 0 and max(augment.jitter[:3]) <= 1 and augment.jitter[3] <= 0.5):
        raise ConfigError(f"data.augment.jitter={list(augment.jitter)}: three shares from 0 to 1, then hue from 0 to 0.5")
    if not any(loss.weights):
        raise ConfigError(f"loss.weights={list(loss.weights)}: at least one direction must count")
    if data.text_pairs.num_negatives and not data.text_pairs.sources:
        raise ConfigError(f"data.text_pairs.num_negatives={data.text_pairs.num_negatives}, but there are no sources")


def _validate_sharding(train: TrainConfig) -> None:
    stage = train.zero_stage
    if train.offload_optimizer and stage == 0:
        raise ConfigError("train.offload_optimizer needs a sharded optimizer state: set train.zero_stage to 1, 2 or 3")
    if train.offload_parameters and stage != 3:
        raise ConfigError(f"train.offload_parameters needs sharded parameters: train.zero_stage is {stage}, set it to 3")
    if train.compile and stage == 3:
        raise ConfigError(
            "train.compile does not go with train.zero_stage=3, which gathers parameters inside of the towers: use stage 2"
        )
    if train.reduce_gradients == "step" and stage < 2:
        raise ConfigError(f"train.reduce_gradients=step is what stage {stage} does anyway: leave it out")


def _validate_sources(data: DataConfig) -> None:
    if not data.sources:
        raise ConfigError(
            "data.sources is empty: name a data set and its shards, for example "
            "data.sources.mine.shards=/data/{00000..00099}.tar"
        )
    for name, source in data.sources.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ConfigError(f"data.sources: {name!r} is no name: use letters, digits, _ and -")
        if not source.shards:
            raise ConfigError(f"data.sources.{name}.shards is empty: name at least one tar, glob or brace range")
    weighted = [name for name, source in data.sources.items() if source.weight is not None]
    if weighted and len(weighted) < len(data.sources):
        other = next(name for name in data.sources if name not in weighted)
        raise ConfigError(
            f"data.sources.{weighted[0]}.weight is set and data.sources.{other}.weight is not: give every source a weight, or "
            f"none"
        )
    views = {f"data.views[{number}]": view for number, view in enumerate(data.views)}
    if data.caption:
        views["data.caption"] = data.caption
    for key, view in views.items():
        for text in [*view.texts, *([view.fallback] if view.fallback else [])]:
            if not any(text in source.texts for source in data.sources.values()):
                raise ConfigError(
                    f"{key} draws from the text {text!r}, which no source has: say where it lies in "
                    f"data.sources.NAME.texts.{text}"
                )
        if not any(view.texts.values()):
            raise ConfigError(f"{key}.texts={dict(view.texts)}: at least one weight must be above 0")
