"""Towers that keep their weights while the rest learns (LiT, arXiv:2111.07991)."""

from transformers import PreTrainedModel

from scaleclip.config import ImageTowerConfig, TextTowerConfig
from scaleclip.errors import ConfigError
from scaleclip.models.depth import depth_groups


def lock(key: str, tower: ImageTowerConfig | TextTowerConfig, body: PreTrainedModel) -> None:
    """Freeze a tower's body as `tower` says, all but its last `unlocked_groups` groups (see `depth_groups`).

    Its mode stays training: a tower with dropout drops as before.

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
        parameter.requires_grad_(groups.group_of[name] >= groups.num_groups - tower.unlocked_groups)
