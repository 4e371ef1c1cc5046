"""How the tensors of a dual encoder are named and laid out elsewhere, as rules that can be followed both ways.

Dimensions: E the shared embedding space, D a text tower's width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scaleclip.config import ModelConfig
from scaleclip.errors import ConfigError
from scaleclip.exchange.weights import Weights
from scaleclip.models.dual_encoder import DualEncoder

NUM_NAMED = 3
# buffers, which older versions of transformers stored, and constants of OpenAI's archives
_NO_WEIGHTS = ("position_ids", "attn_mask", "input_resolution", "context_length", "vocab_size")


class Rule(NamedTuple):
    """One tensor elsewhere and the parameters of a DualEncoder that it is made of."""

    ours: tuple[str, ...]
    theirs: str
    there: Callable[..., Tensor]
    """From ours, in order, to theirs."""
    back: Callable[[Tensor], Sequence[Tensor]]
    """From theirs to ours."""


def same(ours: str, theirs: str) -> Rule:
    """The same tensor under another name."""
    return Rule((ours,), theirs, lambda tensor: tensor, lambda tensor: (tensor,))


def turned(ours: str, theirs: str) -> Rule:
    """A matrix that is applied from the other side."""
    return Rule((ours,), theirs, lambda matrix: matrix.T, lambda matrix: (matrix.T,))


def scalar(ours: str, theirs: str) -> Rule:
    """A single value: ours has a dimension, theirs may have none."""
    return Rule((ours,), theirs, lambda value: value.reshape(()), lambda value: (value.reshape(1),))


def stacked(ours: Sequence[str], theirs: str) -> Rule:
    """Several matrices or biases as one."""
    return Rule(tuple(ours), theirs, lambda *parts: torch.cat(parts), lambda whole: whole.chunk(len(ours)))


def layers(ours: str, theirs: str, number: int) -> Iterator[Rule]:
    """Of a stack of transformer layers: transformers' CLIP and SigLIP have the same names, and open_clip has `theirs`."""
    others = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
    others |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for i in range(number):
        a, b = f"{ours}.encoder.layers.{i}", f"{theirs}transformer.resblocks.{i}"
        for end in ("weight", "bias"):
            yield stacked([f"{a}.self_attn.{name}_proj.{end}" for name in "qkv"], f"{b}.attn.in_proj_{end}")
            yield from (same(f"{a}.{name}.{end}", f"{b}.{other}.{end}") for name, other in others.items())


def folded_head(projection: str, head: str, theirs: str, width: int) -> Iterator[Rule]:
    """SigLIP's text head and our projection behind it, two linear maps, as the one that they make together.

    Back, the head holds the map's rows and the projection takes the first E of its D outputs.
    """

    def matrix_back(matrix_ED: Tensor) -> tuple[Tensor, Tensor]:
        return torch.eye(len(matrix_ED), width, device=matrix_ED.device), _padded(matrix_ED, width)

    def bias_back(bias_E: Tensor) -> tuple[Tensor, Tensor]:
        return torch.eye(len(bias_E), width, device=bias_E.device), _padded(bias_E, width)

    yield Rule((projection, f"{head}.weight"), f"{theirs}.weight", torch.matmul, matrix_back)
    yield Rule((projection, f"{head}.bias"), f"{theirs}.bias", torch.matmul, bias_back)


def to_theirs(rules: Sequence[Rule], ours: Weights) -> Weights:
    """A model's tensors as they are elsewhere."""
    by_name = {rule.theirs: rule for rule in rules}

    def read(name: str) -> Tensor:
        rule = by_name[name]
        return rule.there(*(ours.read(each) for each in rule.ours))

    return _described({name: rule.there(*(_empty(ours, each) for each in rule.ours)) for name, rule in by_name.items()}, read)


def to_ours(rules: Sequence[Rule], theirs: Weights, reference: str) -> Weights:
    """A model's tensors as a DualEncoder has them.

    Raises:
        ConfigError: some are missing, or there are others: it is another architecture than the rules are for.
    """
    expected = {rule.theirs for rule in rules}
    faults = {
        "lacks": sorted(expected - theirs.shapes.keys()),
        "has, and the model does not,": [
            name for name in theirs.shapes if name not in expected and not name.endswith(_NO_WEIGHTS)
        ],
    }
    found = [f"{fault} {named(names)}" for fault, names in faults.items() if names]
    if found:
        raise ConfigError(f"{reference} holds another architecture: it {', and '.join(found)}")
    where: dict[str, tuple[Rule, int]] = {}
    described: dict[str, Tensor] = {}
    for rule in rules:
        parts = rule.back(_empty(theirs, rule.theirs))
        for number, (name, part) in enumerate(zip(rule.ours, parts, strict=True)):
            where[name], described[name] = (rule, number), part

    def read(name: str) -> Tensor:
        rule, number = where[name]
        return rule.back(theirs.read(rule.theirs))[number]

    return _described(described, read)


def projecting(ours: Weights, config: ModelConfig, model: DualEncoder) -> Weights:
    """A model's tensors for what always projects images: with a matrix that changes nothing where the model has none.

    Args:
        ours: its tensors.
        config: the dual encoder's.
        model: built from it, with or without values.
    """
    if config.image.projection:
        return ours
    return ours.with_constants({"image_projection.weight": torch.eye(config.embed_dim, model.image.width)})


def prefixed(names: Sequence[str], prefixes: Mapping[str, str]) -> list[Rule]:
    """The names that begin with one of `prefixes`, with another beginning."""
    return [
        same(name, other + name.removeprefix(prefix))
        for name in names
        for prefix, other in prefixes.items()
        if name.startswith(prefix)
    ]


def named(names: Sequence[str]) -> str:
    """The first few of them."""
    return ", ".join(names[:NUM_NAMED]) + f" and {len(names) - NUM_NAMED} more" * (len(names) > NUM_NAMED)


def _empty(weights: Weights, name: str) -> Tensor:
    return torch.empty(weights.shapes[name], dtype=weights.dtype(name), device="meta")


def _described(tensors: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> Weights:
    """Weights with the shapes and types of `tensors`, which have no values."""
    return Weights(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        read,
        {name: tensor.dtype for name, tensor in tensors.items() if not tensor.is_floating_point()},
    )


def _padded(tensor: Tensor, length: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:])])
