"""A run's configuration: frozen sections, whose field docstrings are what the command and the editor show."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A frozen part of the configuration; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_weights(value: Any) -> Any:
    value = _as_list(value)
    return dict.fromkeys(value, 1.0) if isinstance(value, list | tuple) else value


def _micro_batch(value: Any) -> Any:
    if value != "auto" and not (type(value) is int and value >= 1):
        raise PydanticCustomError("micro_batch", "give auto, or a number from 1 on")
    return value


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


class TextPairsConfig(Section):
    """A second batch a step, of `train.global_batch` pairs or triplets of texts, all from one source at a time."""

    sources: Mapping[str, TextSourceConfig] = Field(default_factory=dict)
    """Data sets of texts by name; none: no text batches."""
    num_negatives: int = Field(default=0, ge=0)
    """Negatives drawn from those of each row: further documents to every query of the batch (InfoNCE+); 0: pairs."""


class AugmentConfig(Section):
    """How the two further views of an image are made for `model.projector` (SimCLR, arXiv:2002.05709)."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a crop covers."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Smallest and largest aspect ratio of a crop before it is resized to a square."""
    flip_probability: float = Field(default=0.5, ge=0, le=1)
    """Share of views mirrored left to right."""
    jitter_probability: float = Field(default=0.8, ge=0, le=1)
    """Share of views whose brightness, contrast, saturation and hue change, in random order."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """Most that brightness, contrast and saturation change, as a share, and hue, as a share of the circle."""
    gray_probability: float = Field(default=0.2, ge=0, le=1)
    """Share of views without colour."""
    blur_probability: float = Field(default=0.5, ge=0, le=1)
    """Share of views that are blurred."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels."""


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
    caption: ViewConfig | None = None
    """The text that `model.caption_decoder` learns to write, the whole of it (CLIPS)."""
    text_pairs: TextPairsConfig = TextPairsConfig()
    """A batch of text pairs beside each of image-text pairs (Jina-CLIP)."""
    augment: AugmentConfig = AugmentConfig()
    """Further views of each image, where `model.projector` learns from them (SLIP)."""
    cache: CacheConfig = CacheConfig()
    """Local copies of remote shards."""
    canonical_streams: int = Field(default=128, ge=1)
    """Contiguous ranges that an epoch is cut into; divides `train.global_batch`. Fixed for the life of a run."""
    shuffle_shards: int = Field(default=4, ge=1)
    """Average shards' worth of samples that a stream shuffles together. Fixed for the life of a run."""
    workers: int = Field(default=4, ge=0)
    """Loader processes a rank; 0 reads in the training process."""
    prefetch_batches: int = Field(default=2, ge=1)
    """Batches, or chunks of one where `train.micro_batch` cuts it, that each loader process prepares ahead."""
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

    def num_tokens(self, context_length: int) -> int:
        """Tokens of every text in a batch, those of the widest: the text tower takes all of them at once."""
        widest = max(view.max_tokens or context_length for view in self.views)
        return max(widest, context_length) if self.text_pairs.sources else widest


class ImageTowerConfig(Section):
    type: str = "clip_vision_model"
    """transformers model type: `clip_vision_model`, `siglip_vision_model`, `timm_wrapper` (timm's, named in
    `config.architecture`), or any image model that AutoModel knows."""
    size: int = Field(default=224, ge=1)
    """Height and width of the input in pixels."""
    config: Mapping[str, Any] = Field(default_factory=dict)
    """Values of the tower's transformers configuration (hidden_size, num_hidden_layers, ...)."""
    pooling: Literal["pooler", "mean", "cls"] = "pooler"
    """From the tower's outputs to one vector: its own pooler, the mean of the patch states or the class token's state."""
    projection: bool = True
    """A learned matrix from that vector to the shared space. Without one (SigLIP, arXiv:2303.15343) the vector itself is the
    feature, and its width has to be `model.embed_dim`."""
    positions: Literal["learned", "sincos"] = "learned"
    """Position embeddings of `clip_vision_model` and `siglip_vision_model`: learned, or fixed sines and cosines of the patch's
    column and row (MoCo v3, arXiv:2104.02057)."""
    patch_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of patches dropped in training (FLIP, arXiv:2212.00794), drawn for each sample."""
    pretrained: str | None = None
    """Folder of a transformers model of this type whose weights the tower starts from; none: fresh weights."""
    locked: bool = False
    """Keep the tower's weights as they are, its projection excepted (LiT, arXiv:2111.07991)."""
    unlocked_groups: int = Field(default=0, ge=0)
    """Last groups of a locked tower that learn all the same: its head and final norm, then layer by layer towards the input."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of the red, green and blue channels in 0..1, subtracted on the device."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of the channels in 0..1."""


