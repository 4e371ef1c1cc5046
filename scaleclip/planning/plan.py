"""A run before it starts: its memory, its arithmetic, what it sends, how long it takes and what limits it.

Nothing is run and no accelerator is needed. What the model takes is counted (counting.py, memory.py); times are such counts
over data sheets' rates and an assumed share of them. A step takes as long as its arithmetic and what is not hidden behind it,
or as its data, whichever is longer.

Dimensions: W ranks, N pairs of a global batch, n of a rank, V text views, E the shared embedding space.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from scaleclip.config import RunConfig
from scaleclip.config_rules import validate
from scaleclip.deepspeed_config import deepspeed_config
from scaleclip.planning.counting import Flops, count_flops, count_memory
from scaleclip.planning.devices import Device
from scaleclip.planning.memory import DeviceType, StepMemory, largest_micro_batch, step_memory, uses_ring

Stage = Literal[0, 1, 2, 3]
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)

MEMORY_SHARE = 0.9
"""Of a device's memory that a plan uses: the rest is the driver's, the libraries' and the allocator's gaps."""
LINK_SHARE = 0.8
"""Of a link's rate that messages reach."""
SAMPLES_PER_CPU_S = {256: 1564, 512: 673, 1024: 368}
"""Pairs a second and core from JPEG shards to batches, by height and width of the stored images in pixels. Measured on an AMD
EPYC, tools/results/data_cpu.csv."""
SAMPLES_WITH_VIEWS_PER_CPU_S = {256: 149, 512: 110, 1024: 75}
"""The same with SimCLR's two further views of each image, whose colours and blur take most of the time."""
JPEG_BYTES_PER_PX = {256: 0.2047, 512: 0.1503, 1024: 0.1199}
"""Of the images of that record."""
# of an N x n x E matrix, forward and backward (kernels/README.md)
_LOSS_PRODUCTS = {"softmax": 4, "sigmoid": 3}
# of N samples' two views against two of the n on a rank
_VIEWS_TO_VIEWS = 4
_FP32_BYTES = 4


class Assumptions(NamedTuple):
    """What a plan takes for granted."""

    node_size: int = 8
    """Devices of a node."""
    efficiency: float = 0.4
    """Share of a device's peak that the operations of a step reach."""
    cpu_cores: float | None = None
    """For each device; none: as in the maker's server."""
    image_px: int = 512
    """Height and width of the stored images: 256, 512 or 1024."""


class StagePlan(NamedTuple):
    """A ZeRO stage on one device."""

    stage: Stage
    largest_micro_batch: int
    """Pairs at once that fit, up to a rank's share; 0: not even one."""
    memory: StepMemory
    """With `train.micro_batch`, or the largest for `auto`, or one pair where none fits."""


class Terms(NamedTuple):
    """Seconds of a step that each of its parts would take alone."""

    compute: float
    """Towers and loss."""
    gradients: float
    """Adding up gradients over ranks."""
    parameters: float
    """Gathering parameters."""
    loss: float
    """Passing features round."""
    data: float
    """Reading, decoding and cropping."""


class Traffic(NamedTuple):
    """Bytes that a rank sends in a step."""

    gradients: float
    parameters: float
    loss: float


class Arithmetic(NamedTuple):
    """Floating-point operations of a step on a rank; a multiply-add counts 2."""

    first_encoding: float
    """Of two passes: without what backward needs."""
    encoding: float
    backward: float
    """Recomputed activations included."""
    loss: float

    @property
    def towers(self) -> float:
        """All but the loss."""
        return self.first_encoding + self.encoding + self.backward


