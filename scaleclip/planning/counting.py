"""What encoding a micro batch takes, counted on fake tensors: the model's own code runs without arithmetic and without memory.

Attention is counted as the fused kernels do it, which store one number a row and no T x T matrix.

Dimensions: B pairs, C channels, H W pixels, T tokens.
"""

import contextlib
import functools
import gc
import math
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from scaleclip.config import DataConfig, ModelConfig
from scaleclip.models.dual_encoder import DualEncoder, Features, Inputs

_AUTOCAST = {"fp32": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}  # unused with fp32
# Two sizes make a line. One pair would not do: sizes of 1 are broadcast, and take other ways.
_SMALL, _LARGE = 2, 4


class Timeline(NamedTuple):
    """Memory over one forward and backward pass: at moment i, B pairs hold fixed_bytes[i] + B * pair_bytes[i].

    Activations, their gradients and temporaries, with autocast's copies of the weights; without parameters, without complete
    gradients of parameters and without the inputs.
    """

    fixed_bytes: NDArray[np.int64]
    pair_bytes: NDArray[np.int64]
    learned: NDArray[np.int64]
    """Parameters (elements) whose gradients are complete."""
    num_forward: int
    """Moments of the forward pass."""


class Counts(NamedTuple):
    """A model as the planner sees it."""

    learning: tuple[int, ...]
    """Elements of each parameter that learns."""
    frozen: tuple[int, ...]
    """Elements of each parameter that does not."""
    timeline: Timeline
    features: int
    """Elements of all features of a pair, which two passes keep."""


class Flops(NamedTuple):
    """Floating-point operations of the towers for one pair; a multiply-add counts 2."""

    forward: int
    backward: int
    """Recomputed activations included."""
    features: int
    """Of a forward pass that writes no captions."""


def num_tokens(model: ModelConfig, data: DataConfig) -> int:
    """Tokens of every text in a batch: those of the widest view."""
    return data.num_tokens(model.text.context_length)


def num_pair_texts(data: DataConfig) -> int:
    """Texts of a row of `data.text_pairs`, of which each pair of image and text brings one."""
    return 2 + data.text_pairs.num_negatives if data.text_pairs.sources else 0


def count_memory(model: ModelConfig, data: DataConfig, precision: str) -> Counts:
    """Parameters and memory of a micro batch in training, in a second or two.

    Raises:
        ConfigError: a tower cannot be built as configured.
    """
    return _count_memory(model.model_dump_json(), num_tokens(model, data), len(data.views), num_pair_texts(data), precision)


def count_flops(model: ModelConfig, data: DataConfig) -> Flops:
    """Matrix products, convolutions and attention of a micro batch in training; raises as `count_memory`."""
    return _count_flops(model.model_dump_json(), num_tokens(model, data), len(data.views), num_pair_texts(data))


@functools.cache
def _count_memory(model_json: str, tokens: int, views: int, pair_texts: int, precision: str) -> Counts:
    config = ModelConfig.model_validate_json(model_json)
    with _fake_model(config) as model:
        inputs = [_inputs(config, size, tokens, views, pair_texts) for size in (_SMALL, _LARGE)]
        if config.caption_decoder:
            with torch.no_grad():
                model(*inputs[0])  # makes the mask that later ones use again
        small, large = (_track(model, each, precision) for each in inputs)
        learning = tuple(p.numel() for p in model.parameters() if p.requires_grad)
        frozen = tuple(p.numel() for p in model.parameters() if not p.requires_grad)
    pair_bytes = (large.held_bytes - small.held_bytes) // (_LARGE - _SMALL)
    timeline = Timeline(small.held_bytes - _SMALL * pair_bytes, pair_bytes, small.learned, small.num_forward)
    return Counts(learning, frozen, timeline, small.features)


@functools.cache
def _count_flops(model_json: str, tokens: int, views: int, pair_texts: int) -> Flops:
    config = ModelConfig.model_validate_json(model_json)
    with _fake_model(config) as model:
        inputs = _inputs(config, 1, tokens, views, pair_texts)
        # the counter does not know the CPU's fused attention; the plain one is made of matrix products
        with sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad(), FlopCounterMode(display=False) as forward:
                model(*inputs)
            with torch.no_grad(), FlopCounterMode(display=False) as features:
                model(*inputs._replace(captions_BS=None))
            # the caption decoder's loss makes its gradients in its forward pass
            with FlopCounterMode(display=False, custom_mapping=_OWN_FLOPS) as both:
                _backward(model(*inputs))
    total = both.get_total_flops()
    return Flops(forward.get_total_flops(), total - forward.get_total_flops(), features.get_total_flops())


