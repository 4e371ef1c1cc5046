"""Triplets of texts from the pictures that a model trains on: a name, its keywords, and seven other names of its kind."""

import random
from collections import defaultdict
from collections.abc import Iterable

from demo_data.pictures import Picture
from demo_data.splits import SEED

NUM_NEGATIVES = 7


def text_triplets(pictures: Iterable[Picture]) -> list[dict[str, str | list[str]]]:
    """A row for every concept that has keywords, in a fixed order.

    Negatives are names of other concepts of its subgroup; where there are too few, of its group, and then of any.
    """
    by_concept = {
        picture.concept: picture for picture in sorted(pictures, key=lambda each: (each.path, each.source)) if picture.keywords
    }
    kinds: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for concept in sorted(by_concept):
        for kind in _kinds(by_concept[concept]):
            kinds[kind].append(concept)
    rows: list[dict[str, str | list[str]]] = []
    for concept in sorted(by_concept):
        picture, draw = by_concept[concept], random.Random(f"{SEED} {concept}")
        chosen: dict[str, None] = {}
        for kind in _kinds(picture):
            others = [by_concept[other].name for other in kinds[kind]]
            others = [name for name in others if name not in chosen and name.lower() != picture.name.lower()]
            chosen |= dict.fromkeys(draw.sample(others, min(len(others), NUM_NEGATIVES - len(chosen))))
        rows.append({"name": picture.name, "keywords": picture.keywords, "negatives": list(chosen)})
    return rows


def _kinds(picture: Picture) -> list[tuple[str, ...]]:
    """The narrowest first."""
    return [(picture.group, picture.subgroup), (picture.group,), ()]
