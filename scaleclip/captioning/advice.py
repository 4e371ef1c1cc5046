"""How to mix made texts with the originals: a few rules over what was measured, with the papers' values. It is advice.

LaCLIP (arXiv:2305.20088) draws uniformly from the original and its rewrites. Recap-CLIP (arXiv:2406.08478) takes the original
with probability p, 0.8 in its ablations and 0.6 with a larger text tower, else the recaption.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scaleclip.captioning.nearness import Nearness
from scaleclip.captioning.plural import number_of

FEWEST_USABLE, FEWEST_CHANGED, FEWEST_NEARER = 0.5, 0.1, 0.25
FEWEST_WORDS = 2
"""A drawn text of fewer gives its place to the original (LaCLIP)."""
FEWEST_COMMON = 0.05
"""A text with fewer of its words in common with its original may be of anything."""
REWRITE, RECAPTION = "rewrite", "recaption"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


RULES = (
    f"A source is left out where fewer than {_percent(FEWEST_USABLE)} of the samples have a text of it that can be used, or "
    f"fewer than {_percent(FEWEST_CHANGED)} of its texts differ from their originals.",
    f"With a model: also where the 95 % interval of the share of texts that are nearer to their image than the originals lies "
    f"below {_percent(FEWEST_NEARER)}.",
    f"A source half of whose texts have less than {_percent(FEWEST_COMMON)} of the words in common with their originals gets a "
    "remark, unless a model finds more than half of its texts nearer to their image than the originals.",
    "Rewrites that are left share the draws evenly with the original, as LaCLIP does (arXiv:2305.20088).",
    "Recaptions get 0.2 of the draws, as in the ablations of Recap-CLIP (arXiv:2406.08478: p = 0.8 for the original); 0.4 "
    "where that interval lies above 50 % (p = 0.6, the paper's best with a larger text tower).",
    "The limits are rules of thumb that no experiment chose. Train both ways on a part of the data before you rely on them.",
)


class Judged(NamedTuple):
    """What is known of a source."""

    usable: float
    """Share of samples that have a text of it which can be used."""
    changed: float | None
    """Share of its usable texts that differ from their originals; None without pairs."""
    nearness: Nearness | None
    """None without a model."""
    common: float | None = None
    """Median share of the words that a text and its original have in common; None without pairs."""


class Available(NamedTuple):
    """Which texts a sample has."""

    usable: frozenset[str]
    """Names of those that can be used, the original included."""
    short: frozenset[str]
    """Of these, those of fewer than `FEWEST_WORDS` words."""


class Advice(NamedTuple):
    """How to draw."""

    weights: Mapping[str, float]
    """Share of the draws by source, the original's included; they add up to 1."""
    effective: Mapping[str, float]
    """Share of the samples that get each: where a text cannot be used the others share its draws, and the original takes the
    place of one that is too short."""
    said: Sequence[str]
    """Why, a sentence a source, and what was not looked at."""


def advise(
    task: str, sources: Mapping[str, Judged], original: str, samples: Mapping[Available, int], *, had_model: bool = False
) -> Advice:
    """Weights for a view.

    Args:
        task: `rewrite`, `recaption`, or something else, which is taken for rewrites.
        sources: what is known of each.
        original: what the original is called.
        samples: how many have which texts.
        had_model: whether a model was given.
    """
    said, kept = list[str](), list[str]()
    for name, judged in sources.items():
        fault = _fault(judged)
        said.append(f"{name}: left out, {fault}." if fault else f"{name}: taken{_remark(judged)}.")
        kept += [] if fault else [name]
    if task == RECAPTION:
        weights = {name: (0.4 if _is_nearer(sources[name].nearness) else 0.2) / len(kept) for name in kept}
    else:
        weights = {name: 1 / (len(kept) + 1) for name in kept}
    weights = {original: 1 - sum(weights.values()), **weights}
    if task not in (REWRITE, RECAPTION):
        said.append("Nothing says what task made these texts: they are taken for rewrites.")
    lacking = sum(count for available, count in samples.items() if original not in available.usable)
    if lacking:
        have = "has" if lacking == 1 else "have"
        said.append(
            f"{lacking:,} of {number_of(sum(samples.values()), 'sample')} {have} no original that can be used: "
            f"there the other texts get its draws."
        )
    if not any(judged.nearness for judged in sources.values()):
        said.append(
            "The model compared nothing: no sample has an original, a text and an image that can be used."
            if had_model
            else "No model looked at the images: this rests on the texts alone. Give --model."
        )
    return Advice(weights, _shares(weights, original, samples), said)


def _shares(weights: Mapping[str, float], original: str, samples: Mapping[Available, int]) -> dict[str, float]:
    shares = dict.fromkeys(weights, 0.0)
    total = sum(samples.values())
    for available, count in samples.items():
        there = {name: weight for name, weight in weights.items() if name in available.usable}
        for name, weight in there.items():
            used = original if name in available.short and original in available.usable else name
            # too short, and nothing in its place: training counts the sample as invalid
            if used not in available.short or used == original:
                shares[used] += count / total * weight / sum(there.values())
    return shares


def _fault(judged: Judged) -> str:
    if judged.usable < FEWEST_USABLE:
        return f"{judged.usable:.1%} of samples have a text of it that can be used"
    if judged.changed is not None and judged.changed < FEWEST_CHANGED:
        return f"{judged.changed:.1%} of its texts differ from their originals"
    if judged.nearness and judged.nearness.nearer.high < FEWEST_NEARER:
        return f"{judged.nearness.nearer.value:.1%} of its texts are nearer to their image than the original"
    return ""


def _remark(judged: Judged) -> str:
    if judged.common is None or judged.common >= FEWEST_COMMON or _is_nearer(judged.nearness):
        return ""
    seen = "the model does not find most of them nearer to their images" if judged.nearness else "no model saw the images"
    way_out = "look at the samples" if judged.nearness else "look at the samples, or give --model"
    return (
        f", but half of its texts have less than {_percent(FEWEST_COMMON)} of the words in common with their originals, and "
        f"{seen}: they may be of other pictures, or in another language; {way_out}"
    )


def _is_nearer(nearness: Nearness | None) -> bool:
    return nearness is not None and nearness.nearer.low > 0.5
