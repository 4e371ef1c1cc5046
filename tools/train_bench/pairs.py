"""Synthetic labelled pairs: a class is four digits, drawn as four patterns under noise and written as four tokens.

A pair is a pure function of its step and its number in the global batch, so every layout of ranks and chunks sees the same
batches, and a chunk is made when it is asked for.

Dimensions: B pairs, C channels, H W pixels, T tokens, P digits, G side of a pattern.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scaleclip.config import ModelConfig
from scaleclip.data.loader import Batch
from scaleclip.data.order import hash64

BASE, DIGITS = 8, 4
NUM_CLASSES = BASE**DIGITS
_GRID = 2  # digits stand in two rows of two
_PATTERN = 8
_CLASS, _NOISE, _PATCHES = 0, 1, 2
_NOISE_SHARE = 0.3


class Pairs:
    """Chunks of global batches for some towers.

    Args:
        model: with CLIP's text tower; the image's side is a multiple of 16, the vocabulary holds 32 tokens beside its own.
    """

    def __init__(self, model: ModelConfig) -> None:
        self._size, self._text = model.image.size, model.text
        random = np.random.default_rng(0)
        self._patterns = random.integers(0, 256, (DIGITS, BASE, 3, _PATTERN, _PATTERN)).astype(np.float32)

    def batch(self, step: int, pairs: range) -> Iterator[Batch]:
        """The chunks of `pairs.step` pairs that make up `pairs` of step `step`."""
        for first in pairs:
            yield self.chunk(step, range(first, min(first + pairs.step, pairs.stop)))

    def chunk(self, step: int, pairs: range) -> Batch:
        """Some pairs of a step's global batch; `ids_B` are the classes."""
        number_B = np.arange(pairs.start, pairs.stop)
        class_B = (hash64(_CLASS, step, number_B) % np.uint64(NUM_CLASSES)).astype(np.int64)
        digit_BP = class_B[:, None] // BASE ** np.arange(DIGITS) % BASE
        return Batch(
            pixels_BCHW=self._draw(digit_BP, step, number_B),
            tokens_BT=(self._write(digit_BP),),
            ids_B=torch.from_numpy(class_B),
            valid_B=torch.ones(len(pairs), dtype=torch.bool),
            seeds_B=torch.from_numpy(hash64(_PATCHES, step, number_B).astype(np.int64)),
            keys=("",) * len(pairs),
            faults=(),
            counts={},
            cache={},
            stage_s={},
            ready_s=0.0,
        )

    def _draw(self, digit_BP: NDArray[np.int64], step: int, number_B: NDArray[np.int64]) -> Tensor:
        num_pairs, side = len(digit_BP), self._size // _GRID
        drawn_BPCGG = self._patterns[np.arange(DIGITS), digit_BP]
        rows_BRSCGG = drawn_BPCGG.reshape(num_pairs, _GRID, _GRID, 3, _PATTERN, _PATTERN)
        small_BCHW = rows_BRSCGG.transpose(0, 3, 1, 4, 2, 5).reshape(num_pairs, 3, _GRID * _PATTERN, _GRID * _PATTERN)
        scale = side // _PATTERN
        clean_BCHW = small_BCHW.repeat(scale, axis=2).repeat(scale, axis=3)
        words = np.arange(3 * self._size**2 // 8)
        noise_BCHW = hash64(_NOISE, step, number_B[:, None], words).view(np.uint8).reshape(clean_BCHW.shape)
        mixed_BCHW = (1 - _NOISE_SHARE) * clean_BCHW + _NOISE_SHARE * noise_BCHW
        return torch.from_numpy(mixed_BCHW.astype(np.uint8))

    def _write(self, digit_BP: NDArray[np.int64]) -> Tensor:
        ids = self._text.config
        token_BT = torch.full((len(digit_BP), self._text.context_length), int(ids["pad_token_id"]))
        token_BT[:, 0] = ids["bos_token_id"]
        token_BT[:, 1 : 1 + DIGITS] = torch.from_numpy(1 + digit_BP + BASE * np.arange(DIGITS))
        token_BT[:, 1 + DIGITS] = ids["eos_token_id"]
        return token_BT