def _convolution_backward(grad_shape: Any, x_shape: Any, w_shape: Any, *rest: Any, out_shape: Any, **others: Any) -> int:
    """PyTorch's own formula counts a depthwise convolution as a full one."""
    output_mask = rest[-1]
    num_wanted = int(output_mask[0]) + int(output_mask[1])
    return int(2 * math.prod(grad_shape) * math.prod(w_shape[1:]) * num_wanted)


_OWN_FLOPS = {torch.ops.aten.convolution_backward: _convolution_backward}


@contextlib.contextmanager
def _fake_model(config: ModelConfig) -> Iterator[DualEncoder]:
    with torch.device("meta"):
        model = DualEncoder(config)
    # the collector would free at moments of its own
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _ValuesUnknown():  # type: ignore[no-untyped-call]
            yield model.to_empty(device="cpu").train()
    finally:
        if was_collecting:
            gc.enable()


class _ValuesUnknown(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers no where a model asks for a value, as towers with padding do: whether their mask hides nothing."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return 0
        return function(*args, **(kwargs or {}))


def _inputs(config: ModelConfig, size: int, tokens: int, views: int, pair_texts: int) -> Inputs:
    pixels_BCHW, *augmented_BCHW = (
        torch.empty(size, 3, config.image.size, config.image.size, dtype=torch.uint8)
        for _ in range(3 if config.projector else 1)
    )
    texts_BT = [torch.empty(size, tokens, dtype=torch.int64) for _ in range(views + pair_texts)]
    number_B, decoder = torch.empty(size, dtype=torch.int64), config.caption_decoder
    return Inputs(
        pixels_BCHW,
        tuple(texts_BT[:views]),
        number_B,
        tuple(augmented_BCHW),
        tuple(texts_BT[views:]),
        torch.empty(size, decoder.queries + 1, dtype=torch.int64) if decoder else None,
        number_B if decoder else None,
    )


def _backward(features: Features) -> None:
    outputs = [*features.rows(), *features.whole()]
    outputs += [] if features.caption_loss is None else [features.caption_loss]
    outputs = [output for output in outputs if output.requires_grad]  # a locked tower without a projection has none
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


class _Track(NamedTuple):
    held_bytes: NDArray[np.int64]
    learned: NDArray[np.int64]
    num_forward: int
    features: int


def _track(model: DualEncoder, inputs: Inputs, precision: str) -> _Track:
    tracker = _LiveBytes()
    with _gradients_taken(model, tracker), tracker:
        with torch.autocast("cpu", _AUTOCAST[precision], enabled=precision != "fp32"):
            features = model(*inputs)
        num_forward = len(tracker.held_bytes)
        _backward(features)
    num_features = sum(row.shape[1] for row in features.rows())
    return _Track(np.array(tracker.held_bytes), np.array(tracker.learned), num_forward, num_features)


@contextlib.contextmanager
def _gradients_taken(model: nn.Module, tracker: "_LiveBytes") -> Iterator[None]:
    """Complete gradients are counted and dropped: how long they stay is ZeRO's affair."""

    def take(parameter: Tensor) -> None:
        tracker.num_learned += parameter.numel()
        parameter.grad = None

    learning = [p for p in model.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(take) for p in learning]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all storages that operators made and that still live, whenever one was made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held_bytes: list[int] = []
        self.learned: list[int] = []
        self.num_learned = 0
        self._live: dict[int, int] = {}
        self._now = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is None or storage._cdata in given or storage._cdata in self._live:
                continue
            self._live[storage._cdata] = storage.nbytes()
            self._now += storage.nbytes()
            weakref.finalize(storage, self._forget, storage._cdata)
            self.held_bytes.append(self._now)
            self.learned.append(self.num_learned)
        return out

    def _forget(self, storage: int) -> None:
        self._now -= self._live.pop(storage)
