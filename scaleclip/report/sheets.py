"""What a model finds in a split: for a few texts their most similar images, for a few images their texts, and a map of both.

Shapes: N images, G gallery texts, E embedding width. All are drawn with a seed before anything is ranked, so nothing is chosen
for what it shows.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scaleclip.evaluation.encoder import Encoder
from scaleclip.evaluation.splits import SplitData
from scaleclip.report.picture import to_webp

NUM_QUERIES, NUM_BEST, NUM_IN_MAP = 5, 5, 8
_THUMBNAIL = 112  # pixels


class Query(NamedTuple):
    """A text with its images, or an image with its texts, by number in the split."""

    number: int
    best: tuple[int, ...]
    """The most similar ones, the best first."""
    similarity: tuple[float, ...]
    """Cosine of each."""
    is_right: tuple[bool, ...]
    """Whether each matches."""
    rank: int
    """Of the first match, from 1 on; ties count against it."""


class SimilarityMap(NamedTuple):
    """Some images against as many texts."""

    images: tuple[int, ...]
    texts: tuple[int, ...]
    cosine: tuple[tuple[float, ...], ...]
    """A row an image."""
    is_right: tuple[tuple[bool, ...], ...]


class Sheet(NamedTuple):
    """Of one split."""

    name: str
    about: str
    num_images: int
    texts: tuple[str, ...]
    """All of the gallery."""
    of_texts: tuple[Query, ...]
    """Texts and their images."""
    of_images: tuple[Query, ...]
    """Images and their texts."""
    map: SimilarityMap
    thumbnails: dict[int, bytes]
    """WebP of the images shown, by number."""


def make_sheet(encoder: Encoder, data: SplitData, seed: int, advance: Callable[[int], None]) -> Sheet:
    """Encode a split and draw from it.

    Args:
        encoder: the model.
        data: the split.
        seed: of the draw.
        advance: is told the number of images and texts encoded since it was told last.

    Raises:
        RunError: an image of the split cannot be used.
    """
    keys, parts = list[str](), list[Tensor]()
    with encoder.evaluating():
        for start in range(0, data.num_images, encoder.batch):
            some_keys, pixels_BCHW = data.images(start, start + encoder.batch, encoder.size)
            keys += some_keys
            parts.append(encoder.images(pixels_BCHW))
            advance(len(some_keys))
        texts = tuple(entry.text for entry in data.split.gallery)
        text_GE = encoder.texts(texts)
        advance(len(texts))
    image_NE = torch.cat(parts)
    number = {concept: i for i, concept in enumerate(dict.fromkeys(entry.concept for entry in data.split.gallery))}
    image_concept_N = torch.tensor([number[data.split.concepts[key]] for key in keys])
    text_concept_G = torch.tensor([number[entry.concept] for entry in data.split.gallery])

    random = np.random.default_rng(seed)
    shown_texts = _draw(random, np.flatnonzero(torch.isin(text_concept_G, image_concept_N).numpy()), NUM_QUERIES)
    shown_images = _draw(random, np.arange(len(keys)), NUM_QUERIES)
    of_texts = _queries(shown_texts, text_GE, text_concept_G, image_NE, image_concept_N)
    of_images = _queries(shown_images, image_NE, image_concept_N, text_GE, text_concept_G)
    concepts = _draw(random, np.unique(image_concept_N.numpy()), NUM_IN_MAP)
    similarity = _map(concepts, image_NE, image_concept_N, text_GE, text_concept_G)
    pictured = {*shown_images, *similarity.images, *(image for query in of_texts for image in query.best)}
    thumbnails = {image: _thumbnail(data, image) for image in sorted(pictured)}
    return Sheet(data.split.name, data.split.about, len(keys), texts, tuple(of_texts), tuple(of_images), similarity, thumbnails)


def _queries(
    chosen: Sequence[int], query_QE: Tensor, query_concept_Q: Tensor, item_ME: Tensor, item_concept_M: Tensor
) -> list[Query]:
    """Of the chosen of Q queries, the best of M items."""
    found = []
    for number in chosen:
        similarity_M = item_ME @ query_QE[number]
        is_right_M = item_concept_M == query_concept_Q[number]
        best = similarity_M.topk(min(NUM_BEST, len(item_ME))).indices
        best_match = similarity_M[is_right_M].max()
        before = int((~(similarity_M < best_match) & ~is_right_M).sum())
        cosines = tuple(similarity_M[best].tolist())
        found.append(Query(number, tuple(best.tolist()), cosines, tuple(is_right_M[best].tolist()), before + 1))
    return found


def _map(
    concepts: Sequence[int], image_NE: Tensor, image_concept_N: Tensor, text_GE: Tensor, text_concept_G: Tensor
) -> SimilarityMap:
    """The first image and the first text of each concept."""
    images = [int((image_concept_N == concept).int().argmax()) for concept in concepts]
    texts = [int((text_concept_G == concept).int().argmax()) for concept in concepts]
    cosine_IT = image_NE[images] @ text_GE[texts].T
    is_right_IT = image_concept_N[images, None] == text_concept_G[texts]
    return SimilarityMap(
        tuple(images), tuple(texts), tuple(map(tuple, cosine_IT.tolist())), tuple(map(tuple, is_right_IT.tolist()))
    )


def _draw(random: np.random.Generator, candidates: np.ndarray[tuple[int], np.dtype[np.int64]], number: int) -> list[int]:
    return [int(each) for each in random.choice(candidates, min(number, len(candidates)), replace=False)]


def _thumbnail(data: SplitData, image: int) -> bytes:
    _, pixels_BCHW = data.images(image, image + 1, _THUMBNAIL)
    return to_webp(pixels_BCHW[0])
