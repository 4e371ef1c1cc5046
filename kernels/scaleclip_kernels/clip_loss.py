"""nn.Modules with the constructors and forwards of open_clip 3.3's losses: change the import, keep the trainer.

What differs: every rank returns the mean over the GLOBAL batch, and every combination of options gives the exact gradient
of it after the trainer's mean over ranks. open_clip's local losses return the mean over the rank's own pairs; without
gather_with_grad its gradients are 1/W of the true ones, or (with local_loss) lack the terms of other ranks.
"""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scaleclip_kernels.distributed import ScheduleName
from scaleclip_kernels.sigmoid import sigmoid_contrastive_loss
from scaleclip_kernels.softmax import softmax_contrastive_loss


class ClipLoss(nn.Module):
    """CLIP's symmetric softmax loss over the default process group. Drop-in for `open_clip.loss.ClipLoss`.

    Raises:
        ValueError: Horovod is asked for, or `world_size` is not that of the default process group.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        """`local_loss`, `gather_with_grad` and `cache_labels` change nothing: there is one loss, and no labels to cache."""
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod=True is not supported: start ranks with torchrun or srun and torch.distributed")
        self.world_size = world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Features (N, D) of this rank. A bias shifts all logits alike: the loss does not depend on it."""
        image_features, text_features = _same_dtype(image_features, text_features)
        loss = softmax_contrastive_loss(image_features, text_features, logit_scale.float(), group=_group(self.world_size))
        if logit_bias is not None:
            loss = loss + 0 * logit_bias.sum()  # a gradient of 0, so that DistributedDataParallel finds the parameter used
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """SigLIP's sigmoid loss over the default process group. Drop-in for `open_clip.loss.SigLipLoss`.

    Raises:
        ValueError: `dist_impl` is unknown, or `world_size` is not that of the default process group.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: Literal["bidir", "shift", "reduce", "gather"] | None = None,
    ) -> None:
        """`dist_impl` chooses the schedule: ring for "bidir" and "shift", gather for "reduce" and "gather"."""
        super().__init__()
        schedules: dict[str | None, ScheduleName] = {
            None: "auto",
            "bidir": "ring",
            "shift": "ring",
            "reduce": "gather",
            "gather": "gather",
        }
        if dist_impl not in schedules:
            raise ValueError(f"dist_impl={dist_impl!r} is not one of bidir, shift, reduce, gather")
        self.world_size, self.schedule = world_size, schedules[dist_impl]

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Features (N, D) of this rank."""
        image_features, text_features = _same_dtype(image_features, text_features)
        loss = sigmoid_contrastive_loss(
            image_features,
            text_features,
            logit_scale.float(),
            None if logit_bias is None else logit_bias.float(),
            group=_group(self.world_size),
            schedule=self.schedule,
        )
        return {"contrastive_loss": loss} if output_dict else loss


def _same_dtype(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their dtypes: under autocast one tower may end in a layer that keeps fp32."""
    dtype = torch.promote_types(image.dtype, text.dtype)
    return image.to(dtype), text.to(dtype)


def _group(world_size: int) -> dist.ProcessGroup | None:
    if world_size == 1:
        return None
    actual = dist.get_world_size() if dist.is_initialized() else 0
    if actual != world_size:
        raise ValueError(
            f"world_size={world_size}, but the default process group has {actual} ranks (0: there is none): "
            "call torch.distributed.init_process_group first and pass its size"
        )
    return dist.group.WORLD
