"""Histograms of made texts beside their originals."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from scaleclip.captioning.scored import Score, SourceFigures
from scaleclip.report.picture import COLOURS, FAINT, INK, Picture, clean, to_picture

Floats = NDArray[np.float64]
_BINS = 40
_STEPS = (1, 2, 5, 10)  # between ticks, whole per cents
_TAIL = 0.99
"""Share of the texts that a picture of lengths reaches to."""
_ORIGINALS = COLOURS[6]


def draw_histograms(score: Score) -> list[Picture]:
    """Words in a text; under a model, for every source, cosines with the image of the originals and of the made texts."""
    pictures = [_draw_words([score.original, *score.sources])]
    for number, source in enumerate(score.sources):
        if source.nearness:
            pictures.append(_draw_cosines(source, np.array(source.nearness.cosines), COLOURS[number % 6]))
    return pictures


def _draw_words(figures: Sequence[SourceFigures]) -> Picture:
    with_texts = [each for each in figures if each.word_counts]
    last = max((_quantile(each.word_counts, _TAIL) for each in with_texts), default=1)
    width = max(1, -(-(last + 1) // _BINS))
    # the last one takes what is longer
    edges = np.arange(-0.5, last + 1 + width, width)
    figure = Figure((3.6, 2.4), layout="constrained")
    axes = figure.subplots()
    for number, each in enumerate(with_texts):
        lengths, counts = np.array(list(each.word_counts)), np.array(list(each.word_counts.values()))
        shares = np.histogram(np.minimum(lengths, edges[-1] - 0.5), edges, weights=counts)[0] / counts.sum()
        is_original = each is figures[0]
        _stairs(axes, shares, edges, _ORIGINALS if is_original else COLOURS[(number - 1) % 6], each.name, is_original)
    _finish(axes, "words")
    said = ", ".join(f"{each.name} {each.words.median:,.0f}" for each in with_texts if each.words)
    return to_picture("words", "Words in a text", f"Share of texts by their number of words; medians: {said}", figure)


def _draw_cosines(source: SourceFigures, cosines: Floats, colour: str) -> Picture:
    edges = np.histogram_bin_edges(cosines, _BINS)
    figure = Figure((3.6, 2.4), layout="constrained")
    axes = figure.subplots()
    for column, (label, paint) in enumerate((("original", _ORIGINALS), (source.name, colour))):
        shares = np.histogram(cosines[:, column], edges)[0] / len(cosines)
        _stairs(axes, shares, edges, paint, label, column == 0)
        axes.axvline(cosines[:, column].mean(), color=paint, linewidth=1, linestyle=(0, (3, 2)))
    _finish(axes, "cosine of image and text")
    means = cosines.mean(axis=0)
    alt = (
        f"Cosines of {len(cosines):,} images with the original text, mean {means[0]:.3f}, and with that of {source.name}, mean "
        f"{means[1]:.3f}"
    )
    return to_picture(f"cosine_{source.name}", f"{source.name}: cosine with the image", alt, figure)


def _stairs(axes: Axes, shares: Floats, edges: Floats, colour: str, label: str, is_original: bool) -> None:
    if is_original:
        axes.stairs(shares, edges, color=colour, alpha=0.25, fill=True)
    axes.stairs(shares, edges, color=colour, linewidth=1.4, label=label)


def _finish(axes: Axes, what: str) -> None:
    clean(axes)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    axes.set_xlabel(what, fontsize=9, color=FAINT)
    axes.set_ylabel("texts", fontsize=9, color=FAINT)
    axes.legend(fontsize=8, framealpha=0.85, edgecolor="none", loc="best", labelcolor=INK, handlelength=1.4)


def _quantile(counts: Mapping[int, int], share: float) -> int:
    values = np.array(sorted(counts))
    seen = np.cumsum([counts[int(value)] for value in values])
    return int(values[np.searchsorted(seen, share * seen[-1])])
