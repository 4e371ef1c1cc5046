"""AdamW, its parameter groups and their learning rates."""

from typing import Any

import torch

from scaleclip.config import OptimConfig
from scaleclip.errors import ConfigError
from scaleclip.models.depth import Place
from scaleclip.models.dual_encoder import DualEncoder

DECAY, NO_DECAY, LOGIT_SCALE = "decay", "no_decay", "logit_scale"


def parameter_groups(model: DualEncoder, optim: OptimConfig) -> list[dict[str, Any]]:
    """The parameters that learn, by whether they decay and by their share of the learning rate (`lr_scale`).

    Matrices decay; norms, biases and everything else of fewer than two dimensions do not; the logit scale stands alone. A
    tower's `layer_decay` (BEiT, arXiv:2106.08254) counts from its last group, projection included, down to its embeddings.
    The order depends on names and scales alone, and no group is empty.

    Raises:
        ConfigError: a `layer_decay` for a tower in which no layers were found.
    """
    places = model.parameter_places()
    members: dict[tuple[str, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # under ZeRO-3 its own shape is that of an empty shard
            num_dims = len(getattr(parameter, "ds_shape", parameter.shape))
            kind = LOGIT_SCALE if name == LOGIT_SCALE else DECAY if num_dims >= 2 else NO_DECAY
            members.setdefault((kind, _lr_scale(places[name], optim)), []).append(parameter)
    kinds = (DECAY, NO_DECAY, LOGIT_SCALE)
    return [
        {
            "name": kind if scale == 1 else f"{kind} x {scale!r}",
            "params": members[kind, scale],
            "weight_decay": optim.weight_decay if kind == DECAY else 0.0,
            "lr_scale": scale,
        }
        for kind, scale in sorted(members, key=lambda group: (kinds.index(group[0]), -group[1]))
    ]


def build_optimizer(model: DualEncoder, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW whose step ends by clamping the logit scale to [1, `model.max_logit_scale`].

    The clamp is a hook of the optimizer because what the optimizer updates is the fp32 master that ZeRO shards: clamping the
    model's own parameter would be undone by the next step, and clamping here costs no collective.

    Raises:
        ConfigError: see `parameter_groups`.
    """
    adamw = torch.optim.AdamW(parameter_groups(model, optim), lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    set_learning_rate(adamw, optim.lr)
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
    """Use `lr`, times each group's scale, in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def _lr_scale(place: Place, optim: OptimConfig) -> float:
    if place.tower is None:
        return 1.0
    tower = optim.image if place.tower == "image" else optim.text
    if tower.layer_decay != 1 and place.num_groups == 1:
        raise ConfigError(
            f"optim.{place.tower}.layer_decay={tower.layer_decay}: no layers were found in this type of tower; set it to 1"
        )
    return tower.lr_scale * tower.layer_decay**place.groups_above
