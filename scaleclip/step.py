"""One optimizer step on a rank's share of the global batch, in one pass over it or in two.

A share that fits is encoded once, with what its backward pass needs. A larger one is cut into chunks of `train.micro_batch`
pairs: they are encoded without keeping anything but the features, the loss is taken once, on all of them, and every chunk is
encoded again to carry its features' gradients back (GradCache, arXiv:2101.06983). The gradients are those of one big batch.

Random numbers depend on (seed, step, first pair of the chunk in the global batch) alone, so the second pass repeats those of
the first, and every layout with the same chunks draws the same.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from scaleclip.config import RunConfig
from scaleclip.data.loader import Batch
from scaleclip.data.order import hash64
from scaleclip.distributed import World
from scaleclip.engine import Engine
from scaleclip.losses.objective import contrastive
from scaleclip.models.dual_encoder import Features


class StepResult(NamedTuple):
    """What a step found; tensors without dimensions, on the device, alike on every rank."""

    loss: Tensor
    """Mean over the global batch, fp32."""
    grad_norm: Tensor
    """Global L2 norm of the gradients before clipping, fp32."""
    logit_scale: Tensor
    """Multiplier of the similarities before the step, fp32."""
    bad: Tensor
    """Whether loss or gradients were not finite, bool: the step was left out."""


class _Inputs(NamedTuple):
    """A chunk on the device; see loader.Batch."""

    pixels_BCHW: Tensor
    tokens_BT: tuple[Tensor, ...]
    ids_B: Tensor
    valid_B: Tensor
    seeds_B: Tensor


class TrainStep:
    """Optimizer steps of a run. Every rank calls, with as many chunks as the others.

    Args:
        engine: the model and its optimizer.
        config: the run's configuration.
        world: this rank.
        micro_batch: pairs of a chunk; the last one of a share may have fewer.
    """

    def __init__(self, engine: Engine, config: RunConfig, world: World, micro_batch: int) -> None:
        self._engine, self._loss, self._seed = engine, config.loss, config.run.seed
        self._copies = _Copies(world.device)
        share = config.train.share(world.size)
        self._first_pairs = range(world.rank * share, (world.rank + 1) * share, micro_batch)

    @property
    def num_chunks(self) -> int:
        """Chunks of a step."""
        return len(self._first_pairs)

    def __call__(self, chunks: Iterator[Batch], step: int, lr: float) -> StepResult:
        """Take optimizer step `step` (the first is 0) with learning rate `lr` on the next `num_chunks` of `chunks`.

        Nothing is read from the device.
        """
        with self._engine.one_step(self.num_chunks):
            if self.num_chunks == 1:
                features, loss = self._one_pass(next(chunks), step)
            else:
                features, loss = self._two_passes(chunks, step)
        outcome = self._engine.step(loss, lr)
        return StepResult(loss, outcome.grad_norm, features.logit_scale.detach(), outcome.bad)

    def _one_pass(self, chunk: Batch, step: int) -> tuple[Features, Tensor]:
        inputs = self._copies(chunk)
        features = self._encode(inputs, step, self._first_pairs[0])
        loss = contrastive(features, inputs.ids_B, inputs.valid_B, self._loss)
        self._engine.backward(loss, last=True)
        return features, loss.detach()

    def _two_passes(self, batches: Iterator[Batch], step: int) -> tuple[Features, Tensor]:
        chunks, cached = list[Batch](), list[Features]()
        ids, valid = list[Tensor](), list[Tensor]()
        with torch.no_grad():
            for first_pair in self._first_pairs:
                # one by one: the loader prepares the next while this one is encoded
                chunks.append(next(batches))
                inputs = self._copies(chunks[-1])
                cached.append(self._encode(inputs, step, first_pair))
                ids.append(inputs.ids_B)
                valid.append(inputs.valid_B)
        features = _leaves(cached)
        del cached
        loss = contrastive(features, torch.cat(ids), torch.cat(valid), self._loss)
        torch.autograd.backward(loss)
        gradients = _gradients(features)
        for number, (inputs, first_pair) in enumerate(zip(map(self._copies, chunks), self._first_pairs, strict=True)):
            last = number == len(chunks) - 1
            again = self._encode(inputs, step, first_pair)
            self._engine.backward(_surrogate(again, gradients, number, self._first_pairs.step, last), last=last)
        return features, loss.detach()

    def _encode(self, inputs: _Inputs, step: int, first_pair: int) -> Features:
        seed = int(hash64(self._seed, step, first_pair)[0])
        # torch.manual_seed would also visit every backend, and takes as long as a small chunk
        torch.default_generator.manual_seed(seed)
        if inputs.pixels_BCHW.is_cuda:
            torch.cuda.manual_seed(seed)
        return self._engine(inputs.pixels_BCHW, inputs.tokens_BT, inputs.seeds_B)


def _leaves(chunks: Iterable[Features]) -> Features:
    """All chunks' features as one, cut off from the towers, and waiting for gradients."""
    images, texts, scales, biases = zip(*chunks, strict=True)
    return Features(
        torch.cat(images).requires_grad_(),
        tuple(torch.cat(view).requires_grad_() for view in zip(*texts, strict=True)),
        scales[-1].requires_grad_(),
        None if biases[-1] is None else biases[-1].requires_grad_(),
    )


def _gradients(features: Features) -> Features:
    """Where the gradients of `features` are, in the same places."""
    return Features(
        _gradient(features.image_BE),
        tuple(_gradient(text_BE) for text_BE in features.texts_BE),
        _gradient(features.logit_scale),
        None if features.logit_bias is None else _gradient(features.logit_bias),
    )


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None, "the loss depends on all of its features"
    return tensor.grad


def _surrogate(features: Features, gradients: Features, number: int, micro_batch: int, last: bool) -> Tensor:
    """A scalar whose gradient through chunk `number` is the loss's: features times their gradients.

    The scale and the bias belong to the whole batch: they count in the last chunk, and with 0 in the others, so that every
    parameter takes part in every backward pass, as ZeRO expects.
    """
    here = slice(number * micro_batch, (number + 1) * micro_batch)
    pairs = [(features.image_BE, gradients.image_BE[here])]
    pairs += [(text, gradient[here]) for text, gradient in zip(features.texts_BE, gradients.texts_BE, strict=True)]
    pairs.append((features.logit_scale, gradients.logit_scale if last else torch.zeros_like(gradients.logit_scale)))
    if features.logit_bias is not None and gradients.logit_bias is not None:
        pairs.append((features.logit_bias, gradients.logit_bias if last else torch.zeros_like(gradients.logit_bias)))
    return torch.stack([(feature * gradient).sum() for feature, gradient in pairs]).sum()


class _Copies:
    """Copies chunks to the device beside the work that is queued there: the host runs ahead of it between log steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, chunk: Batch) -> _Inputs:
        """The chunk's tensors on the device, ready for its current stream."""
        with torch.cuda.stream(self._stream):  # None: no other stream
            tokens = tuple(self._copy(tokens_BT) for tokens_BT in chunk.tokens_BT)
            pixels, ids, valid, seeds = map(self._copy, (chunk.pixels_BCHW, chunk.ids_B, chunk.valid_B, chunk.seeds_B))
        if self._stream is not None:
            user = torch.cuda.current_stream(self._device)
            user.wait_stream(self._stream)
            for copy in (pixels, *tokens, ids, valid, seeds):
                copy.record_stream(user)
        return _Inputs(pixels, tokens, ids, valid, seeds)

    def _copy(self, part: Tensor) -> Tensor:
        return part.to(self._device, non_blocking=True)
