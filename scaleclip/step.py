"""One optimizer step on a rank's share of the global batch, in one pass over it or in two.

A share that fits is encoded once, with what its backward pass needs. A larger one is cut into chunks of `train.micro_batch`
pairs: they are encoded without keeping anything but the features, the losses are taken once, on all of them, and every chunk
is encoded again to carry its features' gradients back (GradCache, arXiv:2101.06983). The gradients are those of one big batch.
Captions are written sample by sample: their loss is a chunk's own, and belongs to the second pass alone.

Random numbers depend on (seed, step, first pair of the chunk in the global batch) alone, so the second pass repeats those of
the first, and every layout with the same chunks draws the same.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from scaleclip.config import RunConfig
from scaleclip.data.loader import Batch
from scaleclip.data.order import hash64
from scaleclip.distributed import World
from scaleclip.engine import Engine
from scaleclip.losses.objective import CAPTION, Labels, batch_terms, weighted_sum
from scaleclip.models.dual_encoder import Features, Inputs


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
    terms: dict[str, Tensor]
    """The objective's terms by name, before their weights, fp32."""


class _Chunk(NamedTuple):
    """A chunk on the device."""

    inputs: Inputs
    labels: Labels


def inputs_of(batch: Batch) -> Inputs:
    """What of a batch the model encodes."""
    return Inputs(
        batch.pixels_BCHW, batch.tokens_BT, batch.seeds_B, batch.augmented_BCHW, batch.pairs_BT, batch.captions_BS,
        batch.caption_lengths_B,
    )  # fmt: skip


class TrainStep:
    """Optimizer steps of a run. Every rank calls, with as many chunks as the others.

    Args:
        engine: the model and its optimizer.
        config: the run's configuration.
        world: this rank.
        micro_batch: pairs of a chunk; the last one of a share may have fewer.
    """

    def __init__(self, engine: Engine, config: RunConfig, world: World, micro_batch: int) -> None:
        self._engine, self._loss, self._seed, self._world = engine, config.loss, config.run.seed, world
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
                features, terms = self._one_pass(next(chunks), step)
            else:
                features, terms = self._two_passes(chunks, step)
        terms = {name: term.detach() for name, term in terms.items()}
        loss = weighted_sum(terms, self._loss)
        outcome = self._engine.step(loss, lr)
        return StepResult(loss, outcome.grad_norm, features.logit_scale.detach(), outcome.bad, terms)

    def _one_pass(self, batch: Batch, step: int) -> tuple[Features, dict[str, Tensor]]:
        chunk = self._copies(batch)
        captions = _Captions(_present(chunk.inputs.caption_lengths_B), self._world)
        features = self._encode(chunk.inputs, step, self._first_pairs[0])
        terms = batch_terms(features, chunk.labels, self._loss)
        loss = weighted_sum(terms | captions.term(features), self._loss)
        self._engine.backward(loss, last=True)
        return features, terms | captions.total()

    def _two_passes(self, batches: Iterator[Batch], step: int) -> tuple[Features, dict[str, Tensor]]:
        held, cached, labels, lengths = list[Batch](), list[Features](), list[Labels](), list[Tensor]()
        with torch.no_grad():
            for first_pair in self._first_pairs:
                # one by one: the loader prepares the next while this one is encoded
                held.append(next(batches))
                chunk = self._copies(held[-1])
                cached.append(self._encode(_with_one_caption(chunk.inputs), step, first_pair))
                labels.append(chunk.labels)
                lengths += _present(chunk.inputs.caption_lengths_B)
        features = _leaves(cached)
        del cached
        terms = batch_terms(features, Labels.cat(labels), self._loss)
        torch.autograd.backward(weighted_sum(terms, self._loss))
        gradients = features.replaced(*([_gradient(part) for part in parts] for parts in (features.rows(), features.whole())))
        captions = _Captions(lengths, self._world)
        for number, (chunk, first_pair) in enumerate(zip(map(self._copies, held), self._first_pairs, strict=True)):
            last = number == len(held) - 1
            again = self._encode(chunk.inputs, step, first_pair)
            surrogate = _surrogate(again, gradients, number, self._first_pairs.step, last)
            surrogate = surrogate + weighted_sum(captions.term(again), self._loss)
            self._engine.backward(surrogate, last=last)
        return features, terms | captions.total()

    def _encode(self, inputs: Inputs, step: int, first_pair: int) -> Features:
        seed = int(hash64(self._seed, step, first_pair)[0])
        # torch.manual_seed would also visit every backend, and takes as long as a small chunk
        torch.default_generator.manual_seed(seed)
        if inputs.pixels_BCHW.is_cuda:
            torch.cuda.manual_seed(seed)
        return self._engine(inputs)


