"""Keys and values of a prefix that the texts of a batch share, computed once, with room for what follows.

transformers' DynamicCache copies all keys and values for each token that is made; here they grow in place.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_ROOM = 32  # tokens beyond those that are there


def prefix_cache(model: Any, prefix: Sequence[int]) -> Any | None:
    """The cache of a prefix, for a batch of any size that follows it.

    Args:
        model: a causal language model of transformers.
        prefix: ids, one at least.

    Returns:
        A DynamicCache; None where the model keeps something else, or a window of its past, which would count padding.
    """
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    ids = torch.tensor([list(prefix)], device=model.device)
    cache: Any = getattr(model(input_ids=ids, use_cache=True, **last), "past_key_values", None)
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [_RoomyLayer(layer.keys, layer.values) for layer in cache.layers]
    return cache


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A layer's keys and values, [B, heads, length, width], at the start of longer buffers.

    Args:
        keys, values: of the prefix, with B = 1; the first ones that follow say what B is.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys)
        self.keys, self.values = keys, values
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, cache_kwargs: Any = None) -> tuple[Tensor, Tensor]:
        """Append what follows; gives all that is there."""
        start = self.keys.shape[-2]
        stop = start + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < stop:
            self._buffers = (_enlarged(self.keys, key_states), _enlarged(self.values, value_states))
        keys, values = self._buffers
        keys[..., start:stop, :] = key_states
        values[..., start:stop, :] = value_states
        self.keys, self.values = keys[..., :stop, :], values[..., :stop, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some texts of the batch."""
        super().batch_select_indices(indices)
        self._buffers = None


def _enlarged(held: Tensor, new: Tensor) -> Tensor:
    """A buffer for what is held, of every text in the batch of `new`, and what follows."""
    batch, heads, length, width = new.shape
    buffer = held.new_empty(batch, heads, held.shape[-2] + length + _ROOM, width)
    buffer[..., : held.shape[-2], :] = held
    return buffer
