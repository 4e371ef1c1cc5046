"""A run's configuration: frozen sections, YAML files with an `extends:` parent, presets and dotted overrides.

Precedence, lowest first: field defaults, the `extends:` chain, the file, dotted overrides from the command line.
A model preset (`model: ViT-B/32`) lies below every other value of the `model` section.
"""

import difflib
import fnmatch
import importlib.resources
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from scaleclip.errors import ConfigError

PACKAGE_SCHEME = "package:"


class Section(BaseModel):
    """A frozen part of the configuration; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_weights(value: Any) -> Any:
    value = _as_list(value)
    return dict.fromkeys(value, 1.0) if isinstance(value, list | tuple) else value


StringList = Annotated[tuple[str, ...], BeforeValidator(_as_list)]


class RunSection(Section):
    folder: str = "runs/default"
    """Folder of the run: configuration, metrics, checkpoints and results. Made if it is missing."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of initialisation, sample order, caption choice, augmentation and dropout."""


class SourceConfig(Section):
    """One data set; `data.sources` mixes several."""

    shards: StringList = ()
    """Tar shards, or the `index.json` of MosaicML MDS folders: paths, globs, brace ranges (`/data/{00000..41455}.tar`), local
    folders, `s3://`, `gs://`, `https://`; `package:` starts inside the installed package."""
    manifest: str | None = None
    """Folder that `scaleclip data index` or `scaleclip data subset` wrote: the samples of every shard and where each lies.
    Without one, tars are counted by the `*_stats.json` beside each (img2dataset) and indexed at first touch."""
    weight: float | None = Field(default=None, gt=0)
    """Share of a batch, relative to the other sources' weights; none: each source's number of samples."""
    image: StringList = ("jpg", "jpeg", "png", "webp")
    """Members (file extensions of a tar, columns of MDS) that may hold the image; the first that is there is used."""
    texts: Mapping[str, str] = Field(default_factory=lambda: {"caption": "txt"})
    """Where each named text lies: `txt` (a member), `json:a.b` (a field of the JSON member; `json:new.0` picks from a list) or
    `recap:re_caption` (column `re_caption` of the sidecar `recap`)."""
    sidecars: Mapping[str, str] = Field(default_factory=dict)
    """Folders that `scaleclip data sidecar` wrote: texts joined to samples by key, a file a shard."""
    concept: str | None = None
    """Where the string lies whose equal values mark pairs of the same concept: a member or a field of the JSON, as in `texts`
    (see `loss.duplicates`)."""


class TextSourceConfig(Section):
    """Pairs or triplets of texts, for text-text objectives (Jina-CLIP, arXiv:2405.20204)."""

    files: StringList = ()
    """JSON lines, Parquet files or the `index.json` of MDS folders: paths, globs, brace ranges, URLs."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the text batches, relative to the other sources' weights; none: each source's number of rows."""
    query: str = "query"
    """Column of the first text."""
    positive: str = "positive"
    """Column of the text that belongs to it."""
    negatives: StringList = ()
    """Columns of texts that do not, each a text or a list of them; none: pairs."""


class ViewConfig(Section):
    """How one text of a sample is chosen; every view is a text of its own to the objective."""

    texts: Annotated[Mapping[str, Annotated[float, Field(ge=0)]], BeforeValidator(_as_weights)] = Field(
        default_factory=lambda: {"caption": 1.0}
    )
    """Names of the texts to draw from, as a list (LaCLIP: uniformly) or with weights (Recap-CLIP:
    `{caption: 0.8, recap: 0.2}`). A text that is missing or blank is left out of the draw."""
    fallback: str | None = None
    """Text used, whole, where the drawn one has fewer than `min_words` words or none is there; none: the sample is invalid."""
    min_words: int = Field(default=1, ge=1)
    """Fewest words of a drawn text (LaCLIP: 2 with fallback `caption`)."""
    part: Literal["whole", "sentence"] = "whole"
    """The whole text, or one sentence of it drawn uniformly (CLIPS)."""
    max_tokens: int | None = Field(default=None, ge=3)
    """Token budget, the start and end tokens included; none: `model.text.context_length`."""
    keep: Literal["first", "random", "block"] = "first"
    """Which tokens of a longer text are kept: the first, a random choice in their order, or a random block (CLIPS)."""


