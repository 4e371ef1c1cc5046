"""NT-Xent, SimCLR's loss between two views of each image (arXiv:2002.05709), without a matrix of all views against all.

Dimensions: B samples of this rank, E the projector's output.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from scaleclip.config import LossConfig
from scaleclip.losses.options import kernel_options
from scaleclip_kernels import softmax_contrastive_loss


def simclr(projected: tuple[Tensor, Tensor], valid_B: Tensor, config: LossConfig, group: ProcessGroup | None) -> Tensor:
    """Mean over both views of the valid samples of the global batch, of a view's cross-entropy: its sample's other view among
    all views but itself, by cosine / `loss.simclr_temperature`. fp32 (), the same on every rank.

    All ranks of the group call. The mean over ranks of parameters' gradients is the true gradient; a batch with no valid sample
    has loss 0 and zero gradients.

    Args:
        projected: the two views, [B, E] each, of any length.
        valid_B: bool; an invalid sample may hold anything, NaN included, and gets a gradient of zero.
        config: the temperature, and how the loss is computed.
        group: ranks that hold B samples each; None: this process has the whole batch.

    Raises:
        ValueError: the backend cannot run, or another rank has another B.
        RankError: another rank of the group failed.
    """
    invalid_B1 = ~valid_B.unsqueeze(1)
    # before the length is taken, through which NaN would reach the gradient
    first_BE, second_BE = (F.normalize(view_BE.float().masked_fill(invalid_B1, 0), dim=1) for view_BE in projected)
    # equal ids without being a pair: a view and itself, which is left out
    rank = 0 if group is None else dist.get_rank(group)
    slot_B = torch.arange(rank * len(valid_B), (rank + 1) * len(valid_B), device=valid_B.device)
    return softmax_contrastive_loss(
        torch.cat([first_BE, second_BE]),
        torch.cat([second_BE, first_BE]),
        # not torch.tensor, which would wait for a GPU
        torch.full((), 1 / config.simclr_temperature, device=valid_B.device),
        valid=valid_B.repeat(2),
        ids=slot_B.repeat(2),
        duplicates="ignore",
        # the columns are the rows again, so their losses are the rows' losses
        weights=(1.0, 0.0),
        **kernel_options(config, group),
    )
