"""Few-shot classification by prototypes (arXiv:1703.05175) on frozen features, as LaCLIP (arXiv:2305.20088) reports it.

The paper says 5 ways, 5 shots and a mean over episodes with its deviation. What it does not say is chosen here: features are
the embedding, of unit length; a prototype is the mean of its class's shots, and a query belongs to the nearest by Euclidean
distance; shots and queries are different images of one split; 600 episodes of 15 queries a class.

Shapes: N images, P episodes, W ways, S shots, Q queries a class, E embedding width.
"""

import logging
from pathlib import Path

import torch
from torch import Tensor

from scaleclip.errors import RunError
from scaleclip.evaluation.encoder import Encoder
from scaleclip.evaluation.features import encode_features
from scaleclip.evaluation.labelled import LabelledImages
from scaleclip.evaluation.results import Figure

_BLOCK = 32  # episodes whose features are gathered at once
_NORMAL_95 = 1.96
_log = logging.getLogger(__name__)


def evaluate_few_shot(
    encoder: Encoder,
    data: LabelledImages,
    *,
    ways: int = 5,
    shots: int = 5,
    queries: int = 15,
    episodes: int = 600,
    seed: int = 0,
    features: Path | None = None,
) -> list[Figure]:
    """Mean accuracy over episodes and the 95 % interval of that mean. All ranks call and get the same.

    A class with fewer images than shots + queries takes part in no episode, and a warning counts them: an error would leave
    a data set of a thousand classes without a figure for the sake of one. Memory: N x E floats on every rank, and 32
    episodes' features.

    Args:
        features: folder to keep features in (see `encode_features`).

    Raises:
        RunError: an image cannot be used, or fewer than `ways` classes have enough images.
    """
    found = encode_features(encoder, data, "embedding", features)
    members = _members(found.label_N, shots + queries)
    num_classes = len(torch.unique(found.label_N))
    if num_classes < ways:
        raise RunError(few_classes(data.name, num_classes, ways))
    if len(members) < ways:
        raise RunError(
            f"data set {data.name}: {len(members)} of {num_classes} classes have the {shots} + {queries} images that an "
            f"episode needs of each of {ways}: ask for fewer shots or queries, or take a split with more images"
        )
    if len(members) < num_classes:
        left_out = num_classes - len(members)
        _log.warning(
            f"data set {data.name}: {left_out} of {num_classes} classes are left out: fewer than {shots + queries} images"
        )
    image_PWK = draw_episodes(members, ways, shots + queries, episodes, seed)
    accuracy_P = episode_accuracies(found.whole(), image_PWK, shots)
    mean = float(accuracy_P.mean())
    half = _NORMAL_95 * float(accuracy_P.std()) / episodes**0.5 if episodes > 1 else 0.0
    name, chance = f"{ways}-way {shots}-shot", 1 / ways
    return [Figure(data.name, name, mean, chance, chance, max(0.0, mean - half), min(1.0, mean + half))]


def few_classes(name: str, num_classes: int, ways: int) -> str:
    """What is wrong with a data set of too few classes."""
    return f"data set {name} has {num_classes} classes, and an episode {ways}: set `ways: {num_classes}` or fewer in the suite"


def draw_episodes(members: list[Tensor], ways: int, images: int, episodes: int, seed: int) -> Tensor:
    """int64 (episodes, ways, images): numbers of images, classes and their images drawn without replacement.

    Args:
        members: of each class, the numbers of its images, at least `images`.
        ways: classes of an episode.
        images: of each of them.
        episodes: how many.
        seed: of the draws.
    """
    random = torch.Generator().manual_seed(seed)

    def draw_class(number: int) -> Tensor:
        return members[number][torch.randperm(len(members[number]), generator=random)[:images]]

    chosen_PW = torch.stack([torch.randperm(len(members), generator=random)[:ways] for _ in range(episodes)])
    return torch.stack([draw_class(number) for number in chosen_PW.flatten().tolist()]).view(episodes, ways, images)


def episode_accuracies(feature_NE: Tensor, image_PWK: Tensor, shots: int) -> Tensor:
    """float64 (P,): share of each episode's queries whose nearest prototype is their class's. The first `shots` images of a
    class make its prototype. A query as near to another prototype as to its own is not counted as right."""
    accuracies = []
    for first in range(0, len(image_PWK), _BLOCK):
        image_BWK = image_PWK[first : first + _BLOCK]
        feature_BWKE = feature_NE[image_BWK]
        prototype_BWE, query_BWQE = feature_BWKE[:, :, :shots].mean(dim=2), feature_BWKE[:, :, shots:]
        distance_BXW = torch.cdist(query_BWQE.flatten(1, 2), prototype_BWE)
        num_ways, num_queries = query_BWQE.shape[1:3]
        own_X = torch.arange(num_ways).repeat_interleave(num_queries)
        own_BX1 = distance_BXW.gather(2, own_X.expand(len(image_BWK), -1)[..., None])
        accuracies.append(((distance_BXW > own_BX1).sum(dim=2) == num_ways - 1).double().mean(dim=1))
    return torch.cat(accuracies)


def _members(label_N: Tensor, fewest: int) -> list[Tensor]:
    """Numbers of the images of each class that has at least so many, by label."""
    classes = torch.unique(label_N).tolist()
    members = [(label_N == label).nonzero().squeeze(1) for label in classes]
    return [images for images in members if len(images) >= fewest]
