"""The page of a score of made texts, score.html: figures, histograms, advice and a sheet of samples."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from PIL import Image

from scaleclip.captioning.advice import FEWEST_WORDS, RULES
from scaleclip.captioning.plural import number_of
from scaleclip.captioning.reading import ORIGINAL
from scaleclip.captioning.scored import Score, Shown, SourceFigures, faults
from scaleclip.captioning.words import DISTINCT, Spread
from scaleclip.config import DataConfig
from scaleclip.data.sample import SampleError
from scaleclip.data.transform import Crop, open_image
from scaleclip.files import write_atomic
from scaleclip.report.histograms import draw_histograms
from scaleclip.report.picture import to_webp
from scaleclip.report.templates import render

PAGE = "score.html"
_THUMBNAIL = 224  # pixels of the longer side


class ShownText(NamedTuple):
    """A text on a sheet."""

    source: str
    text: str
    fault: str
    """Why it cannot be used, or empty."""
    cosine: float | None
    """With the image."""
    difference: float | None
    """From the original's."""


class Card(NamedTuple):
    """A sample on a sheet."""

    shard: str
    key: str
    thumbnail: bytes | None
    """WebP; None where the image cannot be used."""
    texts: Sequence[ShownText]


def write_score_page(score: Score, folder: Path, name: str) -> Path:
    """Write FOLDER/score.html, which needs no other file and no network; its path.

    Args:
        score: what is shown.
        folder: where it is written.
        name: what was scored, for people.
    """
    page = render(
        "score.html.jinja",
        score=score,
        name=name,
        made=time.strftime("%Y-%m-%d %H:%M %Z"),
        facts=_facts(score),
        rows=_rows([score.original, *score.sources]),
        pictures=draw_histograms(score),
        rules=RULES,
        recipe=recipe(score),
        sheet=[_card(shown) for shown in score.sheet],
        failed=[(source, reason, _card(shown, source)) for source, reason, shown in score.failed],
        faults=faults(score),
        state=_state(score),
        names=[each.name for each in (score.original, *score.sources)],
        number_of=number_of,
    )
    write_atomic(folder / PAGE, page)
    return folder / PAGE


def recipe(score: Score) -> str:
    """The advice as a part of a configuration; empty where no sidecar holds the texts, or none is advised."""
    taken = {name: round(weight, 4) for name, weight in score.advice.weights.items() if name != ORIGINAL}
    if not score.origin.sidecar or not taken:
        return ""
    texts = {"caption": score.against, **{name: f"made:{name}" for name in taken}}
    weights = {"caption": round(score.advice.weights[ORIGINAL], 4), **taken}
    sources = {"NAME": {"sidecars": {"made": score.origin.sidecar}, "texts": texts}}
    views = [{"texts": weights, "min_words": FEWEST_WORDS, "fallback": "caption"}]
    return yaml.safe_dump({"data": {"sources": sources, "views": views}}, sort_keys=False, width=1000, allow_unicode=True)


def _facts(score: Score) -> list[tuple[str, str]]:
    facts = [("samples read", f"{score.samples:,}"), ("shards read", f"{score.shards:,}")]
    facts += [(f"{each.name}: usable", f"{each.usable / max(each.rows, 1):.1%}") for each in score.sources]
    return facts


def _rows(figures: Sequence[SourceFigures]) -> list[tuple[str, list[str]]]:
    """A name and a cell for the originals and every source."""
    reasons = list(dict.fromkeys(reason for each in figures for reason in each.reasons))
    rows = [
        ("texts", [f"{each.rows:,}" for each in figures]),
        ("samples without a text", [f"{each.missing:,}" for each in figures]),
        ("usable", [f"{each.usable / each.rows:.1%}" if each.rows else "" for each in figures]),
        *((f"not usable: {reason}", [f"{each.reasons.get(reason, 0):,}" for each in figures]) for reason in reasons),
        ("words: median (5 to 95 %)", [_spread(each.words) for each in figures]),
        ("characters: median (5 to 95 %)", [_spread(each.characters) for each in figures]),
        ("vocabulary", [f"{each.vocabulary:,}" for each in figures]),
        ("words new to the originals", [_percent(each.growth) for each in figures]),
    ]
    for place, length in enumerate(DISTINCT):
        rows.append((f"distinct-{length}", [f"{each.distinct[place]:.3f}" if each.distinct else "" for each in figures]))
    rows.append(("changed", [_percent(each.changed) for each in figures]))
    rows.append(("words in common: median (5 to 95 %)", [_spread(each.jaccard, 2) for each in figures]))
    return rows


def _spread(found: Spread | None, digits: int = 0) -> str:
    return f"{found.median:,.{digits}f} ({found.p5:,.{digits}f} - {found.p95:,.{digits}f})" if found else ""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _state(score: Score) -> str:
    """A word on what was scored; empty for loose tables, and where nothing tells."""
    origin = score.origin
    if origin.complete is None and not origin.sidecar:
        return ""
    if faults(score):
        return "partial"
    return "complete" if origin.complete else ""


def _card(shown: Shown, only: str | None = None) -> Card:
    """A sample with the texts of all sources, or of one."""
    cosines = shown.cosines
    original = cosines.original if cosines else None
    texts = [ShownText(ORIGINAL, shown.original, shown.fault, original, None)]
    for source, made in shown.texts.items():
        if only is None or source == only:
            cosine = cosines.new.get(source) if cosines else None
            difference = None if cosine is None or original is None else cosine - original
            texts.append(ShownText(source, made.text, made.reason or "", cosine, difference))
    # a tar's names may be no UTF-8
    key = shown.key.encode(errors="replace").decode()
    return Card(shown.shard, key, _thumbnail(shown), texts)


def _thumbnail(shown: Shown) -> bytes | None:
    """All of the image: what a text says may be at its edge."""
    try:
        picture = open_image(shown.image(), DataConfig().max_pixels)
        pixels = picture.decode(Crop(0, 0, picture.height, picture.width, flip=False), _THUMBNAIL)
    except SampleError:
        return None
    small = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return to_webp(torch.from_numpy(np.array(small)).permute(2, 0, 1))
