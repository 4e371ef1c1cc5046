"""Arithmetic of a model, counted and not estimated."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scaleclip.config import ModelConfig
from scaleclip.models.dual_encoder import DualEncoder


@torch.no_grad()
def forward_flops(model: DualEncoder, config: ModelConfig, num_tokens: int, num_views: int = 1) -> int:
    """Floating-point operations of a training forward pass of one image and its texts; a multiply-add counts 2.

    `num_views` texts of `num_tokens` tokens each. Counts matrix products, convolutions and attention in one real pass, patch
    dropout included.
    """
    device = model.logit_scale.device
    pixels_BCHW = torch.zeros(1, 3, config.image.size, config.image.size, dtype=torch.uint8, device=device)
    tokens_BT = torch.zeros(1, num_tokens, dtype=torch.int64, device=device)
    seeds_B = torch.zeros(1, dtype=torch.int64, device=device)
    # the counter does not know the CPU's fused attention; the plain one is made of matrix products
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(pixels_BCHW, (tokens_BT,) * num_views, seeds_B)
    return int(counter.get_total_flops())
