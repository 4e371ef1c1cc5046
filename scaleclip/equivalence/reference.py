"""What a run's first steps should be: one process, fp32, the whole global batch, in plain PyTorch without DeepSpeed.

Nothing is encoded twice, no features are cached, and the loss stores the matrix of similarities. Shared with what is checked
against it: the model, which parameters decay and learn how fast, and the random numbers of a chunk.

Dimensions: B slots, E the shared embedding space.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from scaleclip.config import RunConfig
from scaleclip.data.loader import Batch
from scaleclip.data.order import hash64
from scaleclip.equivalence.batches import global_batch, share_chunks
from scaleclip.equivalence.record import Record
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.optim import LOGIT_SCALE, parameter_groups
from scaleclip_kernels import sigmoid_contrastive_loss, softmax_contrastive_loss


def draws_random_numbers(config: RunConfig) -> bool:
    """Whether a forward pass in training takes numbers of PyTorch's generator (dropout), so that chunks matter."""
    model = DualEncoder(config.model)
    batch = global_batch(config, model, 0)
    before = torch.get_rng_state()
    with torch.no_grad():
        model(batch.pixels_BCHW, batch.tokens_BT, batch.seeds_B)
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
        encoded.append(model(chunk.pixels_BCHW, chunk.tokens_BT, chunk.seeds_B))
        first_slot += len(chunk.valid_B)
    texts = [torch.cat(view) for view in zip(*(features.texts_BE for features in encoded), strict=True)]
    loss: Callable[..., Tensor] = softmax_contrastive_loss
    if config.loss.kind == "sigmoid":
        loss = partial(sigmoid_contrastive_loss, logit_bias=encoded[-1].logit_bias)
    return loss(
        torch.cat([features.image_BE for features in encoded]),
        torch.cat(texts),
        encoded[-1].logit_scale,
        valid=torch.cat([chunk.valid_B for chunk in chunks]),
        ids=torch.cat([chunk.ids_B for chunk in chunks]),
        duplicates=config.loss.duplicates,
        views=len(texts),
        backend="reference",
    )
