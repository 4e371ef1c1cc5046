"""Which text of a sample is its caption: the policy of a view.

LaCLIP (arXiv:2305.20088) draws uniformly over the original and its rewrites and takes the original where the drawn text has
fewer than two words; Recap-CLIP (arXiv:2406.08478) weighs the original against a recaption; CLIPS (arXiv:2411.16828) takes one
sentence of a long caption.
"""

from bisect import bisect
from collections.abc import Mapping
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from scaleclip.config import ViewConfig
from scaleclip.data.sample import SampleError
from scaleclip.data.sentences import sentences


class Caption(NamedTuple):
    """A chosen text."""

    name: str
    """Which text of the sample it is, or is a part of."""
    text: str
    """Not blank."""


class CaptionPolicy:
    """Chooses the text of a view."""

    def __init__(self, view: ViewConfig) -> None:
        self._view = view
        self._weights = {name: weight for name, weight in view.texts.items() if weight > 0}

    def choose(self, texts: Mapping[str, str], random: np.random.Generator) -> Caption:
        """Draw a text by weight among those that are there and not blank, then the part of it that the view asks for.

        The fallback, which takes the place of a text of fewer than `min_words` words and of one that is not there at all, is
        used whole. Takes two numbers from `random` whatever the texts, so that what is drawn next does not depend on them.

        Raises:
            SampleError: there is no such text and no fallback.
        """
        text_draw, part_draw = random.random(), random.random()
        name = self._draw(texts, text_draw)
        if name is not None and len(texts[name].split()) >= self._view.min_words:
            text = texts[name] if self._view.part == "whole" else _one_of(sentences(texts[name]), part_draw)
            return Caption(name, text)
        fallback = self._view.fallback
        if fallback is not None and _is_there(texts, fallback):
            return Caption(fallback, texts[fallback])
        wanted = ", ".join([*self._weights, *([fallback] if fallback else [])])
        short = f" of at least {self._view.min_words} words" if self._view.min_words > 1 else ""
        raise SampleError("empty_caption", f"there is no text{short} among {wanted}")

    def _draw(self, texts: Mapping[str, str], draw: float) -> str | None:
        names = [name for name in self._weights if _is_there(texts, name)]
        if not names:
            return None
        ends = list(accumulate(self._weights[name] for name in names))
        # without the last end, which a product may round to
        return names[bisect(ends[:-1], draw * ends[-1])]


def _one_of(parts: list[str], draw: float) -> str:
    return parts[int(draw * len(parts))]


def _is_there(texts: Mapping[str, str], name: str) -> bool:
    text = texts.get(name, "")
    return bool(text) and not text.isspace()
