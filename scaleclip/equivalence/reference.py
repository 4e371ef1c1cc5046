"""What a run's first steps should be: one process, fp32, the whole global batch, in plain PyTorch without DeepSpeed.

Nothing is encoded twice, no features are cached, and the losses store matrices of similarities. Shared with what is checked
against it: the model, which parameters decay and learn how fast, and the random numbers of a chunk.

Dimensions: B slots, E the shared embedding space.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scaleclip.config import RunConfig
from scaleclip.data.loader import Batch
from scaleclip.data.order import hash64
from scaleclip.equivalence.batches import global_batch, share_chunks
from scaleclip.equivalence.plain_terms import plain_terms
from scaleclip.equivalence.record import Record
from scaleclip.losses.objective import Labels
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.optim import LOGIT_SCALE, parameter_groups
from scaleclip.step import inputs_of


def draws_random_numbers(config: RunConfig) -> bool:
    """Whether a forward pass in training takes numbers of PyTorch's generator (dropout), so that chunks matter."""
    model = DualEncoder(config.model)
    batch = global_batch(config, model, 0)
    before = torch.get_rng_state()
    with torch.no_grad():
        model(*inputs_of(batch))
    return not torch.equal(before, torch.get_rng_state())


def reference_steps(config: RunConfig, num_steps: int, world_size: int, micro_batch: int) -> Record:
    """Steps with the chunks, in which random numbers are drawn, of `world_size` ranks; (1, global batch) is one pass."""
    torch.manual_seed(config.run.seed)
    model = DualEncoder(config.model.model_copy(update={"activation_checkpointing": False}))
    adamw = torch.optim.AdamW(parameter_groups(model, config.optim), betas=config.optim.betas, eps=config.optim.eps)
    for group in adamw.param_groups:
        group["lr"] = config.optim.lr * group["lr_scale"]
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    losses, gradients = list[float](), list[dict[str, Tensor]]()
    for step in range(num_steps):
        batch = global_batch(config, model, step)
        chunks = [chunk for rank in range(world_size) for chunk in share_chunks(batch, rank, world_size, micro_batch)]
        loss = _loss(model, config, chunks, step)
        adamw.zero_grad()
        torch.autograd.backward(loss)
        losses.append(loss.item())
        gradients.append({name: parameter.grad.clone() for name, parameter in learning.items() if parameter.grad is not None})
        if config.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(learning.values(), config.optim.clip_norm)
        adamw.step()
        with torch.no_grad():
            dict(model.named_parameters())[LOGIT_SCALE].clamp_(0, model.log_max_logit_scale)
    return Record(losses, gradients, {name: parameter.detach() for name, parameter in model.named_parameters()}, [])


def _loss(model: DualEncoder, config: RunConfig, chunks: Sequence[Batch], step: int) -> Tensor:
    encoded, first_slot = [], 0
    for chunk in chunks:
        torch.manual_seed(int(hash64(config.run.seed, step, first_slot)[0]))
        encoded.append(model(*inputs_of(chunk)))
        first_slot += len(chunk.valid_B)
    # batch norm and its ReLUs make much of rounding: the truth has none of it
    rows = [torch.cat(parts).double() for parts in zip(*(features.rows() for features in encoded), strict=True)]
    labels = Labels.cat([Labels(chunk.ids_B, chunk.valid_B, chunk.pairs_valid_B) for chunk in chunks])
    whole = [value.double() for value in encoded[-1].whole()]
    loss = plain_terms(encoded[-1].replaced(rows, whole), labels, config.loss)
    if config.model.caption_decoder:
        num_tokens = sum(int(chunk.caption_lengths_B.sum()) for chunk in chunks if chunk.caption_lengths_B is not None)
        sums = [features.caption_loss for features in encoded if features.caption_loss is not None]
        loss = loss + config.loss.caption_weight * torch.stack(sums).sum() / num_tokens
    return loss
