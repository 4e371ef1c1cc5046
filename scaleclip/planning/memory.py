"""Memory of a training step on one rank, before any of it is taken.

The towers' part is counted (scaleclip.planning.counting). What ZeRO keeps of parameters, gradients and optimizer state
(arXiv:1910.02054) is arithmetic on the sizes of parameters, as DeepSpeed 0.19.8 does it; tools/check_plan.py holds the sum
against measurements.

Dimensions: n pairs of a rank's share, V text views, E the shared embedding space.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scaleclip.config import LossConfig, RunConfig
from scaleclip.deepspeed_config import deepspeed_config
from scaleclip.planning.counting import Counts, count_memory, num_pair_texts, num_tokens

DeviceType = Literal["cuda", "cpu"]
"""Where a rank trains; on "cpu" the device is the host."""
Moment = Literal["towers", "loss", "reduction", "optimizer"]

_FP32_BYTES = 4
# DeepSpeed's own settings, in elements
_ZERO_DEFAULTS = {"stage3_prefetch_bucket_size": 50_000_000, "stage3_max_reuse_distance": 1_000_000_000}
_STAGE_0_BUCKET = 500_000_000
# of scaleclip_kernels, in its triton_launch.py, panels.py and distributed.py
_TRITON_BYTES = (64 << 20) + (256 << 20)
_PANELS_BYTES = 2 * 1024 * 1024 * _FP32_BYTES
_ROWS_ELEMENTS = 1 << 24
_GATHERED_BYTES = 64 << 20
# of scaleclip.losses.projection
_HIDDEN_TENSORS = 10
MAX_RING_RANKS = 64
"""Up to which `loss.schedule=auto` is the ring."""


class StepMemory(NamedTuple):
    """Bytes on a rank's device at the moment of a step that takes most, by what they are for."""

    moment: Moment
    """When that is: encoding a micro batch or going back through it, the loss, adding up gradients, AdamW's step."""
    parameters: int = 0
    """What the towers compute with: all parameters in fp32, or under stage 3 a shard and what is gathered of the others."""
    masters: int = 0
    """The fp32 copies that AdamW updates, where these are not the parameters themselves."""
    optimizer: int = 0
    """AdamW's two moments."""
    gradients: int = 0
    """Of the parameters that learn, in fp32."""
    activations: int = 0
    """What the towers hold for one micro batch: activations, their gradients, temporaries, autocast's copies of weights."""
    inputs: int = 0
    """Pixels and tokens."""
    features: int = 0
    """Of a share in two passes, with their gradients."""
    loss: int = 0
    """The contrastive loss's workspace."""
    communication: int = 0
    """Buckets that gradients travel in."""
    host: int = 0
    """Offloaded, in the host's memory. Not in `total`; where the device is the host, `optimizer` has it instead."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self[1:-1])


def step_memory(config: RunConfig, world_size: int, micro_batch: int, device: DeviceType = "cuda") -> StepMemory:
    """The peak of a step that encodes `micro_batch` pairs at once (a rank's share, if that is less).

    The first call for a model takes seconds, others milliseconds. torch.compile is counted as if it saved nothing.

    Raises:
        ConfigError: a tower cannot be built as configured.
    """
    counts = count_memory(config.model, config.data, config.train.precision)
    step = _Step(config, counts, world_size, micro_batch, device)
    return max(step.moments(), key=lambda moment: moment.total)


def largest_micro_batch(config: RunConfig, world_size: int, budget_bytes: int, device: DeviceType = "cuda") -> int:
    """The most pairs at once, up to a rank's share, that stay within the budget; 0 if one pair does not.

    Raises:
        ConfigError: a tower cannot be built as configured.
    """

    def fits(micro_batch: int) -> bool:
        return step_memory(config, world_size, micro_batch, device).total <= budget_bytes

    share = config.train.share(world_size)
    # one pass needs no cached features, so the share may fit where a little less does not
    if fits(share):
        return share
    low, high = 0, share
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def uses_ring(loss: LossConfig, world_size: int) -> bool:
    """Whether features go round a ring; else they are gathered."""
    return loss.schedule == "ring" or (loss.schedule == "auto" and world_size <= MAX_RING_RANKS)


class _Step:
    """The arithmetic of one rank's step."""

    def __init__(self, config: RunConfig, counts: Counts, world_size: int, micro_batch: int, device: DeviceType) -> None:
        self._train, self._loss, self._model = config.train, config.loss, config.model
        self._zero = deepspeed_config(config, world_size)["zero_optimization"]
        self._timeline, self._world_size, self._device = counts.timeline, world_size, device
        self._share = config.train.share(world_size)
        self._chunk = min(micro_batch, self._share)
        self._is_two_pass = self._chunk < self._share
        self._views, self._num_tokens = len(config.data.views), num_tokens(config.model, config.data)
        self._pair_texts, self._feature_elements = num_pair_texts(config.data), counts.features
        self._learning = _FP32_BYTES * sum(counts.learning)
        self._frozen = _FP32_BYTES * sum(counts.frozen)
        self._shard = -(-self._learning // world_size)
        self._own_gradients = 0 if self._train.offload_optimizer else _own_gradients_bytes(counts.learning, world_size)
        self._bucket = self._setting("reduce_bucket_size")

    def moments(self) -> Iterator[StepMemory]:
        """What a step holds at each moment that may be its peak."""
        yield from map(self._towers, self._passes())
        if self._train.zero_stage == 3:
            yield self._gathering()
        yield self._at("loss", **self._loss_moment())
        yield self._at("reduction", **self._while_reducing())
        yield self._at("optimizer", **self._while_updating())

    def _towers(self, beside: "_Beside") -> StepMemory:
        """The worst moment of a forward and backward pass."""
        activations = self._timeline.fixed_bytes + self._chunk * self._timeline.pair_bytes
        worst = int((activations + beside.gradients + beside.buckets).argmax())
        return self._at(
            "towers",
            gathered=self._gathered(),
            gradients=int(beside.gradients[worst]),
            activations=int(activations[worst]),
            features=self._cached_features(),
            communication=int(beside.buckets[worst]),
        )

    def _gathering(self) -> StepMemory:
        """Stage 3 in a forward pass: a message of gathered parameters is held until the last of them has been copied out.

        The worst is the last but one message, when the last one has arrived too.
        """
        gathered, message = self._gathered(), self._setting("stage3_prefetch_bucket_size")
        message = min(message, gathered)
        copied_out = (-(-gathered // message) - 1) * message if message else 0
        place = int(self._timeline.num_forward * (copied_out / gathered if copied_out else 1.0)) - 1
        held = int(self._timeline.fixed_bytes[place] + self._chunk * self._timeline.pair_bytes[place])
        # gloo gathers in a copy of its own
        messages = message * (2 if self._device == "cpu" and self._world_size > 1 else 1)
        lasting = self._lasting_of_stage_3()
        if self._is_two_pass and self._reduces_once():
            lasting["gradients"] = lasting.get("gradients", 0) + self._learning
        return self._at("towers", gathered=gathered + messages, activations=held, features=self._cached_features(), **lasting)

    def _at(self, moment: Moment, *, gathered: int = 0, **others: int) -> StepMemory:
        """With what is held at every moment."""
        stage, offload = self._train.zero_stage, self._train.offload_optimizer
        moments = 2 * (self._shard if stage else self._learning)
        # stage 3 would do without, but takes its own shards for those of another device, and copies them
        masters = self._shard if stage else 0
        parameters = self._learning + self._frozen
        host = 0
        if stage == 3:
            parameters = -(-parameters // self._world_size)
        if offload:
            # gradients lie there too, and under stages 1 and 2 a copy of the parameters on their way back
            host, moments, masters = moments + masters + (self._shard if stage == 3 else 2 * self._shard), 0, 0
        if self._train.offload_parameters:
            host, parameters = host + parameters, 0
        if self._device == "cpu":
            moments, host = moments + host, 0
        return StepMemory(moment, parameters + gathered, masters, moments, inputs=self._inputs(), host=host, **others)

    def _passes(self) -> "Iterator[_Beside]":
        """What each kind of pass that a step has holds beside the towers' activations, moment by moment."""
        done = _FP32_BYTES * self._timeline.learned
        none, whole = np.zeros_like(done), self._learning
        stage, reduces_once = self._train.zero_stage, self._reduces_once()
        if stage < 3 and reduces_once:
            waiting = none + (self._touched(self._bucket, 0) if stage == 1 else 0)
            yield _Beside(none + whole if self._is_two_pass else done, waiting)
        elif stage == 2:
            own, buckets = self._own_gradients, np.where(done > 0, self._touched(self._bucket, whole), 0)
            # a full bucket is copied to be added up, and what is this rank's kept; those of the chunks before are there already
            kept = np.where(done > self._bucket, own, 0) + (own if self._is_two_pass else 0)
            copied = np.where(
                done > 2 * self._bucket, self._bucket, np.where(done > self._bucket, max(self._bucket - own, 0), 0)
            )
            yield _Beside(kept, buckets + copied)
        else:
            lasting = self._lasting_of_stage_3()
            held = lasting["gradients"] + (whole if self._is_two_pass and reduces_once else 0)
            yield _Beside(none + held, lasting["communication"] + np.where(done > self._bucket, self._bucket, 0))

    def _while_reducing(self) -> dict[str, int]:
        """After the towers' last pass, when the last gradients are added up."""
        stage, whole, own = self._train.zero_stage, self._learning, self._own_gradients
        filled, bucket = min(self._bucket, whole), self._touched(self._bucket, whole)
        features = self._cached_features()
        if stage == 0:
            return {"gradients": whole, "communication": min(whole, _FP32_BYTES * _STAGE_0_BUCKET), "features": features}
        if stage == 3:
            lasting = self._lasting_of_stage_3()
            held = lasting["gradients"] + (whole if self._is_two_pass and self._reduces_once() else 0)
            return {"gradients": held, "communication": lasting["communication"] + filled, "features": features}
        if self._reduces_once():
            # bucket by bucket, whole gradients make room for a copy of the bucket and then for what is kept
            return {"gradients": whole + max(own - filled, 0), "communication": bucket, "features": features}
        several = whole > filled
        gradients = own * (2 if self._is_two_pass else 1)
        communication = bucket + (filled if several else max(filled - own, 0))
        return {"gradients": gradients, "communication": communication, "features": features}

    def _while_updating(self) -> dict[str, int]:
        features, bucket = self._cached_features(), self._lasting_of_stage_3().get("communication", 0)
        if self._train.zero_stage == 0:
            return {"gradients": self._learning, "communication": 0, "features": features}
        # a flat copy is made of the gradients of the shard
        held = self._shard if self._train.zero_stage == 3 else self._own_gradients
        return {"gradients": self._on_device(held + self._shard), "communication": bucket, "features": features}

    def _reduces_once(self) -> bool:
        """Whether whole gradients are kept until the last chunk."""
        return self._train.zero_stage < 2 or (self._is_two_pass and self._train.reduce_gradients == "step")

    def _lasting_of_stage_3(self) -> dict[str, int]:
        """Its gradients and its bucket, which are never freed."""
        if self._train.zero_stage < 3:
            return {}
        return {"gradients": self._on_device(self._shard), "communication": self._touched(self._bucket, self._learning)}

    def _touched(self, buffer: int, written: int) -> int:
        """A host gives memory to what is written alone."""
        return min(buffer, written) if self._device == "cpu" else buffer

    def _on_device(self, shard: int) -> int:
        return 0 if self._train.offload_optimizer else shard

    def _gathered(self) -> int:
        """Parameters of other ranks' shards, which stage 3 keeps while they are used again soon; one rank's shard is all."""
        if self._train.zero_stage < 3 or (self._world_size == 1 and not self._train.offload_parameters):
            return 0
        limit = self._setting("stage3_max_reuse_distance") + self._setting("stage3_prefetch_bucket_size")
        return min(self._learning + self._frozen, limit)

    def _inputs(self) -> int:
        num_images = 3 if self._model.projector else 1
        a_pair = 3 * num_images * self._model.image.size**2 + 8 * self._num_tokens * (self._views + self._pair_texts)
        a_pair += 17  # id, validity, seed
        a_pair += 8 * (self._model.caption_decoder.queries + 2) if self._model.caption_decoder else 0
        # a device gets the next chunk while it works on one; the host holds all that the loader gave
        return a_pair * (self._share if self._device == "cpu" else min(2 * self._chunk, self._share))

    def _cached_features(self) -> int:
        """Of two passes, with their gradients."""
        return 2 * self._features() if self._is_two_pass else 0

    def _features(self) -> int:
        """fp32 features of a share."""
        return _FP32_BYTES * self._share * self._feature_elements

    def _loss_moment(self) -> dict[str, int]:
        """The loss, forward and backward: what the towers then hold, or the features of two passes."""
        last = self._timeline.num_forward - 1
        held = int(self._timeline.fixed_bytes[last] + self._chunk * self._timeline.pair_bytes[last])
        lasting = self._lasting_of_stage_3()
        if self._is_two_pass:
            return {"features": self._cached_features(), "loss": self._loss_workspace(), **lasting}
        return {"activations": held, "loss": self._loss_workspace(), "gathered": self._gathered(), **lasting}

    def _loss_workspace(self) -> int:
        """Of all terms: what each saves stays until their sum's backward pass. Panels belong to one at a time."""
        width, projector = self._model.embed_dim, self._model.projector
        is_triton = self._device == "cuda" and self._loss.backend in ("auto", "triton")
        held = self._contrastive_workspace(width, self._views) + (_TRITON_BYTES if is_triton else _PANELS_BYTES)
        if self._device == "cuda" and not is_triton:
            held += 2 * _FP32_BYTES * min(_ROWS_ELEMENTS, self._share * width)
        if projector:
            # of both views: two hidden layers, each before, in and behind its norm and ReLU, with gradients
            hidden = 2 * self._share * (_HIDDEN_TENSORS * projector.hidden + 2 * projector.dim)
            held += _FP32_BYTES * hidden + 2 * self._contrastive_workspace(projector.dim, 1)
        if self._pair_texts:
            held += self._contrastive_workspace(width, self._pair_texts - 1)
        return held

    def _contrastive_workspace(self, width: int, columns: int) -> int:
        """Of a contrastive loss of a share's rows with so many columns a row."""
        images = self._share * width
        texts = images * columns
        compute_bytes = 2 if self._loss.compute_dtype == "bf16" else _FP32_BYTES
        # texts of all views in one tensor, both sides in the compute dtype, their gradients
        local = _FP32_BYTES * texts + (compute_bytes * (images + texts) if compute_bytes == 2 else 0)
        local += _FP32_BYTES * (images + texts)
        if self._world_size == 1:
            return local
        if uses_ring(self._loss, self._world_size):
            return local + 2 * texts * (compute_bytes + _FP32_BYTES)
        gathered = min(_GATHERED_BYTES, self._world_size * texts * compute_bytes)
        return local + 2 * gathered * (compute_bytes + _FP32_BYTES) // compute_bytes

    def _setting(self, name: str) -> int:
        """Bytes of a setting that DeepSpeed has in elements."""
        return _FP32_BYTES * int((_ZERO_DEFAULTS | self._zero)[name])


class _Beside(NamedTuple):
    """Bytes at every moment of the towers' timeline."""

    gradients: NDArray[np.int64]
    """Of parameters, outside of buckets."""
    buckets: NDArray[np.int64]


def _own_gradients_bytes(learning: Sequence[int], world_size: int) -> int:
    """fp32 gradients of a rank's shard under stages 1 and 2, which keep those of a parameter on a shard's border whole."""
    ends = np.cumsum(np.array(learning, dtype=np.int64))
    starts = ends - learning
    shard = -(-int(ends[-1]) // world_size)
    firsts = np.searchsorted(ends, np.arange(world_size) * shard, side="right")
    lasts = np.searchsorted(starts, (np.arange(world_size) + 1) * shard, side="left") - 1
    held = [int(ends[last] - starts[first]) for first, last in zip(firsts, lasts, strict=True) if first <= last]
    return _FP32_BYTES * max(held)
