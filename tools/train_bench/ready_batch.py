"""A batch in memory, as each trainer takes it: the same pixels and the same tokens.

Dimensions: B pairs, C channels, H W pixels, T tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from scaleclip.config import ModelConfig
from scaleclip.data.loader import Batch

_SHORTEST, _LONGEST = 7, 27


class ReadyBatch(NamedTuple):
    """Noise and random words."""

    pixels_BCHW: Tensor
    """uint8"""
    tokens_BT: Tensor
    """int64"""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def scaleclip(self) -> Batch:
        """Pixels as they are: the model normalises them."""
        num_pairs = len(self.pixels_BCHW)
        number_B = torch.arange(num_pairs)
        valid_B = torch.ones(num_pairs, dtype=torch.bool)
        keys = tuple(str(number) for number in range(num_pairs))
        return Batch(self.pixels_BCHW, (self.tokens_BT,), number_B, valid_B, number_B, keys, (), {}, {}, {}, 0.0)

    def open_clip(self) -> tuple[Tensor, Tensor]:
        """Pixels normalised, fp32, as its loader's transform leaves them."""
        mean_C11, std_C11 = (torch.tensor(values).reshape(3, 1, 1) for values in (self.mean, self.std))
        return ((self.pixels_BCHW.float() / 255 - mean_C11) / std_C11).contiguous(), self.tokens_BT


def ready_batch(model: ModelConfig, num_pairs: int) -> ReadyBatch:
    """The same one every time."""
    random = torch.Generator().manual_seed(0)
    size, length, ids = model.image.size, model.text.context_length, model.text.config
    # channels last in memory, as a loader's batch has them
    pixels_BHWC = torch.randint(0, 256, (num_pairs, size, size, 3), generator=random, dtype=torch.uint8)
    words = int(ids["bos_token_id"])
    tokens_BT = torch.randint(1, words, (num_pairs, length), generator=random)
    end_B = torch.randint(min(_SHORTEST, length - 1), min(_LONGEST, length), (num_pairs, 1), generator=random)
    place_T = torch.arange(length)
    tokens_BT[:, 0] = words
    tokens_BT = tokens_BT.where(place_T < end_B, int(ids["pad_token_id"]))
    tokens_BT = tokens_BT.where(place_T != end_B, int(ids["eos_token_id"]))
    return ReadyBatch(pixels_BHWC.permute(0, 3, 1, 2), tokens_BT, model.image.mean, model.image.std)