class Plan(NamedTuple):
    """A run on `num_ranks` devices."""

    num_ranks: int
    device: Device
    assumptions: Assumptions
    stages: tuple[StagePlan, ...]
    stage: Stage
    """The run's own."""
    share: int
    """Pairs of a step on a rank."""
    micro_batch: int
    """Pairs at once; 0: they do not fit, and the times are those of one at a time."""
    is_auto: bool
    """Whether `train.micro_batch` leaves the choice to the plan."""
    overlaps: bool
    """Whether gradients are added up beside the backward pass."""
    num_learning: int
    """Parameters that learn."""
    num_frozen: int
    flops: Flops
    """Of the towers for a pair."""
    arithmetic: Arithmetic
    traffic: Traffic
    terms: Terms
    busy_s: float
    """Of a step on a device: arithmetic, and what is sent and not hidden behind it."""
    peak_flops_per_s: float
    """Of the device in the run's precision."""
    num_loaders: int
    """Processes that read and decode for a device, a core each."""
    pairs_per_core_s: int
    """That one of them makes."""
    steps: int
    """Of the run."""
    samples: int
    """Pairs of the run."""

    @property
    def step_s(self) -> float:
        """Of a step, waiting for data included."""
        return max(self.busy_s, self.terms.data)

    @property
    def limit(self) -> str:
        """The name of the term that limits: data where steps wait for it, else the longest of the others."""
        if self.terms.data > self.busy_s:
            return "data"
        return max(set(Terms._fields) - {"data"}, key=lambda name: float(getattr(self.terms, name)))

    @property
    def num_chunks(self) -> int:
        """Micro batches of a share."""
        return -(-self.share // max(self.micro_batch, 1))

    @property
    def pairs_per_s(self) -> float:
        """Of all ranks."""
        return self.samples / self.steps / self.step_s

    @property
    def mfu(self) -> float:
        """Three forward passes a pair as a share of the peak: the usual measure, which counts nothing twice."""
        return 3 * self.flops.forward * self.pairs_per_s / self.num_ranks / self.peak_flops_per_s

    @property
    def days(self) -> float:
        """Of the run."""
        return self.steps * self.step_s / 86_400

    @property
    def gpu_hours(self) -> float:
        """Of the run."""
        return self.days * 24 * self.num_ranks

    @property
    def cpu_cores(self) -> float:
        """For each device."""
        return _cpu_cores(self.device, self.assumptions)

    @property
    def cpu_cores_needed(self) -> float:
        """For each device, so that data takes no longer than the rest."""
        return self._device_pairs_per_s / self.pairs_per_core_s

    @property
    def data_bytes_per_s(self) -> float:
        """That each device's loader reads, so that data takes no longer than the rest."""
        px = self.assumptions.image_px
        return self._device_pairs_per_s * px**2 * JPEG_BYTES_PER_PX[px]

    @property
    def _device_pairs_per_s(self) -> float:
        return self.share / self.busy_s


def plan(config: RunConfig, num_ranks: int, device: Device, assumptions: Assumptions) -> Plan:
    """Plan a run, or a stage of one, on `num_ranks` devices; seconds for the first plan of a model, milliseconds for others.

    Raises:
        ConfigError: the configuration cannot run on so many ranks, or a tower cannot be built.
    """
    validate(config, num_ranks)
    stages = tuple(_stage_plan(config, num_ranks, device, stage) for stage in STAGES)
    stage = config.train.zero_stage
    share = config.train.share(num_ranks)
    largest = stages[stage].largest_micro_batch
    # `auto` makes as few chunks as fit, of about the same size
    balanced = -(-share // -(-share // largest)) if largest else 0
    micro_batch = balanced if config.train.micro_batch == "auto" else min(config.train.micro_batch, share)
    if micro_batch > largest:
        micro_batch = 0
    counts = count_memory(config.model, config.data, config.train.precision)
    num_learning, num_frozen = sum(counts.learning), sum(counts.frozen)
    num_chunks = -(-share // max(micro_batch, 1))
    traffic = _traffic(config, num_ranks, num_chunks, num_learning, num_frozen)
    flops = count_flops(config.model, config.data)
    arithmetic = _arithmetic(config, flops, share, num_chunks)
    peak = device_flops_per_s(device, config.train.precision)
    terms, busy_s = _seconds(config, num_ranks, num_chunks, device, assumptions, arithmetic, traffic)
    return Plan(
        num_ranks=num_ranks,
        device=device,
        assumptions=assumptions,
        stages=stages,
        stage=stage,
        share=share,
        micro_batch=micro_batch,
        is_auto=config.train.micro_batch == "auto",
        overlaps=overlaps(config),
        num_learning=num_learning,
        num_frozen=num_frozen,
        flops=flops,
        arithmetic=arithmetic,
        traffic=traffic,
        terms=terms,
        busy_s=busy_s,
        peak_flops_per_s=peak,
        num_loaders=_num_loaders(config),
        pairs_per_core_s=_pairs_per_core_s(config, assumptions),
        steps=config.train.steps,
        samples=config.train.steps * config.train.global_batch,
    )


def device_flops_per_s(device: Device, precision: str) -> float:
    """A device's peak."""
    return 1e12 * (device.fp32_tflops if precision == "fp32" else device.bf16_tflops)


def sweep(config: RunConfig, numbers_of_ranks: Iterable[int], device: Device, assumptions: Assumptions) -> list[Plan]:
    """Plans on several numbers of devices; those beyond a pair each are left out. Raises as `plan`."""
    return [plan(config, num, device, assumptions) for num in numbers_of_ranks if num <= config.train.global_batch]


def _stage_plan(config: RunConfig, num_ranks: int, device: Device, stage: Stage) -> StagePlan:
    offload = {"offload_optimizer": config.train.offload_optimizer and stage > 0}
    offload["offload_parameters"] = config.train.offload_parameters and stage == 3
    train = config.train.model_copy(update={"zero_stage": stage, **offload})
    config = config.model_copy(update={"train": train})
    kind: DeviceType = "cpu" if device.name == "cpu" else "cuda"
    largest = largest_micro_batch(config, num_ranks, int(MEMORY_SHARE * device.memory_gib * 2**30), kind)
    micro_batch = max(largest, 1) if train.micro_batch == "auto" else train.micro_batch
    return StagePlan(stage, largest, step_memory(config, num_ranks, micro_batch, kind))


def _arithmetic(config: RunConfig, flops: Flops, share: int, num_chunks: int) -> Arithmetic:
    width = _LOSS_PRODUCTS[config.loss.kind] * len(config.data.views) * config.model.embed_dim
    if config.model.projector:
        width += _LOSS_PRODUCTS["softmax"] * _VIEWS_TO_VIEWS * config.model.projector.dim
    if config.data.text_pairs.sources:
        width += _LOSS_PRODUCTS["softmax"] * (1 + config.data.text_pairs.num_negatives) * config.model.embed_dim
    return Arithmetic(
        first_encoding=share * flops.features if num_chunks > 1 else 0,
        encoding=share * flops.forward,
        backward=share * flops.backward,
        loss=2.0 * width * config.train.global_batch * share,
    )


def _seconds(
    config: RunConfig,
    num_ranks: int,
    num_chunks: int,
    device: Device,
    assumptions: Assumptions,
    arithmetic: Arithmetic,
    traffic: Traffic,
) -> tuple[Terms, float]:
    """Each term alone, and a step's arithmetic with what is not hidden behind it."""
    rate = assumptions.efficiency * device_flops_per_s(device, config.train.precision)
    towers_s = arithmetic.towers / rate
    loss_s = arithmetic.loss / (assumptions.efficiency * device_flops_per_s(device, config.loss.compute_dtype))
    # where gradients are added up beside the pass that makes them: the last one, or every one
    backward_s = arithmetic.backward / rate / (1 if _reduces_every_chunk(config) else num_chunks)
    collective, hop = _links(device, num_ranks, assumptions.node_size)
    cores = min(_cpu_cores(device, assumptions), _num_loaders(config))
    share = config.train.share(num_ranks)
    terms = Terms(
        compute=towers_s + loss_s,
        gradients=traffic.gradients / collective,
        parameters=traffic.parameters / collective,
        loss=traffic.loss / (hop if uses_ring(config.loss, num_ranks) else collective),
        data=share / (cores * _pairs_per_core_s(config, assumptions)),
    )
    exposed_s = max(terms.gradients - (backward_s if overlaps(config) else 0.0), 0.0)
    exposed_s += max(terms.parameters - (towers_s if config.train.zero_stage == 3 else 0.0), 0.0)
    exposed_s += max(terms.loss - loss_s, 0.0)
    return terms, terms.compute + exposed_s


def _cpu_cores(device: Device, assumptions: Assumptions) -> float:
    return device.cpu_cores if assumptions.cpu_cores is None else assumptions.cpu_cores


def _pairs_per_core_s(config: RunConfig, assumptions: Assumptions) -> int:
    rates = SAMPLES_PER_CPU_S if config.model.projector is None else SAMPLES_WITH_VIEWS_PER_CPU_S
    return rates[assumptions.image_px]


def _num_loaders(config: RunConfig) -> int:
    # without processes of its own the loader takes the rank's, one core as well
    return max(config.data.workers, 1)


def _traffic(config: RunConfig, num_ranks: int, num_chunks: int, learning: int, frozen: int) -> Traffic:
    """What a rank sends in a step; an all-reduce is two passes of (W - 1) / W of its bytes, the others are one."""
    stage, once = config.train.zero_stage, _FP32_BYTES * learning * (num_ranks - 1) / num_ranks
    if stage < 3:
        # DeepSpeed adds up stage 2's gradients on all ranks and keeps a shard
        reductions = 2 * (num_chunks if _reduces_every_chunk(config) else 1)
        return Traffic(reductions * once, once if stage else 0.0, _loss_bytes(config, num_ranks))
    reductions = num_chunks if _reduces_every_chunk(config) else 1
    gathers = 1 if num_chunks == 1 else 3 * num_chunks
    whole = once + _FP32_BYTES * frozen * (num_ranks - 1) / num_ranks
    return Traffic(reductions * once, gathers * whole, _loss_bytes(config, num_ranks))


def overlaps(config: RunConfig) -> bool:
    """Whether gradients are added up while the backward pass that makes them goes on."""
    stage = config.train.zero_stage
    return bool(stage) and bool(deepspeed_config(config, 1)["zero_optimization"].get("overlap_comm", stage == 3))


def _reduces_every_chunk(config: RunConfig) -> bool:
    return config.train.zero_stage >= 2 and config.train.reduce_gradients == "chunk"


def _loss_bytes(config: RunConfig, num_ranks: int) -> float:
    """What a rank sends for the contrastive terms, forward and backward: kernels/README.md, "Over ranks"."""
    if num_ranks == 1:
        return 0.0
    loss, model, pairs = config.loss, config.model, config.data.text_pairs
    # of each: width of a column, columns a pair, duplicates
    terms = [(loss.kind, model.embed_dim, len(config.data.views), loss.duplicates)]
    if model.projector:
        terms.append(("softmax", model.projector.dim, 2, "ignore"))
    if pairs.sources:
        terms.append(("softmax", model.embed_dim, 1 + pairs.num_negatives, "negative"))
    return sum(_term_bytes(config, num_ranks, *term) for term in terms)


def _term_bytes(config: RunConfig, num_ranks: int, kind: str, dim: int, columns_a_pair: int, duplicates: str) -> float:
    loss = config.loss
    positives = duplicates == "positive"
    # of a column: features, validity and id; then what is added to on the way
    fixed = dim * (2 if loss.compute_dtype == "bf16" else _FP32_BYTES) + 1 + 8 * (duplicates != "negative")
    statistics, terms, gradient = 16 if positives else 8, 8 if positives else 4, _FP32_BYTES * dim
    tours = [(fixed, gradient)] if kind == "sigmoid" else [(fixed, statistics), (fixed + terms, gradient)]
    # around a ring what is carried must also come home
    homeward = num_ranks if uses_ring(config.loss, num_ranks) else num_ranks - 1
    columns = columns_a_pair * config.train.share(num_ranks)
    return float(columns * sum((num_ranks - 1) * there + homeward * back for there, back in tours))


def _links(device: Device, num_ranks: int, node_size: int) -> tuple[float, float]:
    """Bytes a second of a collective, to which all network cards of a node contribute, and of one rank to the next."""
    node, card = (1e9 * LINK_SHARE * rate for rate in (device.node_gb_per_s, device.network_gb_per_s))
    if num_ranks <= node_size:
        return node, node
    return min(node, node_size * card), min(node, card)
