"""Bytes that a rank sends, counted at torch's collective operators.

Counted where torch.distributed hands its work to the backend (the operators of c10d), so whatever a loss calls is seen. How a
collective is counted, for W ranks (what the usual bandwidth-optimal algorithms send):

| send | what is sent |
| all-gather | (W - 1) times the rank's part |
| reduce-scatter, all-to-all | (W - 1) / W of the rank's input |
| all-reduce | 2 (W - 1) / W of the tensor |
| scatter | the root: every part but its own |
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class CountSent(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that this rank of `num_ranks` sends inside."""

    def __init__(self, num_ranks: int, rank: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_ranks, self.rank, self.sent_bytes = num_ranks, rank, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            operator = func._schema.name.partition("::")[2]
            if func.namespace != "c10d" or operator not in _RULES:
                raise RuntimeError(f"no rule says how many bytes {func._schema.name} sends: add one to {__name__}._RULES")
            self.sent_bytes += _RULES[operator](self.num_ranks, self.rank, *args)
        return func(*args, **(kwargs or {}))


def _bytes(tensors: Tensor | Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in ([tensors] if isinstance(tensors, Tensor) else tensors))


def _all_gather(num_ranks: int, rank: int, outputs: Any, inputs: Any, *rest: Any) -> float:
    return (num_ranks - 1) * _bytes(inputs)


def _reduce_scatter(num_ranks: int, rank: int, outputs: Any, inputs: Any, *rest: Any) -> float:
    parts = inputs if isinstance(inputs, Tensor) else [part for parts in inputs for part in parts]
    return _bytes(parts) * (num_ranks - 1) / num_ranks


def _all_to_all(num_ranks: int, rank: int, outputs: Any, inputs: Any, *rest: Any) -> float:
    return _bytes([part for receiver, part in enumerate(inputs) if receiver != rank])


def _all_to_all_single(
    num_ranks: int, rank: int, output: Any, tensor: Any, group: Any, out: Any, split: Any, *rest: Any
) -> float:
    own = split[rank] / max(sum(split), 1) if split else 1 / num_ranks
    return _bytes(tensor) * (1 - own)


def _all_reduce(num_ranks: int, rank: int, tensors: Any, *rest: Any) -> float:
    return 2 * (num_ranks - 1) / num_ranks * _bytes(tensors)


def _scatter(num_ranks: int, rank: int, outputs: Any, inputs: Any, *rest: Any) -> float:
    return _bytes([part for parts in inputs for receiver, part in enumerate(parts) if receiver != rank])


def _send(num_ranks: int, rank: int, tensors: Any, *rest: Any) -> float:
    return _bytes(tensors)


def _nothing(*arguments: Any) -> float:
    return 0.0


_RULES: dict[str, Callable[..., float]] = {
    "send": _send,
    "recv_": _nothing,
    "recv_any_source_": _nothing,
    "barrier": _nothing,
    "monitored_barrier_": _nothing,
    "allgather_": _all_gather,
    "_allgather_base_": _all_gather,
    "allgather_coalesced_": _all_gather,
    "allgather_into_tensor_coalesced_": _all_gather,
    "reduce_scatter_": _reduce_scatter,
    "_reduce_scatter_base_": _reduce_scatter,
    "alltoall_": _all_to_all,
    "alltoall_base_": _all_to_all_single,
    "allreduce_": _all_reduce,
    "allreduce_coalesced_": _all_reduce,
    "scatter_": _scatter,
}
