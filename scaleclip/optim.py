"""AdamW and its parameter groups."""

from typing import Any

import torch
from torch import nn

from scaleclip.config import OptimConfig
from scaleclip.models.dual_encoder import DualEncoder

LOGIT_SCALE = "logit_scale"


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases and everything else of fewer than two dimensions do not; the logit scale stands alone."""
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": [], LOGIT_SCALE: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[LOGIT_SCALE if name == LOGIT_SCALE else "decay" if parameter.ndim >= 2 else "no_decay"].append(parameter)
    return [
        {"name": name, "params": parameters, "weight_decay": weight_decay if name == "decay" else 0.0}
        for name, parameters in groups.items()
    ]


def build_optimizer(model: DualEncoder, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW whose step ends by clamping the logit scale to [1, `model.max_logit_scale`].

    The clamp is a hook of the optimizer because what the optimizer updates is the fp32 master that ZeRO shards: clamping the
    model's own parameter would be undone by the next step, and clamping here costs no collective.
    """
    adamw = torch.optim.AdamW(
        parameter_groups(model, optim.weight_decay), lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True
    )
    bound = model.log_max_logit_scale

    def clamp_logit_scale(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # under ZeRO this runs once a group, with that group alone
        for group in optimizer.param_groups:
            if group["name"] == LOGIT_SCALE:
                for master in group["params"]:
                    master.data.clamp_(0.0, bound)

    adamw.register_step_post_hook(clamp_logit_scale)
    return adamw


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