class CacheConfig(Section):
    folder: str = "~/.cache/scaleclip/shards"
    """Local folder for copies of remote shards and for indexes made at first touch; all ranks of a node share it."""
    limit_gib: float = Field(default=200.0, gt=0)
    """Size in GiB that the copies may take together; the least recently used go first."""
    attempts: int = Field(default=5, ge=1)
    """Tries to fetch a shard, with growing pauses, before its samples count as invalid."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Seconds without a byte after which a try to fetch is given up."""


class DataConfig(Section):
    sources: Mapping[str, SourceConfig] = Field(default_factory=dict)
    """Data sets by name. Several are mixed by a fixed quota of every global batch."""
    views: Annotated[tuple[ViewConfig, ...], Field(min_length=1)] = (ViewConfig(),)
    """Texts of a sample that enter a batch, each chosen by a policy of its own."""
    cache: CacheConfig = CacheConfig()
    """Local copies of remote shards."""
    canonical_streams: int = Field(default=128, ge=1)
    """Contiguous ranges that an epoch is cut into; divides `train.global_batch`. Fixed for the life of a run."""
    shuffle_shards: int = Field(default=4, ge=1)
    """Average shards' worth of samples that a stream shuffles together. Fixed for the life of a run."""
    workers: int = Field(default=4, ge=0)
    """Loader processes a rank; 0 reads in the training process."""
    prefetch_batches: int = Field(default=2, ge=1)
    """Batches that each loader process prepares ahead."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Smallest and largest share of the image's area that a training crop covers."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Smallest and largest aspect ratio of a training crop before it is resized to a square."""
    flip_probability: float = Field(default=0.0, ge=0, le=1)
    """Share of training images mirrored left to right."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """Height x width above which an image counts as a decompression bomb and is not decoded."""
    max_bad_fraction: float = Field(default=0.1, ge=0, le=1)
    """The run stops when more than this share of the samples since its start, or of 10,000 or more since the last log step,
    could not be used."""


class ImageTowerConfig(Section):
    type: str = "clip_vision_model"
    """transformers model type: `clip_vision_model`, `siglip_vision_model`, or any image model that AutoModel knows."""
    size: int = Field(default=224, ge=1)
    """Height and width of the input in pixels."""
    config: Mapping[str, Any] = Field(default_factory=dict)
    """Values of the tower's transformers configuration (hidden_size, num_hidden_layers, ...)."""
    pooling: Literal["pooler", "mean", "cls"] = "pooler"
    """From the tower's outputs to one vector: its own pooler, the mean of the patch states or the class token's state."""
    patch_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of patches dropped in training (FLIP, arXiv:2212.00794), drawn for each sample."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of the red, green and blue channels in 0..1, subtracted on the device."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of the channels in 0..1."""


class TextTowerConfig(Section):
    type: str = "clip_text_model"
    """transformers model type: `clip_text_model`, `bert`, or any encoder that AutoModel knows."""
    tokenizer: str = "clip"
    """`clip` (CLIP's byte-pair vocabulary, 49,408 tokens), `demo` (the embedded data's own), or a tokenizer's folder."""
    context_length: int = Field(default=77, ge=2)
    """Tokens a text, with the start and end tokens; longer texts are cut."""
    config: Mapping[str, Any] = Field(default_factory=dict)
    """Values of the tower's transformers configuration (hidden_size, num_hidden_layers, ...)."""
    pooling: Literal["pooler", "mean", "cls", "eos"] = "pooler"
    """From the tower's outputs to one vector: its own pooler, the mean over tokens, the first or the end token's state."""


