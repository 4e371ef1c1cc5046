"""Zero-shot classification with prompt ensembles (CLIP, arXiv:2103.00020, section 3.1.4).

Shapes: N images, B images of a block, C classes, E embedding width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from scaleclip.errors import ConfigError
from scaleclip.evaluation.class_names import Prompts
from scaleclip.evaluation.encoder import Encoder
from scaleclip.evaluation.intervals import bootstrap_interval
from scaleclip.evaluation.labelled import LabelledImages
from scaleclip.evaluation.over_ranks import read_and_encode_over_ranks
from scaleclip.evaluation.results import Figure

_BLOCK = 4096


def evaluate_zero_shot(encoder: Encoder, data: LabelledImages, prompts: Prompts, *, mean_per_class: bool) -> list[Figure]:
    """Top-1, top-5 where there are more than five classes, and the mean of class recalls, with 95 % intervals.

    Images are encoded, compared and forgotten a batch at a time: memory takes C x templates x E floats for the prompts, then
    batch x (2 pixels + C), the next batch being read meanwhile, and 9 bytes an image. All ranks call and get the same.

    Raises:
        ConfigError: the prompts' classes are not as many as the images'.
        RunError: an image cannot be used, a label is outside of the classes, or a class has no image.
    """
    if data.class_names is not None and len(data.class_names) != len(prompts.classes):
        raise ConfigError(
            f"data set {data.name}: there are {len(prompts.classes)} class names for its {len(data.class_names)} classes: give "
            f"one a class, in the order of labels"
        )
    with encoder.evaluating():
        class_CE = class_vectors(*prompts, encoder.texts)

        def compare(read: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            pixels_BCHW, label_B = read
            if int(label_B.max()) >= len(class_CE):  # it has no similarity to be ranked by
                return torch.zeros_like(label_B), label_B
            return label_ranks(encoder.images(pixels_BCHW), class_CE, label_B), label_B

        read = partial(data.images, size=encoder.size)
        parts = read_and_encode_over_ranks(data.num_images, encoder.batch, read, compare)
    rank_N, label_N = (torch.cat(each) for each in zip(*parts, strict=True))
    data.check_labels(label_N, len(class_CE))
    outcomes = Outcomes(rank_N, label_N, len(class_CE))
    figures = [top_figure(data.name, "zero-shot top-1", outcomes)]
    if len(class_CE) > 5:
        figures.append(top_figure(data.name, "zero-shot top-5", outcomes, 5))
    if mean_per_class:
        figures.append(class_mean_figure(data.name, "zero-shot mean per class", outcomes))
    return figures


class Outcomes(NamedTuple):
    """What a classifier made of images."""

    rank_N: Tensor
    """int64, how many classes it held for likelier than the label."""
    label_N: Tensor
    """int64."""
    num_classes: int

    def is_among(self, k: int) -> Tensor:
        """float64 (N,): 1 where the label is among the k likeliest classes."""
        return (self.rank_N < k).double()


def top_figure(name: str, metric: str, outcomes: Outcomes, k: int = 1) -> Figure:
    """Share of images whose label is among the k likeliest classes."""
    correct_N, counts_C = outcomes.is_among(k), torch.bincount(outcomes.label_N, minlength=outcomes.num_classes)
    majority = int(counts_C.topk(k).values.sum()) / len(correct_N)
    return Figure(name, metric, float(correct_N.mean()), k / outcomes.num_classes, majority, *bootstrap_interval(correct_N))


def class_mean_figure(name: str, metric: str, outcomes: Outcomes) -> Figure:
    """Mean over classes of the share of a class's images that are right; images are drawn anew within their class."""
    correct_N, label_N = outcomes.is_among(1), outcomes.label_N
    counts_C, sums_C = torch.bincount(label_N), torch.bincount(label_N, weights=correct_N)
    # numpy's order of summation is scikit-learn's, and so clip-benchmark's
    value, chance = float((sums_C / counts_C)[counts_C > 0].numpy().mean()), 1 / outcomes.num_classes
    return Figure(name, metric, value, chance, chance, *bootstrap_interval(correct_N, groups_N=label_N))


def class_vectors(classes: Sequence[str], templates: Sequence[str], encode: Callable[[list[str]], Tensor]) -> Tensor:
    """(C, E): the unit-length mean over templates of each class's prompt. `encode` takes texts to unit vectors."""
    # a plain replacement: names and templates may hold other braces
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    return normalize(encode(prompts).reshape(len(classes), len(templates), -1).mean(dim=1), dim=-1)


def label_ranks(image_NE: Tensor, class_CE: Tensor, label_N: Tensor) -> Tensor:
    """int64 (N,): how many classes are more similar to an image than its label, 0 for a right answer; 4096 x C similarities
    at once.

    Of classes that are equally similar the first goes before the others, as for argmax: two classes of ImageNet share their
    prompts with another. An image whose similarities are not numbers has its label last.
    """
    ranks = []
    for start in range(0, len(image_NE), _BLOCK):
        label_B1 = label_N[start : start + _BLOCK, None]
        similarity_BC = image_NE[start : start + _BLOCK] @ class_CE.T
        of_label_B1 = similarity_BC.gather(1, label_B1)
        is_later_C = torch.arange(len(class_CE), device=label_N.device) >= label_B1
        # not "more similar": a comparison with NaN is false
        is_behind_BC = (similarity_BC < of_label_B1) | ((similarity_BC == of_label_B1) & is_later_C)
        ranks.append(len(class_CE) - is_behind_BC.sum(dim=1))
    return torch.cat(ranks)
