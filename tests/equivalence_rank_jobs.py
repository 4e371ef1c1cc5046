"""What tests/test_equivalence.py runs on a rank of its own."""

import time

import torch
import torch.distributed as dist
from torch import Tensor

from scaleclip.config import RunConfig
from scaleclip.equivalence.batches import global_batch, share_chunks
from scaleclip.losses.objective import contrastive
from scaleclip.models.dual_encoder import DualEncoder, Features


def exactly_accumulated(config: RunConfig, world_size: int, micro_batch: int) -> dict[str, Tensor]:
    """Gradients of the first step under bf16 autocast, each chunk's added up in fp64."""
    torch.manual_seed(config.run.seed)
    model = DualEncoder(config.model)
    batch = global_batch(config, model, 0)
    chunks = [chunk for rank in range(world_size) for chunk in share_chunks(batch, rank, world_size, micro_batch)]

    def encode(chunk):
        with torch.autocast("cpu", torch.bfloat16):
            return model(chunk.pixels_BCHW, chunk.tokens_BT, chunk.seeds_B)

    with torch.no_grad():
        encoded = [encode(chunk) for chunk in chunks]
    image = torch.cat([features.image_BE for features in encoded]).requires_grad_()
    text = torch.cat([features.texts_BE[0] for features in encoded]).requires_grad_()
    scale = encoded[0].logit_scale.requires_grad_()
    ids, valid = (torch.cat([getattr(chunk, name) for chunk in chunks]) for name in ("ids_B", "valid_B"))
    contrastive(Features(image, (text,), scale, None), ids, valid, config.loss, None).backward()
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in parameters.items()}
    cuts = (image.grad.split(micro_batch), text.grad.split(micro_batch))
    for chunk, image_grad, text_grad in zip(chunks, *cuts, strict=True):
        features = encode(chunk)
        loss = (features.image_BE * image_grad).sum() + (features.texts_BE[0] * text_grad).sum()
        loss = loss + features.logit_scale * scale.grad / len(chunks)
        for name, gradient in zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True):
            total[name] += gradient
    return total


def fail_on_rank_one() -> int:
    if dist.get_rank() == 1:
        raise ValueError("broken")
    return 0


def wait() -> None:
    time.sleep(600)
