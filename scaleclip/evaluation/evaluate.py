"""A model on held-out splits: retrieval both ways and zero-shot accuracy, with chance beside every figure."""

from collections.abc import Sequence

import torch
from torch import Tensor

from scaleclip.evaluation.encoder import Encoder
from scaleclip.evaluation.over_ranks import encode_over_ranks
from scaleclip.evaluation.results import Figure
from scaleclip.evaluation.retrieval import chance_recall_at_k, recall_at_k
from scaleclip.evaluation.splits import SplitData
from scaleclip.evaluation.zero_shot import accuracy, class_vectors, majority_share


def evaluate(encoder: Encoder, splits: Sequence[SplitData]) -> list[Figure]:
    """Every figure of every split, in fp32. The model is left in the mode it was in. All ranks call; each encodes its part.

    Raises:
        RunError: an image of a split cannot be used.
    """
    with encoder.evaluating():
        return [figure for data in splits for figure in _evaluate_split(encoder, data)]


def _evaluate_split(encoder: Encoder, data: SplitData) -> list[Figure]:
    split = data.split

    def encode_images(start: int, stop: int) -> tuple[list[str], Tensor]:
        keys, pixels_BCHW = data.images(start, stop, encoder.size)
        return keys, encoder.images(pixels_BCHW)

    parts = encode_over_ranks(data.num_images, encoder.batch, encode_images)
    keys = [key for some_keys, _ in parts for key in some_keys]
    image_NE = torch.cat([vectors_BE for _, vectors_BE in parts])
    text_GE = encoder.texts([entry.text for entry in split.gallery])
    number = {concept: i for i, concept in enumerate(dict.fromkeys(entry.concept for entry in split.gallery))}
    image_concept_N = torch.tensor([number[split.concepts[key]] for key in keys])
    text_concept_G = torch.tensor([number[entry.concept] for entry in split.gallery])

    figures = []
    for direction, query, items in (
        ("image -> text", (image_NE, image_concept_N), (text_GE, text_concept_G)),
        ("text -> image", (text_GE, text_concept_G), (image_NE, image_concept_N)),
    ):
        recall = recall_at_k(query[0], items[0], query[1], items[1])
        chance = chance_recall_at_k(query[1], items[1])
        figures += [Figure(split.name, f"{direction} R@{k}", recall[k], chance[k]) for k in recall]
    for task in split.zero_shot:
        class_CE = class_vectors(task.classes, task.templates, encoder.texts)
        label_N = torch.tensor([task.labels[key] for key in keys])
        value, chance_level = accuracy(image_NE, class_CE, label_N), 1 / len(task.classes)
        figures.append(Figure(split.name, f"zero-shot {task.name}", value, chance_level, majority_share(label_N)))
    return figures
