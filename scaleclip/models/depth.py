"""How deep a tower's parameters lie, as layer-wise learning rates (BEiT, arXiv:2106.08254) and locked towers count it.

A tower of L layers has L + 2 groups: 0 is what stands before the layers (embeddings, patches, positions, a norm before
them), 1 to L are the layers, L + 1 is what stands behind them: the final norm, the pooler and the projection.
"""

from typing import Literal, NamedTuple

from torch import nn
from transformers import PreTrainedModel


class DepthGroups(NamedTuple):
    """The groups of a tower's body."""

    group_of: dict[str, int]
    """Group of each parameter by its name."""
    num_groups: int
    """L + 2, or 1 where no layers were found."""


class Place(NamedTuple):
    """Where a parameter of a dual encoder stands."""

    tower: Literal["image", "text"] | None
    """None for the logit scale and bias."""
    group: int
    num_groups: int
    """Of its tower."""

    @property
    def groups_above(self) -> int:
        """Groups between this one and the tower's output: 0 for the last."""
        return self.num_groups - 1 - self.group


NO_TOWER = Place(None, 0, 1)


def depth_groups(body: PreTrainedModel) -> DepthGroups:
    """The group of every parameter of a tower.

    The layers are the largest list of equal modules; where transformers calls that list's entries stages (`depths`), the
    layers of each stage. What is registered between two layers goes with the upper one; embedding tables are in group 0
    wherever they are registered.
    """
    layers = _layers(body)
    if not layers:
        return DepthGroups({name: 0 for name, _ in body.named_parameters()}, 1)
    layer_of = {id(parameter): number for number, layer in enumerate(layers, 1) for parameter in layer.parameters()}
    tables = {id(module.weight) for module in body.modules() if isinstance(module, nn.Embedding)}
    group_of: dict[str, int] = {}
    layers_below = 0
    for name, parameter in body.named_parameters():
        if id(parameter) in layer_of:
            layers_below = group_of[name] = layer_of[id(parameter)]
        else:
            group_of[name] = 0 if not layers_below or id(parameter) in tables else layers_below + 1
    return DepthGroups(group_of, len(layers) + 2)


def _layers(body: PreTrainedModel) -> list[nn.Module]:
    stacks = [module for module in body.modules() if _is_stack(module)]
    if not stacks:
        return []
    # not their elements: a shard of ZeRO-3 may have none. The outermost list of several that hold the same comes first
    stack = max(stacks, key=lambda module: len(list(module.parameters())))
    if not hasattr(body.config, "depths"):
        return list(stack.children())
    inner = [lists for stage in stack.children() for lists in (stage, *stage.children()) if _is_stack(lists)]
    return [layer for layers in inner for layer in layers.children()]


def _is_stack(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    entries = list(module.children())
    return len({type(entry) for entry in entries}) == 1 and any(True for _ in entries[0].children())
