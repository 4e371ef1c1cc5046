"""The model card of an export: how to load it, what it was trained on and how, what it reached, where it comes from."""

from collections.abc import Iterator
from pathlib import Path

from scaleclip.checkpoint.folders import identity
from scaleclip.config import CacheConfig, RunConfig, SourceConfig
from scaleclip.data.cache import ShardCache
from scaleclip.data.source import open_shards
from scaleclip.errors import ConfigError
from scaleclip.evaluation.saved import checkpoint_figures
from scaleclip.exchange.loaders import loader
from scaleclip.exchange.source import Checkpoint, Source
from scaleclip.run_folder import read_starts


def model_card(kind: str, source: Source, name: str) -> str:
    """README.md of an export.

    Args:
        kind: the class that loads it.
        source: what it is of.
        name: of its folder.
    """
    config = source.config
    paragraphs = [
        "---\nlicense: other  # to fill in: the licence of the weights is their owner's to choose\n"
        f"library_name: {'open_clip' if kind == 'open_clip' else 'transformers'}\n"
        "pipeline_tag: zero-shot-image-classification\n---",
        f"# {name}",
        f"A dual encoder of images ({config.image.size} x {config.image.size} pixels, {config.image.type}) and texts "
        f"({config.text.context_length} tokens, {config.text.type}) in a space of {config.embed_dim} dimensions, exported by "
        "scaleclip.",
        "## Licence",
        "Not stated. Fill it in here and above before you pass the weights on.",
        "## How to load it",
        f"```python\n{loader(kind, source)}```",
    ]
    if source.checkpoint is None:
        paragraphs += ["## Provenance", f"Converted from `{Path(source.reference).name}`, of another project."]
    else:
        checkpoint = source.checkpoint
        paragraphs += ["## Data", "\n".join(_data(checkpoint)), "## Recipe", "\n".join(_recipe(checkpoint.config))]
        paragraphs += ["## Results", "\n".join(_results(checkpoint)), "## Provenance", "\n".join(_provenance(checkpoint))]
    return "\n\n".join(paragraphs) + "\n"


def _data(checkpoint: Checkpoint) -> Iterator[str]:
    data, state = checkpoint.config.data, checkpoint.state
    yield f"{state.samples:,} pairs seen, repeats included, from:"
    yield ""
    for name, source in data.sources.items():
        weight = f", weight {source.weight:g}" if source.weight is not None else ""
        bad = sum(count for fault, count in state.faults.items() if fault.startswith(f"{name}/"))
        number, texts = _num_samples(name, source, data.cache), ", ".join(source.texts)
        yield f"- {name}: {number}, texts {texts}{weight}; {bad:,} could not be used"
    for name in data.text_pairs.sources:
        yield f"- {name}: pairs of texts"


def _num_samples(name: str, source: SourceConfig, cache: CacheConfig) -> str:
    if any("://" in pattern for pattern in source.shards):
        return "remote shards"
    try:
        manifest, _ = open_shards(f"data.sources.{name}", source.shards, source.manifest, ShardCache(cache))
    except ConfigError:  # the data need not be where the weights are
        return "shards that are not here"
    return f"{manifest.num_samples:,} samples in {len(manifest.shards):,} shards"


def _recipe(config: RunConfig) -> Iterator[str]:
    train, optim, loss = config.train, config.optim, config.loss
    yield f"- global batch {train.global_batch:,}, {train.samples:,} pairs in this stage, {train.precision}"
    yield (
        f"- AdamW: peak learning rate {optim.lr:g}, betas {optim.betas[0]:g} and {optim.betas[1]:g}, eps {optim.eps:g}, weight "
        f"decay {optim.weight_decay:g}, {optim.warmup_samples:,} samples of warm-up, cosine to {optim.final_lr:g}, clipped at "
        f"{optim.clip_norm:g}"
    )
    views = "; ".join(
        ", ".join(f"{name} {weight:g}" for name, weight in view.texts.items())
        + (f", {view.part}" if view.part != "whole" else "")
        for view in config.data.views
    )
    yield f"- loss: {loss.kind}; text views: {views}"
    low, high = config.data.crop_scale
    yield f"- crops of {low:g} to {high:g} of the image's area; patch dropout {config.model.image.patch_dropout:g}"
    for key, value in (("model.pretrained", config.model.pretrained), ("image tower", config.model.image.pretrained)):
        if value is not None:
            yield f"- started from `{value}` ({key})"
    if config.model.text.pretrained is not None:
        yield f"- started from `{config.model.text.pretrained}` (text tower)"


def _results(checkpoint: Checkpoint) -> Iterator[str]:
    figures = checkpoint_figures(checkpoint.run, checkpoint.state.step, identity(checkpoint.path))
    if not figures:
        yield "None of this checkpoint: `scaleclip eval` makes them."
        return
    yield "| data | metric | value | chance |"
    yield "|---|---|---:|---:|"
    for figure in figures:
        interval = f" ({figure.low:.4f} to {figure.high:.4f})" if figure.low is not None and figure.high is not None else ""
        yield f"| {figure.split} | {figure.metric} | {figure.value:.4f}{interval} | {figure.chance:.4f} |"


def _provenance(checkpoint: Checkpoint) -> Iterator[str]:
    state = checkpoint.state
    yield f"- run `{checkpoint.run.name}`, step {state.step:,}, {state.samples:,} samples, seed {checkpoint.config.run.seed}"
    yield f"- saved by {state.world_size} ranks under ZeRO stage {state.zero_stage}, {state.train_s / 3600:.2f} hours"
    for start in read_starts(checkpoint.run):
        packages = ", ".join(f"{name} {version}" for name, version in start["packages"].items())
        yield f"- started {start['time']}: code {start.get('git') or 'not known'}, Python {start['python']}, {packages}"
