"""A step's objective, from features to one scalar: the mean over the global batch, the same on every rank."""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from scaleclip.config import LossConfig
from scaleclip.errors import ConfigError
from scaleclip.models.dual_encoder import Features
from scaleclip_kernels import sigmoid_contrastive_loss, softmax_contrastive_loss

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def contrastive(features: Features, ids_B: Tensor, valid_B: Tensor, config: LossConfig) -> Tensor:
    """Mean over text views of the configured contrastive loss, each view with its own denominators. fp32 ().

    Gradients are such that the mean over ranks is the true one. All ranks call.
    """
    loss: Callable[..., Tensor] = softmax_contrastive_loss
    if config.kind == "sigmoid":
        loss = partial(sigmoid_contrastive_loss, logit_bias=features.logit_bias)
    return loss(
        features.image_BE,
        torch.cat(features.texts_BE),
        features.logit_scale,
        valid=valid_B,
        ids=ids_B,
        duplicates=config.duplicates,
        views=len(features.texts_BE),
        compute_dtype=_DTYPES[config.compute_dtype],
        fp32_precision=config.fp32_precision,
        group=dist.group.WORLD if dist.get_world_size() > 1 else None,
        schedule=config.schedule,
        backend=config.backend,
    )


def check_runs_on(device: torch.device, config: LossConfig) -> None:
    """Evaluate the loss of one pair.

    Raises:
        ConfigError: it cannot run there as it is configured.
    """
    one, scale = torch.ones(1, 8, device=device), torch.ones((), device=device)
    try:
        softmax_contrastive_loss(
            one,
            one,
            scale,
            compute_dtype=_DTYPES[config.compute_dtype],
            fp32_precision=config.fp32_precision,
            backend=config.backend,
        )
    except ValueError as error:
        raise ConfigError(f"loss.backend={config.backend}, loss.fp32_precision={config.fp32_precision}: {error}") from error