class _Captions:
    """The captions' term of a step: the mean over all tokens of the global batch, chunk by chunk."""

    def __init__(self, lengths: Sequence[Tensor], world: World) -> None:
        self._world = world
        self._sums = list[Tensor]()
        if lengths:
            self._num_tokens = torch.stack([each.sum() for each in lengths]).sum().float()
            _sum_over_ranks(self._num_tokens, world)
            self._num_tokens.clamp_(min=1)

    def term(self, features: Features) -> dict[str, Tensor]:
        """This rank's part from a chunk, with gradients whose mean over ranks is the true one; none without captions."""
        if features.caption_loss is None:
            return {}
        self._sums.append(features.caption_loss.detach())
        return {CAPTION: features.caption_loss * (self._world.size / self._num_tokens)}

    def total(self) -> dict[str, Tensor]:
        """The whole term, when every chunk has been asked for."""
        if not self._sums:
            return {}
        total = torch.stack(self._sums).sum()
        _sum_over_ranks(total, self._world)
        return {CAPTION: total / self._num_tokens}


def _present(tensor: Tensor | None) -> list[Tensor]:
    return [] if tensor is None else [tensor]


def _with_one_caption(inputs: Inputs) -> Inputs:
    """For a pass that has no use for captions: stage 3 wants to meet the same modules in every pass, in the order that it has
    learned, and else would fetch each parameter when it is asked for."""
    if inputs.captions_BS is None or inputs.caption_lengths_B is None:
        return inputs
    return inputs._replace(captions_BS=inputs.captions_BS[:1], caption_lengths_B=inputs.caption_lengths_B[:1])


def _sum_over_ranks(value: Tensor, world: World) -> None:
    if world.size > 1:
        dist.all_reduce(value)


def _leaves(chunks: Sequence[Features]) -> Features:
    """All chunks' features as one, cut off from the towers, and waiting for gradients."""
    rows = [torch.cat(parts).requires_grad_() for parts in zip(*(chunk.rows() for chunk in chunks), strict=True)]
    return chunks[0].replaced(rows, [each.requires_grad_() for each in chunks[-1].whole()])


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None, "the loss depends on all of its features"
    return tensor.grad


def _surrogate(features: Features, gradients: Features, number: int, micro_batch: int, last: bool) -> Tensor:
    """A scalar whose gradient through chunk `number` is the loss's: features times their gradients.

    The scale, the bias and the projector belong to the whole batch: they count in the last chunk, and with 0 in the others,
    so that every parameter takes part in every backward pass, as ZeRO expects.
    """
    here = slice(number * micro_batch, (number + 1) * micro_batch)
    pairs = [(row, gradient[here]) for row, gradient in zip(features.rows(), gradients.rows(), strict=True)]
    pairs += [
        (value, gradient if last else torch.zeros_like(gradient))
        for value, gradient in zip(features.whole(), gradients.whole(), strict=True)
    ]
    return torch.stack([(feature * gradient).sum() for feature, gradient in pairs]).sum()


class _Copies:
    """Copies chunks to the device beside the work that is queued there: the host runs ahead of it between log steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, batch: Batch) -> _Chunk:
        """The chunk's tensors on the device, ready for its current stream."""
        with torch.cuda.stream(self._stream):  # None: no other stream
            labels = Labels(batch.ids_B, batch.valid_B, batch.pairs_valid_B)
            chunk: _Chunk = tree_map_only(Tensor, self._copy, _Chunk(inputs_of(batch), labels))
        if self._stream is not None:
            user = torch.cuda.current_stream(self._device)
            user.wait_stream(self._stream)
            tree_map_only(Tensor, lambda copy: copy.record_stream(user), chunk)
        return chunk

    def _copy(self, part: Tensor) -> Tensor:
        return part.to(self._device, non_blocking=True)
