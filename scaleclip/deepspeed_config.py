"""RunConfig -> DeepSpeed's configuration. Pure: DeepSpeed itself is scaleclip.engine's."""

import sys
from collections.abc import Mapping
from typing import Any

import torch

from scaleclip.config import RunConfig
from scaleclip.errors import ConfigError

_AUTOCAST = {"fp32": "bfloat16", "bf16": "bfloat16", "fp16": "float16"}  # with fp32 it is not used, but must be something
_BUCKET_ELEMENTS = 2**25
# what `train.deepspeed` may not set, and the key that does
_DERIVED = {
    "gradient_clipping": "optim.clip_norm",
    "gradient_accumulation_steps": "train.micro_batch",
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "optimizer": "optim",
    "scheduler": "optim",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "zero_optimization.stage": "train.zero_stage",
    "zero_optimization.offload_optimizer": "train.offload_optimizer",
    "zero_optimization.offload_param": "train.offload_parameters",
}


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run, with `train.deepspeed` laid over what the other keys decide.

    Raises:
        ConfigError: `train.deepspeed` sets what another key decides.
    """
    train = config.train
    # two buckets of this many elements each are held: DeepSpeed's 500 million would be 4 GB
    zero: dict[str, Any] = {"stage": train.zero_stage, "reduce_bucket_size": _BUCKET_ELEMENTS}
    if train.zero_stage in (1, 2):
        # overlap_comm would make the host wait for the device after every backward pass
        zero["overlap_comm"] = False
        # DeepSpeed insists on its own norm where the optimizer lies in the host's memory: see _leave_out_host_reads
        zero["compute_grad_norm"] = train.offload_optimizer
    if train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if train.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.share(world_size),
        "gradient_accumulation_steps": 1,
        # DeepSpeed reads the norm of the gradients on the host at every step; Engine.step leaves it on the device
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # the optimizer is torch's fused AdamW wherever its state lies
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "torch_autocast": {
            "enabled": train.precision != "fp32",
            "dtype": _AUTOCAST[train.precision],
            # modules whose gradients would travel in half precision: none, they are fp32 everywhere
            "lower_precision_safe_modules": [],
        },
    }
    return _lay_over(derived, train.deepspeed, "")


def _lay_over(base: dict[str, Any], top: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    for key, value in top.items():
        if prefix + key in _DERIVED:
            raise ConfigError(f"train.deepspeed.{prefix}{key}={value!r} is decided by {_DERIVED[prefix + key]}: set that")
        below = base.get(key)
        base[key] = (
            _lay_over(below, value, f"{prefix}{key}.") if isinstance(below, dict) and isinstance(value, Mapping) else value
        )
    return base
