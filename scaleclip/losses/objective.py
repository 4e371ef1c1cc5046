"""A step's objective, from features to one scalar: the mean over the global batch, the same on every rank."""

import torch.distributed as dist
from torch import Tensor

from scaleclip.config import LossConfig
from scaleclip.models.dual_encoder import Features
from scaleclip_kernels import softmax_contrastive_loss


def contrastive(features: Features, ids_B: Tensor, valid_B: Tensor, config: LossConfig) -> Tensor:
    """Mean over text views of CLIP's symmetric InfoNCE, each view with its own denominators. fp32 ().

    Gradients are such that the mean over ranks is the true one. All ranks call.
    """
    terms = [
        softmax_contrastive_loss(
            features.image_BE,
            text_BE,
            features.logit_scale,
            valid=valid_B,
            ids=ids_B,
            duplicates=config.duplicates,
            group=dist.group.WORLD if dist.get_world_size() > 1 else None,
            backend=config.backend,
        )
        for text_BE in features.texts_BE
    ]
    return sum(terms[1:], start=terms[0]) / len(terms)