class TextTowerConfig(Section):
    type: str = "clip_text_model"
    """transformers model type: `clip_text_model`, `siglip_text_model`, `bert`, `modernbert`, or any encoder that
    AutoModel knows."""
    tokenizer: str = "clip"
    """`clip` (CLIP's byte-pair vocabulary, 49,408 tokens), `demo` (the embedded data's own), or a tokenizer's folder."""
    context_length: int = Field(default=77, ge=2)
    """Tokens a text, with the start and end tokens; longer texts are cut."""
    config: Mapping[str, Any] = Field(default_factory=dict)
    """Values of the tower's transformers configuration (hidden_size, num_hidden_layers, ...)."""
    pooling: Literal["pooler", "mean", "cls", "eos"] = "pooler"
    """From the tower's outputs to one vector: its own pooler, the mean over tokens, the first or the end token's state."""
    pretrained: str | None = None
    """Folder of a transformers model of this type whose weights the tower starts from; none: fresh weights."""
    locked: bool = False
    """Keep the tower's weights as they are, its projection excepted (LiT, arXiv:2111.07991)."""
    unlocked_groups: int = Field(default=0, ge=0)
    """Last groups of a locked tower that learn all the same: its head and final norm, then layer by layer towards the input."""


class ProjectorConfig(Section):
    """The head of SimCLR, which learns from two further views of each image (SLIP, arXiv:2112.12750)."""

    hidden: int = Field(default=4096, ge=1)
    """Width of its two hidden layers, each with batch norm over the global batch."""
    dim: int = Field(default=256, ge=1)
    """Width of its output."""


class CaptionDecoderConfig(Section):
    """A decoder of the text tower's size that writes a caption from the image and the first text view (CLIPS,
    arXiv:2411.16828)."""

    queries: int = Field(default=128, ge=1)
    """Most tokens of a caption, each from a learned query."""
    teacher_forced: bool = False
    """Show each query the true token before its own; the paper's code does not."""


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
    projector: ProjectorConfig | None = None
    """Head for self-supervision on images; none: no such term."""
    caption_decoder: CaptionDecoderConfig | None = None
    """Decoder that writes captions; none: no such term."""
    pretrained: str | None = None
    """Trained dual encoder that both towers, their projections and the logit scale start from: a run's folder, a checkpoint, a
    folder of transformers (CLIPModel, SiglipModel) or open_clip, or a file of open_clip's or OpenAI's weights. Its tables of
    positions are resized to `image.size` and `text.context_length`; an `image.projection` that it does without starts as one
    that changes nothing; the rest has to agree with this section."""
    activation_checkpointing: bool = False
    """Recompute a tower's activations in the backward pass instead of storing them."""

    def without_pretrained(self) -> "ModelConfig":
        """The same model where its weights come from elsewhere."""
        image, text = (tower.model_copy(update={"pretrained": None}) for tower in (self.image, self.text))
        return self.model_copy(update={"image": image, "text": text, "pretrained": None})


