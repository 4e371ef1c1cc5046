"""Patch dropout of FLIP (arXiv:2212.00794): in training the image tower sees a random part of an image's patches.

Which part is a hash of the sample's seed, so that it depends neither on the rank nor on the rest of the batch.
Dimensions: B samples, N patches, K patches kept, P tokens in front of the patches, D the tower's width.
"""

import torch
from torch import Tensor


def drop_patches(tokens_BND: Tensor, seeds_B: Tensor, share: float, num_prefix: int) -> Tensor:
    """Keep the first `num_prefix` tokens and round(N * (1 - share)) patches, at least one, of every sample.

    Args:
        tokens_BND: [B, P + N, D], class tokens first.
        seeds_B: int64, one a sample.
    """
    prefix_BPD, patches_BND = tokens_BND[:, :num_prefix], tokens_BND[:, num_prefix:]
    num_patches, width = patches_BND.shape[1:]
    num_kept = max(1, round(num_patches * (1 - share)))
    keys_BN = _hash(_hash(seeds_B)[:, None] + torch.arange(num_patches, device=seeds_B.device))
    kept_BK = keys_BN.argsort(dim=1)[:, :num_kept]
    kept_BKD = patches_BND.gather(1, kept_BK[:, :, None].expand(-1, -1, width))
    return torch.cat([prefix_BPD, kept_BKD], dim=1)


def _hash(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection on int64, so that patches of a sample never tie."""
    x = (x ^ _shift_right(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as int64; products wrap
    x = (x ^ _shift_right(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int64's own repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
