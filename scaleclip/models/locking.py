"""Towers that keep their weights while the rest learns (LiT, arXiv:2111.07991)."""

from torch import nn
from transformers import PreTrainedModel

from scaleclip.config import ImageTowerConfig, TextTowerConfig
from scaleclip.errors import ConfigError
from scaleclip.models.depth import depth_groups


def lock(key: str, tower: ImageTowerConfig | TextTowerConfig, body: PreTrainedModel) -> None:
    """Freeze a tower's body as `tower` says, all but its last `unlocked_groups` groups (see `depth_groups`).

    Its mode stays training: a tower with dropout drops as before. What did not learn before, such as a fixed table of
    positions, does not in an unlocked group either.

    Raises:
        ConfigError: groups are to be unlocked in a tower that is not locked, has no layers or has fewer groups.
    """
    if not tower.locked:
        if tower.unlocked_groups:
            raise ConfigError(
                f"{key}.unlocked_groups={tower.unlocked_groups} unlocks parts of a locked tower, and this one is not: set "
                f"{key}.locked=true, or {key}.unlocked_groups=0"
            )
        return
    groups = depth_groups(body)
    if tower.unlocked_groups and groups.num_groups == 1:
        raise ConfigError(
            f"{key}.unlocked_groups={tower.unlocked_groups}: no layers were found in a {tower.type} tower, so it has no "
            f"groups; set it to 0 to lock the whole tower, or unset {key}.locked"
        )
    if tower.unlocked_groups > groups.num_groups:
        raise ConfigError(
            f"{key}.unlocked_groups={tower.unlocked_groups}: the tower has {groups.num_groups} groups (embeddings, "
            f"{groups.num_groups - 2} layers, head); set it to at most that, or unset {key}.locked"
        )
    for name, parameter in body.named_parameters():
        if groups.group_of[name] < groups.num_groups - tower.unlocked_groups:
            parameter.requires_grad_(False)


def has_batch_norm(body: PreTrainedModel) -> bool:
    """Whether any part of a tower normalises over the batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in body.modules())


def fix_batch_norm(key: str, tower: ImageTowerConfig | TextTowerConfig, body: PreTrainedModel) -> None:
    """Make the running statistics of a wholly locked tower parameters that do not learn, under the same names.

    In evaluation mode, in which such a tower has to stay, they are weights like others: checkpoints and ZeRO's shards, which
    hold no buffers, then have them.

    Raises:
        ConfigError: batch norm in a tower that learns.
    """
    for name, module in body.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if not tower.locked or tower.unlocked_groups:
            raise ConfigError(
                f"{key}.type={tower.type} has batch norm ({name}): ranks and chunks of a batch would each normalise by "
                f"statistics of their own, so the result would depend on the layout; use a tower with layer or group norm, or "
                f"keep trained weights and statistics as they are: {key}.locked=true {key}.unlocked_groups=0"
            )
        for statistic in ("running_mean", "running_var"):
            value = module._buffers.pop(statistic)
            assert value is not None, f"{name} has no {statistic}"
            setattr(module, statistic, nn.Parameter(value, requires_grad=False))
