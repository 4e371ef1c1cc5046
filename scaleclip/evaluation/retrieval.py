"""Retrieval between images and a gallery of texts, recall at k both ways, blockwise.

Shapes: Q queries, G gallery items, E embedding width. A query counts as found at k when any match is among its k nearest.
"""

import torch
from torch import Tensor

_BLOCK = 4096
RANKS = (1, 5, 10)


def recall_at_k(query_QE: Tensor, gallery_GE: Tensor, query_concept_Q: Tensor, gallery_concept_G: Tensor) -> dict[int, float]:
    """Share of queries with an item of their concept among the k most similar, for k in RANKS.

    Ties count against the query: an item as similar as the best match is ranked before it. (Q, E) and (G, E) unit vectors,
    (Q,) and (G,) int64 concepts; every query's concept is in the gallery. Never more than 4096 x G similarities at once.
    """
    hits = torch.zeros(len(RANKS), dtype=torch.int64)
    for start in range(0, len(query_QE), _BLOCK):
        similarity = query_QE[start : start + _BLOCK] @ gallery_GE.T
        matches = query_concept_Q[start : start + _BLOCK, None] == gallery_concept_G
        best_match = similarity.masked_fill(~matches, -torch.inf).amax(dim=1, keepdim=True)
        # not "at least as similar": a comparison with NaN is false, and NaN must find nothing
        before = (~(similarity < best_match) & ~matches).sum(dim=1)
        hits += torch.stack([(before < k).sum() for k in RANKS])
    return {k: float(hits[i]) / len(query_QE) for i, k in enumerate(RANKS)}


def chance_recall_at_k(query_concept_Q: Tensor, gallery_concept_G: Tensor) -> dict[int, float]:
    """Expected `recall_at_k` of a random ranking."""
    num_items = len(gallery_concept_G)
    matches_Q = torch.stack([(gallery_concept_G == concept).sum() for concept in query_concept_Q]).double()
    chances = {}
    for k in RANKS:
        # none of the first k drawn without replacement is a match
        miss_Q = torch.ones_like(matches_Q)
        for drawn in range(min(k, num_items)):
            miss_Q *= ((num_items - matches_Q - drawn) / (num_items - drawn)).clamp(min=0)
        chances[k] = float(1 - miss_Q.mean())
    return chances
