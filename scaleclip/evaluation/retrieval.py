"""Retrieval between images and texts, recall at k both ways, blockwise and over ranks.

Shapes: N images, Q queries, G gallery items, E embedding width, K = len(RANKS). What belongs together has one concept: an image
and its captions, so that an image finds its texts when any of its captions is within k, and a caption its one image. A query
counts as found at k when any match is among its k nearest.
"""

import torch
from torch import Tensor

from scaleclip.evaluation.intervals import bootstrap_interval
from scaleclip.evaluation.over_ranks import encode_over_ranks
from scaleclip.evaluation.results import Figure

_BLOCK = 512
RANKS = (1, 5, 10)


def retrieval_figures(
    name: str, image_NE: Tensor, text_GE: Tensor, image_concept_N: Tensor, text_concept_G: Tensor
) -> list[Figure]:
    """Recall at k of data set `name`, both ways. Every rank calls, with the same features of unit length, and gets all.

    What has no match on the other side, such as a text that no image shows, is in the gallery and is no query. The intervals
    take queries for independent of each other, which several captions of one image are not quite.
    """
    figures = []
    for direction, query, items in (
        ("image -> text", (image_NE, image_concept_N), (text_GE, text_concept_G)),
        ("text -> image", (text_GE, text_concept_G), (image_NE, image_concept_N)),
    ):
        has_match_Q = torch.isin(query[1], items[1])
        query_QE, query_concept_Q = query[0][has_match_Q], query[1][has_match_Q]
        found_QK = found_at_k(query_QE, items[0], query_concept_Q, items[1])
        chance = chance_recall_at_k(query_concept_Q, items[1])
        for column, k in enumerate(RANKS):
            found_Q = found_QK[:, column]
            low, high = bootstrap_interval(found_Q)
            value = int(found_Q.sum()) / len(found_Q)
            figures.append(Figure(name, f"{direction} R@{k}", value, chance[k], low=low, high=high))
    return figures


def found_at_k(query_QE: Tensor, gallery_GE: Tensor, query_concept_Q: Tensor, gallery_concept_G: Tensor) -> Tensor:
    """(Q, K) bool: is an item of the query's concept among the k most similar? Every rank calls with the same and gets all.

    Ties count against the query: an item as similar as the best match is ranked before it. Blocks of 512 queries are dealt
    over the ranks, and are the same for every number of them. A rank holds what it is given and makes at most 512 x G
    similarities at once, with masks: 4 E (Q + G) + 512 x 11 G bytes in all.

    Args:
        query_QE, gallery_GE: fp32 of unit length.
        query_concept_Q, gallery_concept_G: int64; every query's concept is in the gallery.
    """

    def find(start: int, stop: int) -> Tensor:
        similarity = query_QE[start:stop] @ gallery_GE.T
        matches = query_concept_Q[start:stop, None] == gallery_concept_G
        best_match = similarity.masked_fill(~matches, -torch.inf).amax(dim=1, keepdim=True)
        # not "at least as similar": a comparison with NaN is false, and NaN must find nothing
        before = (~(similarity < best_match) & ~matches).sum(dim=1)
        return torch.stack([before < k for k in RANKS], dim=1)

    return torch.cat(encode_over_ranks(len(query_QE), _BLOCK, find))


def chance_recall_at_k(query_concept_Q: Tensor, gallery_concept_G: Tensor) -> dict[int, float]:
    """Expected recall of a random ranking for k in RANKS; concepts count from 0 on."""
    num_items = len(gallery_concept_G)
    num_concepts = int(max(query_concept_Q.max(), gallery_concept_G.max())) + 1
    matches_Q = torch.bincount(gallery_concept_G, minlength=num_concepts)[query_concept_Q].double()
    chances = {}
    for k in RANKS:
        # none of the first k drawn without replacement is a match
        miss_Q = torch.ones_like(matches_Q)
        for drawn in range(min(k, num_items)):
            miss_Q *= ((num_items - matches_Q - drawn) / (num_items - drawn)).clamp(min=0)
        chances[k] = float(1 - miss_Q.mean())
    return chances
