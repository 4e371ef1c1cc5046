"""What `loss` of a configuration says about how a contrastive loss is computed, as the kernels take it."""

from typing import TypedDict

import torch
from torch.distributed import ProcessGroup

from scaleclip.config import LossConfig
from scaleclip_kernels.arguments import Backend
from scaleclip_kernels.blocks import Fp32Precision
from scaleclip_kernels.distributed import ScheduleName

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class KernelOptions(TypedDict):
    """Keyword arguments of `softmax_contrastive_loss` and `sigmoid_contrastive_loss`, which explain them."""

    compute_dtype: torch.dtype
    fp32_precision: Fp32Precision
    group: ProcessGroup | None
    schedule: ScheduleName
    backend: Backend


def kernel_options(config: LossConfig, group: ProcessGroup | None) -> KernelOptions:
    """How `config` wants a loss over the ranks of `group` computed; None: this process has the whole batch."""
    return KernelOptions(
        compute_dtype=_DTYPES[config.compute_dtype],
        fp32_precision=config.fp32_precision,
        group=group,
        schedule=config.schedule,
        backend=config.backend,
    )