class ModelConfig(Section):
    preset: str | None = None
    """Name of a preset (`ViT-B/32`) that the values of this section are laid over."""
    embed_dim: int = Field(default=512, ge=1)
    """Width of the shared embedding space."""
    image: ImageTowerConfig = ImageTowerConfig()
    """The image tower."""
    text: TextTowerConfig = TextTowerConfig()
    """The text tower."""
    init_logit_scale: float = Field(default=1 / 0.07, ge=1)
    """Multiplier of the cosine similarities at the start; its logarithm is learned."""
    max_logit_scale: float = Field(default=100.0, ge=1)
    """Upper bound of the multiplier, enforced after every optimizer step (CLIP, arXiv:2103.00020)."""
    init_logit_bias: float | None = None
    """Start value of a learned bias added to every logit (SigLIP, arXiv:2303.15343); none if unset."""
    activation_checkpointing: bool = False
    """Recompute a tower's activations in the backward pass instead of storing them."""


class LossConfig(Section):
    kind: Literal["softmax", "sigmoid"] = "softmax"
    """`softmax`: CLIP's symmetric InfoNCE; `sigmoid`: SigLIP's pairwise loss, which needs `model.init_logit_bias`."""
    duplicates: Literal["negative", "ignore", "positive"] = "negative"
    """Pairs of one concept (`data.sources.NAME.concept`) in a batch: negatives as in CLIP, left out, or further positives."""
    schedule: Literal["auto", "ring", "gather"] = "auto"
    """How features meet across ranks: passed round a ring, or gathered a chunk at a time; `auto`: the ring up to 64 ranks."""
    compute_dtype: Literal["fp32", "bf16"] = "fp32"
    """What features are sent and multiplied in; sums, the logit scale and the loss are fp32 in both."""
    fp32_precision: Literal["ieee", "tf32x3"] = "ieee"
    """How the Triton kernels multiply fp32 features: as they are, or in three TF32 products of the same accuracy."""
    backend: Literal["auto", "triton", "panels", "reference"] = "auto"
    """Implementation of the loss; one that cannot run is an error. `auto`: Triton on a GPU, panels on a CPU."""


class OptimConfig(Section):
    lr: float = Field(default=5e-4, gt=0)
    """Peak learning rate of AdamW."""
    final_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the cosine."""
    warmup_samples: int = Field(default=0, ge=0)
    """Samples over which the learning rate rises linearly from zero."""
    weight_decay: float = Field(default=0.2, ge=0)
    """Decoupled weight decay of matrices; norms, biases and the logit scale have none."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's decay rates of the first and second moment."""
    eps: float = Field(default=1e-6, gt=0)
    """AdamW's epsilon."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this global L2 norm; 0 leaves them."""


class TrainConfig(Section):
    global_batch: int = Field(default=32_768, ge=1)
    """Image-text pairs per optimizer step, over all ranks."""
    samples: int = Field(default=0, ge=0)
    """Pairs to train on, repeats included; the run takes ceil(samples / global_batch) steps. Must be set."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of the towers. Master weights, accumulated gradients, the loss and the logit scale are fp32 in both."""
    zero_stage: Literal[0, 1] = 1
    """DeepSpeed ZeRO stage: 0 replicates the optimizer state on every rank, 1 shards it (arXiv:1910.02054)."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return -(-self.samples // self.global_batch)


class CheckpointConfig(Section):
    every_steps: int = Field(default=1000, ge=1)
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep: int = Field(default=3, ge=1)
    """Newest checkpoints kept; older ones are deleted."""


class MetricsConfig(Section):
    log_every_steps: int = Field(default=10, ge=1)
    """Optimizer steps between rows of metrics.jsonl; only there is the device synchronised and a stop signal acted on."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases mode."""
    wandb_project: str = "scaleclip"
    """Weights & Biases project."""


class EvalConfig(Section):
    splits: StringList = ()
    """Split descriptions (JSON beside their tar shards) evaluated after training; globs and `package:` work."""
    every_steps: int = Field(default=0, ge=0)
    """Optimizer steps between evaluations while training; 0 evaluates at the end only."""
    batch: int = Field(default=256, ge=1)
    """Images or texts encoded at once."""


