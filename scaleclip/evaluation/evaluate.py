"""A model on held-out splits: retrieval both ways and zero-shot accuracy, with chance beside every figure."""

from collections.abc import Sequence

import torch
from torch import Tensor

from scaleclip.config import RunConfig
from scaleclip.data.tokenizer import Tokenizer
from scaleclip.evaluation.over_ranks import encode_over_ranks
from scaleclip.evaluation.results import Figure
from scaleclip.evaluation.retrieval import chance_recall_at_k, recall_at_k
from scaleclip.evaluation.splits import SplitData
from scaleclip.evaluation.zero_shot import accuracy, class_vectors, majority_share
from scaleclip.models.dual_encoder import DualEncoder


@torch.no_grad()
def evaluate(model: DualEncoder, tokenizer: Tokenizer, splits: Sequence[SplitData], config: RunConfig) -> list[Figure]:
    """Every figure of every split, in fp32. The model is left in the mode it was in. All ranks call; each encodes its part.

    Raises:
        RunError: an image of a split cannot be used.
    """
    training = model.training
    model.eval()
    try:
        size, batch = config.model.image.size, config.eval.batch
        return [figure for data in splits for figure in _evaluate_split(model, tokenizer, data, size, batch)]
    finally:
        model.train(training)


def _evaluate_split(model: DualEncoder, tokenizer: Tokenizer, data: SplitData, size: int, batch: int) -> list[Figure]:
    split = data.split
    device = next(model.parameters()).device

    def encode_texts(texts: list[str]) -> Tensor:
        def encode(start: int, stop: int) -> Tensor:
            return model.encode_text(tokenizer(texts[start:stop]).to(device)).cpu()

        return torch.cat(encode_over_ranks(len(texts), batch, encode))

    def encode_images(start: int, stop: int) -> tuple[list[str], Tensor]:
        keys, pixels_BCHW = data.images(start, stop, size)
        return keys, model.encode_image(pixels_BCHW.to(device)).cpu()

    parts = encode_over_ranks(data.num_images, batch, encode_images)
    keys = [key for some_keys, _ in parts for key in some_keys]
    image_NE = torch.cat([vectors_BE for _, vectors_BE in parts])
    text_GE = encode_texts([entry.text for entry in split.gallery])
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
        figures += [Figure(split.name, f"{direction} R@{k}", recall[k], chance[k], None) for k in recall]
    for task in split.zero_shot:
        class_CE = class_vectors(task.classes, task.templates, encode_texts)
        label_N = torch.tensor([task.labels[key] for key in keys])
        value, chance_level = accuracy(image_NE, class_CE, label_N), 1 / len(task.classes)
        figures.append(Figure(split.name, f"zero-shot {task.name}", value, chance_level, majority_share(label_N)))
    return figures
