"""How much memory a computation holds at once, counted at PyTorch's dispatcher."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of every storage that an operator makes, from its birth to its death."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes: dict[int, int] = {}
        self.peak_bytes = self.largest_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is None or storage._cdata in before or storage._cdata in self.live_bytes:
                continue
            self.live_bytes[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.live_bytes.pop, storage._cdata)
            self.largest_bytes = max(self.largest_bytes, storage.nbytes())
            self.peak_bytes = max(self.peak_bytes, sum(self.live_bytes.values()))
        return out
