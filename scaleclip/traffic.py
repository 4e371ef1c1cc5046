"""Bytes that a rank hands to DeepSpeed's collectives: gradients on their way to all ranks, parameters on their way back."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor

# collectives of DeepSpeed's communication backend, with the place and the name of the argument that a rank puts in
REDUCING = {
    "all_reduce": (0, "tensor"),
    "all_reduce_coalesced": (0, "tensors"),
    "reduce": (0, "tensor"),
    "reduce_scatter": (1, "input_list"),
    "reduce_scatter_tensor": (1, "input_tensor"),
}
GATHERING = {
    "all_gather": (1, "tensor"),
    "all_gather_into_tensor": (1, "input_tensor"),
    "all_gather_coalesced": (1, "input_tensors"),
    "broadcast": (0, "tensor"),
}


class Traffic:
    """Counts calls and bytes of a DeepSpeed communication backend's collectives by wrapping its methods."""

    def __init__(self, backend: Any) -> None:
        self._counts: Counter[str] = Counter()
        for kind, methods in (("reduced", REDUCING), ("gathered", GATHERING)):
            for name, (position, argument) in methods.items():
                setattr(backend, name, self._counting(getattr(backend, name), kind, position, argument))

    def take(self) -> Counter[str]:
        """`reduced_bytes`, `gathered_bytes` and the calls of each since this was asked."""
        counts, self._counts = self._counts, Counter()
        return counts

    def _counting(self, collective: Callable[..., Any], kind: str, position: int, argument: str) -> Callable[..., Any]:
        @functools.wraps(collective)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._counts[f"{kind}_calls"] += 1
            self._counts[f"{kind}_bytes"] += _size(args[position] if position < len(args) else kwargs[argument])
            return collective(*args, **kwargs)

        return counted


def _size(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_size(tensor) for tensor in tensors)
