"""A digest is of all that tensors are, and of nothing else."""

import itertools

import torch

from scaleclip.models.tensor_digest import tensor_digest

VALUES = torch.arange(6, dtype=torch.float32)


def test_a_digest_is_of_names_dtypes_shapes_values_and_what_is_said():
    others = [
        tensor_digest([("a", VALUES)]),
        tensor_digest([("a", VALUES)], about="something"),
        tensor_digest([("b", VALUES)]),
        tensor_digest([("a", VALUES + 1)]),
        tensor_digest([("a", VALUES.view(2, 3))]),
        tensor_digest([("a", VALUES.view(torch.int32))]),
        tensor_digest([("a", VALUES.bfloat16())]),
        tensor_digest([("a", VALUES[0])]),
        tensor_digest([("a", VALUES[:0])]),
        tensor_digest([("a", VALUES), ("b", VALUES)]),
        tensor_digest([("b", VALUES), ("a", VALUES)]),
        tensor_digest([]),
    ]
    assert all(len(each) == 16 for each in others)
    assert all(one != other for one, other in itertools.combinations(others, 2))


def test_how_a_tensor_lies_in_memory_is_nothing_to_it():
    spread = torch.stack([VALUES, VALUES], 1)[:, 0]
    turned = VALUES.view(2, 3).T.contiguous().T
    assert tensor_digest([("a", spread)]) == tensor_digest([("a", torch.nn.Parameter(VALUES))])
    assert tensor_digest([("a", turned)]) == tensor_digest([("a", VALUES.view(2, 3))])
