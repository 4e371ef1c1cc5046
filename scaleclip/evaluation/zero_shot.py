"""Zero-shot classification with prompt ensembles (CLIP, arXiv:2103.00020, section 3.1.4).

Shapes: N images, C classes, E embedding width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

_BLOCK = 4096


def class_vectors(classes: Sequence[str], templates: Sequence[str], encode: Callable[[list[str]], Tensor]) -> Tensor:
    """(C, E): the unit-length mean over templates of each class's prompt. `encode` takes texts to unit vectors."""
    prompts = [template.format(name) for name in classes for template in templates]
    return normalize(encode(prompts).reshape(len(classes), len(templates), -1).mean(dim=1), dim=-1)


def accuracy(image_NE: Tensor, class_CE: Tensor, label_N: Tensor) -> float:
    """Share of images whose most similar class is their label, blockwise over images."""
    correct = sum(
        int(((image_NE[start : start + _BLOCK] @ class_CE.T).argmax(dim=1) == label_N[start : start + _BLOCK]).sum())
        for start in range(0, len(image_NE), _BLOCK)
    )
    return correct / len(image_NE)


def majority_share(label_N: Tensor) -> float:
    """Accuracy of always answering the most frequent class."""
    return float(torch.bincount(label_N).max()) / len(label_N)
