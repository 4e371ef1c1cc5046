"""A digest of tensors by name, which tells one set of weights from another."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def tensor_digest(named: Iterable[tuple[str, Tensor]], about: str = "") -> str:
    """16 hexadecimal digits of names, dtypes, shapes and values, in their order, and of a text about them.

    Args:
        named: tensors of any dtype, on any device.
        about: what else is of account.
    """
    digest = hashlib.sha256(about.encode())
    for name, value in named:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
