"""How near texts are to the images that they were made of, and to the originals, under a dual encoder.

Shapes: B images, N texts, E embedding width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scaleclip.captioning.words import Spread
from scaleclip.data.sample import SampleError
from scaleclip.evaluation.encoder import Encoder
from scaleclip.evaluation.intervals import bootstrap_interval
from scaleclip.evaluation.pixels import centre_square

_EQUAL = 1e-6
"""Cosines this close are equal: it is fp32's rounding."""


class Mean(NamedTuple):
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float


class Subject(NamedTuple):
    """A sample to encode."""

    image: Callable[[], bytes]
    """Reads the encoded image; raises SampleError where there is none."""
    original: str
    """Empty where there is none."""
    texts: Mapping[str, str]
    """Made texts by source, none blank."""


class Cosines(NamedTuple):
    """Of a sample."""

    original: float | None
    """Of image and original text; None without one."""
    new: Mapping[str, float]
    """Of image and made text, by source."""
    texts: Mapping[str, float]
    """Of original and made text, by source."""


class Nearness(NamedTuple):
    """Of a source's texts, over samples that have both."""

    pairs: int
    original: Spread
    """Cosine of image and original text."""
    new: Spread
    """Cosine of image and made text."""
    difference: Mean
    """Of the two cosines, the made text's less the original's."""
    nearer: Mean
    """Share of samples whose made text is nearer to the image."""
    equal: float
    """Share of samples where both are equally near."""
    texts: Spread
    """Cosine of the two texts."""
    cosines: tuple[tuple[float, float], ...]
    """Of original and made text with the image, a pair a sample."""


def cosines(encoder: Encoder, subjects: Sequence[Subject], advance: Callable[[int], None]) -> list[Cosines | str]:
    """Of every subject; the cause of the fault where its image cannot be used.

    Args:
        encoder: the model.
        subjects: samples.
        advance: is told the number of samples done since it was told last.
    """
    found: list[Cosines | str] = []
    with encoder.evaluating():
        for start in range(0, len(subjects), encoder.batch):
            batch = subjects[start : start + encoder.batch]
            images = [_pixels(subject, encoder.size) for subject in batch]
            usable = [(subject, image) for subject, image in zip(batch, images, strict=True) if not isinstance(image, str)]
            measured = iter(_measure(encoder, usable))
            found += [image if isinstance(image, str) else next(measured) for image in images]
            advance(len(batch))
    return found


def nearness(measured: Sequence[tuple[float, float, float]]) -> Nearness | None:
    """Of a source, from the cosines of image and original, of image and made text, and of both texts; None without any."""
    if not measured:
        return None
    original_N, new_N, text_N = torch.tensor(measured, dtype=torch.float64).T
    difference_N = new_N - original_N
    is_nearer_N = difference_N > _EQUAL
    return Nearness(
        pairs=len(measured),
        original=_spread(original_N),
        new=_spread(new_N),
        difference=Mean(float(difference_N.mean()), *bootstrap_interval(difference_N)),
        nearer=Mean(float(is_nearer_N.double().mean()), *bootstrap_interval(is_nearer_N)),
        equal=float((difference_N.abs() <= _EQUAL).double().mean()),
        texts=_spread(text_N),
        cosines=tuple(zip(original_N.tolist(), new_N.tolist(), strict=True)),
    )


def _spread(values_N: Tensor) -> Spread:
    low, middle, high = torch.quantile(values_N, torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    return Spread(float(values_N.mean()), low, middle, high)


def _pixels(subject: Subject, size: int) -> Tensor | str:
    try:
        return centre_square(subject.image(), size)
    except SampleError as error:
        return error.cause


def _measure(encoder: Encoder, batch: Sequence[tuple[Subject, Tensor]]) -> list[Cosines]:
    if not batch:
        return []
    image_BE = encoder.images(torch.stack([pixels for _, pixels in batch]))
    # each text once: equal texts have equal features to the last bit
    distinct = {text: None for subject, _ in batch for text in (subject.original, *subject.texts.values()) if text}
    place = {text: number for number, text in enumerate(distinct)}
    text_NE = encoder.texts(list(distinct)) if distinct else torch.zeros(0, image_BE.shape[1])
    found = []
    for image_E, (subject, _) in zip(image_BE, batch, strict=True):
        vectors = {source: text_NE[place[text]] for source, text in subject.texts.items()}
        new = {source: float(image_E @ text_E) for source, text_E in vectors.items()}
        if subject.original:
            original_E = text_NE[place[subject.original]]
            texts = {source: float(original_E @ text_E) for source, text_E in vectors.items()}
            found.append(Cosines(float(image_E @ original_E), new, texts))
        else:
            found.append(Cosines(None, new, {}))
    return found
