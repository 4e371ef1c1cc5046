"""Arithmetic of a model, counted and not estimated."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from scaleclip.config import ModelConfig
from scaleclip.models.dual_encoder import DualEncoder


def forward_flops(config: ModelConfig) -> int:
    """Floating-point operations of a training forward pass of one image and one text; a multiply-add counts 2.

    Counts matrix products, convolutions and attention on meta tensors (no memory, no arithmetic), patch dropout included.
    """
    with torch.device("meta"):
        model = DualEncoder(config.model_copy(update={"activation_checkpointing": False}))
        pixels_BCHW = torch.zeros(1, 3, config.image.size, config.image.size, dtype=torch.uint8)
        tokens_BT = torch.zeros(1, config.text.context_length, dtype=torch.int64)
        seeds_B = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _AnswerYes():  # type: ignore[no-untyped-call]
        model(pixels_BCHW, (tokens_BT,), seeds_B)
    return int(counter.get_total_flops())


class _AnswerYes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """BERT asks whether a text is free of padding, which a meta tensor cannot say."""

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True
        return func(*args, **(kwargs or {}))
