"""What an evaluation is."""

from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Protocol

from scaleclip.evaluation.encoder import Encoder
from scaleclip.evaluation.results import Figure


class Evaluation(Protocol):
    """What is measured of a model on opened data."""

    @property
    def name(self) -> str:
        """What it is called among others, for files and people."""

    @property
    def num_items(self) -> int:
        """Images, or texts, that are measured on: ranks that see another number do not see the same data."""

    @property
    def place(self) -> str:
        """Task, options and paths: of two evaluations with the same, one is enough."""

    @property
    def definition(self) -> str:
        """What decides its figures, but for the model: equal ones need not be measured again. Every file is looked at."""

    def run(self, encoder: Encoder, features: Path | None = None) -> list[Figure]:
        """Its figures. Every rank calls, between `Encoder.evaluating`.

        Args:
            encoder: the model.
            features: folder where what was encoded may be kept for a start after a crash; none: nowhere.

        Raises:
            RunError: something in the data cannot be used.
        """


def distinct(figures: Sequence[Figure]) -> list[Figure]:
    """The figures, those of a further data set of the same name, which measures the same, under `NAME (2)`."""
    numbers = occurrences([(figure.split, figure.metric) for figure in figures])
    return [
        figure if number == 1 else figure._replace(split=f"{figure.split} ({number})")
        for figure, number in zip(figures, numbers, strict=True)
    ]


def occurrences(keys: Sequence[Hashable]) -> list[int]:
    """The how many-th of its kind each key is, from 1 on."""
    seen: Counter[Hashable] = Counter()
    numbers = []
    for key in keys:
        seen[key] += 1
        numbers.append(seen[key])
    return numbers