class LossConfig(Section):
    kind: Literal["softmax", "sigmoid"] = "softmax"
    """`softmax`: CLIP's symmetric InfoNCE; `sigmoid`: SigLIP's pairwise loss, which needs `model.init_logit_bias`."""
    duplicates: Literal["negative", "ignore", "positive"] = "negative"
    """Pairs of one concept (`data.sources.NAME.concept`) in a batch: negatives as in CLIP, left out, or further positives."""
    weights: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = (0.5, 0.5)
    """Weights of image-to-text and text-to-image InfoNCE. Jina-CLIP adds them up: [1, 1]; LaCLIP-MT prints a mean that divides
    the first by M, not M + 1, views: [0.5 * (M + 1) / M, 0.5]."""
    simclr_weight: float = Field(default=1.0, ge=0)
    """Weight of NT-Xent between two further views of an image, through `model.projector` (SLIP)."""
    simclr_temperature: float = Field(default=0.1, gt=0)
    """Its temperature, fixed."""
    caption_weight: float = Field(default=2.0, ge=0)
    """Weight of the cross-entropy a token of `model.caption_decoder` (CLIPS)."""
    text_weight: float = Field(default=1.0, ge=0)
    """Weight of InfoNCE between the texts of `data.text_pairs`, whose two directions have `weights` too (Jina-CLIP)."""
    text_temperature: float = Field(default=0.05, gt=0)
    """Its temperature, fixed."""
    schedule: Literal["auto", "ring", "gather"] = "auto"
    """How features meet across ranks: passed round a ring, or gathered a chunk at a time; `auto`: the ring up to 64 ranks."""
    compute_dtype: Literal["fp32", "bf16"] = "fp32"
    """What features are sent and multiplied in; sums, the logit scale and the loss are fp32 in both."""
    fp32_precision: Literal["ieee", "tf32x3"] = "ieee"
    """How the Triton kernels multiply fp32 features: as they are, or in three TF32 products of the same accuracy."""
    backend: Literal["auto", "triton", "panels", "reference"] = "auto"
    """Implementation of the loss; one that cannot run is an error. `auto`: Triton on a GPU, panels on a CPU."""


class TowerOptimConfig(Section):
    lr_scale: float = Field(default=1.0, gt=0)
    """Learning rate of the tower and its projection relative to `optim.lr`."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor on the learning rate for every layer further from the tower's output (BEiT, arXiv:2106.08254); 1 is none."""


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
    image: TowerOptimConfig = TowerOptimConfig()
    """The image tower's learning rate."""
    text: TowerOptimConfig = TowerOptimConfig()
    """The text tower's learning rate."""


