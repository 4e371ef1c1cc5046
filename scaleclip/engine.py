"""RunConfig -> DeepSpeed engine. With checkpoint.py the only place that knows DeepSpeed.

Precision: the model stays fp32 and bf16 runs compute under autocast. DeepSpeed's own bf16 mode would round the
parameters that the model sees, the logarithm of the logit scale among them (a scale near 100 then moves in steps of 3 %),
and saves no memory once gradients accumulate in fp32. tests/test_engine.py holds the two against each other.
"""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scaleclip.config import OptimConfig, RunConfig
from scaleclip.distributed import World
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.optim import build_optimizer

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

deepspeed.logger.setLevel("WARNING")
# A C++ all-reduce for ranks that share a CPU: gloo does the same without compiling for minutes at the first start.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration that a run uses."""
    stage = config.train.zero_stage
    share = -(-config.train.global_batch // world_size)
    return {
        "train_micro_batch_size_per_gpu": share,
        "gradient_accumulation_steps": 1,
        # DeepSpeed reads the norm of the gradients on the host at every step; clip_gradients leaves it on the device
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **({"compute_grad_norm": False} if stage else {})},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": sys.maxsize,
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "torch_autocast": {
            "enabled": config.train.precision == "bf16",
            "dtype": "bfloat16",
            # modules whose gradients would travel in bf16: none, they are fp32 everywhere
            "lower_precision_safe_modules": [],
        },
    }


class DeferredErrors(TorchCheckpointEngine):  # type: ignore[misc]
    """Writes DeepSpeed's checkpoint files, keeping an error for later: raised inside `save_checkpoint` it would leave the
    other ranks in the barrier at its end."""

    def __init__(self) -> None:
        super().__init__()
        self._error: Exception | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file, or remember why not."""
        try:
            super().save(state_dict, path)
        except (OSError, RuntimeError) as error:
            self._error = error

    def take_error(self) -> Exception | None:
        """The last error since this was asked."""
        error, self._error = self._error, None
        return error


def build_engine(config: RunConfig, model: DualEncoder, world: World) -> DeepSpeedEngine:
    """The model and its AdamW under ZeRO; the process group must be up (scaleclip.distributed.init)."""
    model.to(world.device)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, config.optim),
        config=deepspeed_config(config, world.size),
        dist_init_required=False,
    )
    engine.checkpoint_engine = DeferredErrors()
    # DeepSpeed's conversion scripts, copied beside every checkpoint: not wanted, and another way to fail on a full disk
    engine._copy_recovery_script = lambda save_path: None
    return engine


def clip_gradients(engine: DeepSpeedEngine, optim: OptimConfig) -> Tensor:
    """Scale the averaged gradients down to `optim.clip_norm` and return their norm before, fp32 (), without a host sync.

    Call between backward and step.
    """
    sharded = engine.zero_optimization_stage() > 0
    if sharded:
        gradients = [g for group in engine.optimizer.averaged_gradients.values() for g in group]
    else:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    squares = torch.stack(torch._foreach_norm(gradients)).square().sum()
    if sharded:
        dist.all_reduce(squares)
    norm = squares.sqrt()
    if optim.clip_norm:
        torch._foreach_mul_(gradients, (optim.clip_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