class RunConfig(Section):
    """Everything that decides a run."""

    run: RunSection = RunSection()
    """Where the run lies and its seed."""
    data: DataConfig = DataConfig()
    """Shards, order, captions and augmentation."""
    model: ModelConfig = ModelConfig()
    """Towers and logit scale."""
    loss: LossConfig = LossConfig()
    """The objective."""
    optim: OptimConfig = OptimConfig()
    """AdamW and its schedule."""
    train: TrainConfig = TrainConfig()
    """Batch, length, precision and sharding."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save and what to keep."""
    metrics: MetricsConfig = MetricsConfig()
    """Logging."""
    eval: EvalConfig = EvalConfig()
    """Held-out splits."""


# What may differ between the two halves of an interrupted run: none of these changes a single update.
FREE_ON_RESUME = (
    "run.folder",
    # the manifest's fingerprint says whether these are the same shards in another place
    "data.sources.*.shards",
    "data.sources.*.manifest",
    "data.sources.*.sidecars",
    "data.cache",
    "data.workers",
    "data.prefetch_batches",
    "data.max_bad_fraction",
    "checkpoint",
    "metrics",
    "eval",
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `path`, its parents and its preset, lay `overrides` ("optim.lr=1e-3") over them and check the result.

    Raises:
        ConfigError: an unknown key, a wrong type or value, a missing file or a circular `extends:`.
    """
    tree = _read_yaml(Path(path), ())
    for text in overrides:
        key, value = parse_override(text)
        _deep_update(tree, _nest(key, value))
    model = tree.get("model")
    if isinstance(model, Mapping) and model.get("preset") is not None:
        tree["model"] = _deep_update(_preset(str(model["preset"])), model)
    return parse_config(tree)


def parse_config(tree: Mapping[str, Any]) -> RunConfig:
    """A nested mapping as a checked configuration; raises ConfigError with every fault on a line of its own."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        faults = error.errors()
        # a list whose entries are at fault also counts as too short
        faults = [each for each in faults if each["type"] != "too_short" or not _has_fault_inside(each, faults)]
        raise ConfigError("\n".join(_explain(fault) for fault in faults)) from None


def _has_fault_inside(fault: Any, faults: Sequence[Any]) -> bool:
    return any(other["loc"][: len(fault["loc"])] == fault["loc"] for other in faults if other is not fault)


def parse_override(text: str) -> tuple[str, Any]:
    """`"optim.lr=1e-3"` as `("optim.lr", 0.001)`; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r} is not of the form dotted.key=value, for example optim.lr=1e-3")
    try:
        return key, _number(yaml.safe_load(value))
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not YAML: {error}") from None


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def json_schema() -> str:
    """JSON schema of a configuration file, for editors."""
    schema = RunConfig.model_json_schema()
    schema["properties"]["extends"] = {"type": "string", "description": "Parent file, relative to this one."}
    # load_config also takes a preset's bare name
    name = {"type": "string", "enum": preset_names()}
    schema["properties"]["model"] = {"anyOf": [{"$ref": "#/$defs/ModelConfig"}, name]}
    return json.dumps(schema, indent=2)


def known_keys() -> list[str]:
    """Every dotted key that a configuration may set."""
    return [key for key, _ in _fields(RunConfig, "")]


def differing_keys(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) wherever two configurations differ in what decides the training itself."""
    left, right = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    keys = sorted(left.keys() | right.keys())
    return [(k, left.get(k), right.get(k)) for k in keys if left.get(k) != right.get(k) and not _is_free(k)]


def validate(config: RunConfig, world_size: int) -> None:
    """Rules between fields and the number of ranks. Pure: raises ConfigError or returns.

    Rules that need the towers or the shards are checked where these are built, with the same kind of error.
    """
    train, data, optim = config.train, config.data, config.optim
    _validate_sources(data)
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
    widest = max(view.max_tokens or config.model.text.context_length for view in data.views)
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
    if config.model.init_logit_scale > config.model.max_logit_scale:
        raise ConfigError(
            f"model.init_logit_scale={config.model.init_logit_scale} is above "
            f"model.max_logit_scale={config.model.max_logit_scale}"
        )


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
    for number, view in enumerate(data.views):
        for text in [*view.texts, *([view.fallback] if view.fallback else [])]:
            if not any(text in source.texts for source in data.sources.values()):
                raise ConfigError(
                    f"data.views[{number}] draws from the text {text!r}, which no source has: say where it lies in "
                    f"data.sources.NAME.texts.{text}"
                )
        if not any(view.texts.values()):
            raise ConfigError(f"data.views[{number}].texts={dict(view.texts)}: at least one weight must be above 0")


def resolve_path(path: str) -> str:
    """A path or pattern of a configuration on this machine: `package:x/y` lies in the installed package x."""
    if not path.startswith(PACKAGE_SCHEME):
        return str(Path(path).expanduser())
    package, _, rest = path.removeprefix(PACKAGE_SCHEME).partition("/")
    try:
        return str(importlib.resources.files(package).joinpath(rest))
    except ModuleNotFoundError:
        raise ConfigError(f"{path}: there is no installed package {package!r}") from None


def _presets() -> dict[str, dict[str, Any]]:
    text = importlib.resources.files("scaleclip").joinpath("models/presets.yaml").read_text()
    return typing.cast(dict[str, dict[str, Any]], yaml.safe_load(text))


def preset_names() -> list[str]:
    """Names that `model: NAME` takes."""
    return list(_presets())


def _preset(name: str) -> dict[str, Any]:
    presets = _presets()
    if name not in presets:
        raise ConfigError(f"model.preset={name!r} is unknown{_hint(name, presets)}; presets: {', '.join(presets)}")
    return dict(presets[name])


def _read_yaml(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in children:
        raise ConfigError("extends: goes in a circle: " + " -> ".join(map(str, (*children, path))))
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree or {}, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}, not a mapping of sections")
    tree = typing.cast(dict[str, Any], _number(tree or {}))
    _expand_preset_name(tree)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    return _deep_update(_read_yaml(path.parent / str(parent), (*children, path)), tree)


def _expand_preset_name(tree: dict[str, Any]) -> None:
    if isinstance(tree.get("model"), str):
        tree["model"] = {"preset": tree["model"]}


def _deep_update(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in top.items():
        below = base.get(key)
        base[key] = _deep_update(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return base


def _nest(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    _expand_preset_name(value)
    return typing.cast(dict[str, Any], value)


def _number(tree: Any) -> Any:
    """YAML 1.1 reads 1e-3, without a dot, as a string; people mean the number."""
    if isinstance(tree, dict):
        return {key: _number(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_number(value) for value in tree]
    if isinstance(tree, str) and tree[:1] in "+-.0123456789" and "e" in tree.lower():
        try:
            return float(tree)
        except ValueError:
            return tree
    return tree


def _is_free(key: str) -> bool:
    return any(fnmatch.fnmatchcase(key, free) or fnmatch.fnmatchcase(key, f"{free}.*") for free in FREE_ON_RESUME)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _fields(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        if isinstance(field.default, BaseModel):
            yield from _fields(type(field.default), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _explain(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        section = key.rpartition(".")[0]
        # sources and views are called as the user likes
        named: dict[str, type[Section]] = {"data.sources": SourceConfig, "data.views": ViewConfig}
        inside = named.get(section.rpartition(".")[0])
        keys = [f"{section}.{field}" for field in inside.model_fields] if inside else [*known_keys(), *RunConfig.model_fields]
        hint = _hint(key, keys) or "; scaleclip config --schema lists every key"
        return f"unknown key {key!r}{hint}"
    return f"{key}={fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _hint(name: str, names: Any) -> str:
    by_lower = {str(each).lower(): each for each in names}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""