class TrainConfig(Section):
    global_batch: int = Field(default=32_768, ge=1)
    """Image-text pairs per optimizer step, over all ranks."""
    samples: int = Field(default=0, ge=0)
    """Pairs to train on, repeats included; the run takes ceil(samples / global_batch) steps. Must be set."""
    micro_batch: Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], BeforeValidator(_micro_batch)] = "auto"
    """Pairs that a rank encodes at once. A larger share of the global batch is encoded in chunks, twice, with the same result
    (GradCache, arXiv:2101.06983). `auto`: the most that fits the device's memory."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic of the towers. Master weights, accumulated gradients, the loss and the logit scale are fp32 in all three;
    with fp16 the loss is scaled so that small gradients do not vanish."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage (arXiv:1910.02054): 0 replicates everything on every rank, 1 shards the optimizer state, 2 the
    gradients too, 3 the parameters too."""
    reduce_gradients: Literal["chunk", "step"] = "chunk"
    """When stages 2 and 3 add up the gradients of all ranks: after every chunk, so that no rank holds more than its shard, or
    once a step, in the memory of whole gradients. Stages 0 and 1 hold whole ones and add them up once."""
    offload_optimizer: bool = False
    """Keep the optimizer state in the host's memory and step there (stages 1 to 3)."""
    offload_parameters: bool = False
    """Keep the shards of the parameters in the host's memory (stage 3)."""
    compile: bool = False
    """Compile the towers with torch.compile (stages 0 to 2)."""
    deterministic: bool = False
    """On a GPU only kernels that add in a fixed order: a run then takes the same steps bit for bit every time, and slower ones.
    An operation that has no such kernel is an error. On a CPU every run does. One stage that asks for it makes all so."""
    deepspeed: Mapping[str, Any] = Field(default_factory=dict)
    """Laid over the DeepSpeed configuration that is derived from the rest (`scaleclip config --deepspeed` shows it)."""

    def share(self, world_size: int) -> int:
        """Pairs of a step on each of so many ranks; on the last ones some may be missing."""
        return -(-self.global_batch // world_size)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return -(-self.samples // self.global_batch)


class CheckpointConfig(Section):
    every_steps: int = Field(default=1000, ge=1)
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep: int = Field(default=3, ge=1)
    """Newest checkpoints kept, here and in the mirror; older ones are deleted."""
    mirror: str | None = None
    """Folder or URL (`s3://bucket/run`) that checkpoints are copied to in the background, and that a start fetches from where
    it holds a newer one than `run.folder`."""


class GuardConfig(Section):
    max_bad_steps: int = Field(default=5, ge=1)
    """Steps in a row, up to a log step, with a loss or a gradient that is not finite, each left out by all ranks, after which
    the run goes back to the last checkpoint and leaves out the batches since; failing again before a new one ends it."""
    hang_timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds without a step after which every rank writes its stacks beside its log and ends with code 75."""
    max_idle_starts: int = Field(default=3, ge=1)
    """Starts of one SLURM job in a row that may go on from the same step; the next one ends with an error instead."""


class MetricsConfig(Section):
    log_every_steps: int = Field(default=10, ge=1)
    """Optimizer steps between rows of metrics.jsonl; only there is the device synchronised and a stop signal acted on."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases mode."""
    wandb_project: str = "scaleclip"
    """Weights & Biases project."""


class EvalConfig(Section):
    splits: StringList = ()
    """Split descriptions (JSON beside their tar shards), evaluated at the end and by `every_steps`; globs, `package:` work."""
    suite: str | None = None
    """Suite evaluated as well: a name of `configs/suites.yaml`, or one's own YAML file (`FILE`, or `FILE:NAME`)."""
    data: str = "data"
    """Folder or URL below which the suite's data sets lie."""
    every_steps: int = Field(default=0, ge=0)
    """Optimizer steps between evaluations while training; 0 evaluates at the end only."""
    batch: int = Field(default=256, ge=1)
    """Images or texts encoded at once."""


class StageConfig(Section):
    """A stretch of a run with settings of its own. Each section is laid over the run's: mappings key by key, while a list or a
    value takes the place of the run's."""

    optimizer: Literal["keep", "reset"] = "keep"
    """What becomes of AdamW's moments and step counter where the stage starts; without meaning for the first one."""
    data: Mapping[str, Any] = Field(default_factory=dict)
    """Keys of `data`. Entries of `sources` and of `text_pairs.sources` are added to the run's; `NAME: null` leaves one out."""
    model: Mapping[str, Any] = Field(default_factory=dict)
    """Keys of `model` that leave the weights' shapes as they are, but for positions: image size, context length, locking, patch
    dropout, `max_logit_scale`, `activation_checkpointing`; and parts that may come and go: `projector`, `caption_decoder`,
    `init_logit_bias`."""
    loss: Mapping[str, Any] = Field(default_factory=dict)
    """Keys of `loss`."""
    optim: Mapping[str, Any] = Field(default_factory=dict)
    """Keys of `optim`; the schedule is the stage's own, warm-up included."""
    train: Mapping[str, Any] = Field(default_factory=dict)
    """Keys of `train`; `samples` are the stage's own."""


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
    guard: GuardConfig = GuardConfig()
    """What to do about steps that fail or never end."""
    metrics: MetricsConfig = MetricsConfig()
    """Logging."""
    eval: EvalConfig = EvalConfig()
    """What is measured of the model, and when."""
    stages: tuple[StageConfig, ...] = ()
    """Stretches of the run, one after the other, each with settings of its own (CLIPA, arXiv:2306.15658); none: one with the
    run's. Further ones may be added later, to a finished run too."""
