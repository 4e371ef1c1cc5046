"""A linear probe as CLIP's (arXiv:2103.00020, A.3): logistic regression on frozen features of the image tower before its
projection, its L2 strength found on a validation split by a parametric binary search.

The grid has 8 steps a decade from 1e-6 to 1e6. Strengths two decades apart are tried, then the neighbours of the best one at
one decade, a half, a quarter and an eighth; then the best strength is fitted on training and validation images together. What
the paper does not say: how much of a training split becomes validation where there is none (here every fifth image of each
class), and by which figure strengths are chosen (here by the one that is reported).
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from scaleclip.errors import ConfigError, RunError
from scaleclip.evaluation.encoder import Encoder
from scaleclip.evaluation.features import Features, Kind, encode_features
from scaleclip.evaluation.labelled import LabelledImages
from scaleclip.evaluation.logistic import Fit, Rows, fit
from scaleclip.evaluation.over_ranks import encode_over_ranks
from scaleclip.evaluation.results import Figure
from scaleclip.evaluation.zero_shot import Outcomes, class_mean_figure, label_ranks, top_figure

STRENGTHS = tuple(10 ** (step / 8) for step in range(-48, 49))
_FIRST_STEP = 16
_HELD_OUT = 5  # one image in so many
_log = logging.getLogger(__name__)


def evaluate_linear_probe(
    encoder: Encoder,
    train: LabelledImages,
    test: LabelledImages,
    *,
    mean_per_class: bool,
    features: Path | None,
    validation: LabelledImages | None = None,
    kind: Kind = "pooled",
) -> list[Figure]:
    """Accuracy on `test`, or both that and the mean of class recalls, with 95 % intervals. All ranks call and get the same.

    Memory: see `scaleclip.evaluation.logistic.fit`; without a folder for features every rank holds all of them.

    Args:
        features: folder to keep features in (see `encode_features`).
        validation: images that choose the strength; None takes a fifth of `train`.
        kind: which features; `pooled` is the papers'.

    Raises:
        ConfigError: the splits name their classes differently, or scipy is not installed.
        RunError: an image cannot be used, a label is outside of the classes, or a class has no image.
    """
    splits = [train, test] if validation is None else [train, test, validation]
    _check_same_classes(splits)
    encoded = [encode_features(encoder, split, kind, features) for split in splits]
    num_classes = len(train.class_names or ()) or int(encoded[0].label_N.max()) + 1
    for split, found in zip(splits, encoded, strict=True):
        split.check_labels(found.label_N, num_classes)
    device = encoder.model.logit_scale.device
    learned, chosen_by = _validation_rows(encoded)
    if not chosen_by.chosen_N.any():
        raise RunError(
            f"data set {train.name}: no class has two images to learn from, so that nothing chooses the probe's strength: add "
            f"images, or name validation images"
        )

    def score(strength: float) -> float:
        outcomes = _classify(fit(learned, num_classes, strength, device), chosen_by, num_classes)
        return (class_mean_figure if mean_per_class else top_figure)(train.name, "", outcomes).value

    strength = find_strength(score)
    last = fit([_all(encoded[0]), *map(_all, encoded[2:])], num_classes, strength, device)
    _log.info(f"linear probe of {test.name}: strength {strength:.3g}, {'converged' if last.converged else 'not converged'}")
    outcomes = _classify(last, _all(encoded[1]), num_classes)
    figures = [top_figure(test.name, "linear probe", outcomes)]
    if mean_per_class:
        figures.append(class_mean_figure(test.name, "linear probe mean per class", outcomes))
    return figures


def find_strength(score: Callable[[float], float]) -> float:
    """The strength of the grid with the best score, by halving steps around the best so far; of equals the weakest."""
    scores: dict[int, float] = {}

    def best(places: Sequence[int]) -> int:
        for place in places:
            if place not in scores:
                scores[place] = score(STRENGTHS[place])
        return max(places, key=scores.__getitem__)

    peak, step = best(range(0, len(STRENGTHS), _FIRST_STEP)), _FIRST_STEP // 2
    while step:
        peak = best([place for place in (peak - step, peak, peak + step) if 0 <= place < len(STRENGTHS)])
        step //= 2
    return STRENGTHS[peak]


def _classify(classifier: Fit, rows: Rows, num_classes: int) -> Outcomes:
    """What it makes of images; every rank takes some parts."""
    device = classifier.weight_CD.device

    def compare(number: int, _: int) -> tuple[Tensor, Tensor]:
        feature_BD, label_B = rows.part(number, device)
        return label_ranks(feature_BD, classifier.weight_CD, label_B).cpu(), label_B.cpu()

    parts = encode_over_ranks(len(rows.features.parts), 1, compare)
    rank_N, label_N = (torch.cat(each) for each in zip(*parts, strict=True))
    return Outcomes(rank_N, label_N, num_classes)


def _validation_rows(encoded: Sequence[Features]) -> tuple[list[Rows], Rows]:
    """What is learned from while the strength is sought, and what chooses it; of train, test and, where given, validation."""
    if len(encoded) == 3:
        return [_all(encoded[0])], _all(encoded[2])
    held_N = every_fifth(encoded[0].label_N)
    return [Rows(encoded[0], ~held_N)], Rows(encoded[0], held_N)


def every_fifth(label_N: Tensor) -> Tensor:
    """bool (N,): the fifth, tenth ... image of each class; the second of a class with fewer than five, if it has one."""
    held_N = torch.zeros(len(label_N), dtype=torch.bool)
    for label in torch.unique(label_N):
        members = (label_N == label).nonzero().squeeze(1)
        held_N[members[_HELD_OUT - 1 :: _HELD_OUT] if len(members) >= _HELD_OUT else members[1:2]] = True
    return held_N


def _all(features: Features) -> Rows:
    return Rows(features, torch.ones(len(features.label_N), dtype=torch.bool))


def _check_same_classes(splits: Sequence[LabelledImages]) -> None:
    first = splits[0]
    for other in splits[1:]:
        # not what classnames.txt says, which is one file for all splits
        if first.stored_classes and other.stored_classes and first.stored_classes != other.stored_classes:
            only = set(first.stored_classes) ^ set(other.stored_classes)
            raise ConfigError(
                f"data sets {first.name} and {other.name} name their classes differently"
                f"{f', {min(only)!r} is in one only' if only else ' or in another order'}: their labels would not be the same"
            )
