"""Words of texts, and what is counted of them."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_WIDE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_WIDE}]|[^\\s{_WIDE}]+")
# ellipsis, quotation marks, dashes, the stops and brackets of other scripts
_EDGES = string.punctuation + (
    "\u2026\u2018\u2019\u201a\u201c\u201d\u201e\u00ab\u00bb\u2039\u203a\u2013\u2014\u00b7\u2022\u3001\u3002\uff0c\uff0e\uff01"
    "\uff1f\uff1a\uff1b\uff08\uff09\u300c\u300d\u300e\u300f\u3010\u3011\u0964\u061f\u06d4\u060c"
)
DISTINCT = (1, 2, 3)
"""Lengths of the runs of words whose variety is measured."""


def words(text: str) -> list[str]:
    """The words of a text in lower case: what white space parts, without punctuation at its ends; of Chinese and Japanese each
    character."""
    return [word for part in _WORD.findall(text.casefold()) if (word := part.strip(_EDGES))]


def jaccard(first: Iterable[str], second: Iterable[str]) -> float:
    """Share of the words of either text that are in both; 1 where neither has any."""
    one, other = set(first), set(second)
    return len(one & other) / len(one | other) if one or other else 1.0


class Spread(NamedTuple):
    """How values are spread."""

    mean: float
    p5: float
    median: float
    p95: float


def spread(counts: Counter[int], unit: float = 1.0) -> Spread | None:
    """Of values by how often each came, in multiples of `unit`; None without any."""
    total = counts.total()
    if not total:
        return None
    values = sorted(counts.items())
    places = [int(share * (total - 1)) for share in (0.05, 0.5, 0.95)]  # of the lower value where two are as good
    found, seen = list[float](), 0
    for value, count in values:
        seen += count
        while len(found) < len(places) and places[len(found)] < seen:
            found.append(round(value * unit, 6))
    return Spread(sum(value * count for value, count in values) / total * unit, *found)


def vocabulary(texts: Iterable[Sequence[str]]) -> set[str]:
    """The different words of texts."""
    return {word for text in texts for word in text}


def distinct(texts: Iterable[Sequence[str]], num_words: int) -> tuple[float, ...]:
    """Different runs of n words as a share of all (distinct-n; arXiv:1510.03055), n in `DISTINCT`, of the first `num_words`.

    A text's runs stay within it. The share falls with the number of words, so that only figures of as many can be compared.
    """
    seen: list[set[tuple[str, ...]]] = [set() for _ in DISTINCT]
    total, left = [0] * len(DISTINCT), num_words
    for text in texts:
        some = text[:left]
        left -= len(some)
        for place, length in enumerate(DISTINCT):
            runs = [tuple(some[start : start + length]) for start in range(len(some) - length + 1)]
            seen[place].update(runs)
            total[place] += len(runs)
        if not left:
            break
    return tuple(len(runs) / max(count, 1) for runs, count in zip(seen, total, strict=True))
