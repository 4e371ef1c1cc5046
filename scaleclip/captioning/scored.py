"""The figures of made texts: what a score holds, and how it is written."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from scaleclip.captioning.advice import RULES, Advice
from scaleclip.captioning.made_texts import MadeText, Origin
from scaleclip.captioning.nearness import Cosines, Nearness
from scaleclip.captioning.plural import number_of
from scaleclip.captioning.reading import MISSING_SAMPLE
from scaleclip.captioning.words import DISTINCT, Spread


class SourceFigures(NamedTuple):
    """Of the texts of a source, or of the originals."""

    name: str
    rows: int
    """Texts, or faults in their place."""
    missing: int
    """Samples without a row."""
    usable: int
    """Texts that training would use."""
    reasons: Mapping[str, int]
    """The others, by reason, most of them first."""
    words: Spread | None
    """Of the usable texts, as all that follows."""
    characters: Spread | None
    vocabulary: int
    """Different words, of the sample."""
    growth: float | None
    """Words of the sample's texts that no original of it has, as a share of the originals' vocabulary."""
    distinct: tuple[float, ...]
    """Distinct-n for n in words.DISTINCT, of the sample; none where it has too few words."""
    changed: float | None
    """Share of texts whose words are not their original's."""
    jaccard: Spread | None
    """Share of words in common with the original."""
    nearness: Nearness | None
    word_counts: Mapping[int, int]
    """Texts by number of words."""


class Shown(NamedTuple):
    """A sample of a sheet."""

    shard: str
    """As the manifest names it."""
    key: str
    image: Callable[[], bytes]
    """Reads the encoded image; raises SampleError where there is none."""
    original: str
    fault: str
    """Why there is no original, or empty."""
    texts: Mapping[str, MadeText]
    cosines: Cosines | None


class Score(NamedTuple):
    """All that was found."""

    origin: Origin
    against: str
    """Where the originals lie in the samples."""
    shards: int
    """That were read."""
    missing_shards: int
    """Whose texts are not there."""
    unreadable_shards: Mapping[str, int]
    """Shards that could not be read, by cause."""
    samples: int
    """That were read."""
    unknown_rows: int
    """Rows whose key is none of their shard's."""
    bad_samples: Mapping[str, int]
    """Samples or their texts that could not be read, by cause."""
    seed: int
    limit: int | None
    sampled: int
    """Samples of which vocabulary and distinct-n are."""
    num_words: int
    """Words of each source that distinct-n is of; 0 where every source has too few."""
    model: str
    """Under which cosines are; empty for none."""
    model_samples: int
    """Samples drawn for cosines."""
    bad_images: Mapping[str, int]
    """Of those, images that could not be used, by cause."""
    original: SourceFigures
    sources: Sequence[SourceFigures]
    advice: Advice
    sheet: Sequence[Shown]
    failed: Sequence[tuple[str, str, Shown]]
    """Texts that cannot be used: source, reason, sample."""


def faults(score: Score) -> list[str]:
    """What was met that should not be, a line each."""
    origin = score.origin
    looked_at = score.shards + score.missing_shards + sum(score.unreadable_shards.values())
    # a sample that its shard lacks is one of the bad ones
    without = {cause: count for cause, count in score.original.reasons.items() if cause != MISSING_SAMPLE}
    said = list[str]()
    if score.missing_shards:
        why = ": the job is not complete" if origin.complete is False else ""
        have = "has" if score.missing_shards == 1 else "have"
        said.append(f"{score.missing_shards:,} of {number_of(looked_at, 'shard')} {have} no texts{why}")
    elif origin.complete is False:
        said.append("the job is not complete, though these shards have their texts")
    if score.unknown_rows:
        said.append(f"{number_of(score.unknown_rows, 'row')} with a key that no sample has")
    if origin.repeated_rows:
        said.append(f"{number_of(origin.repeated_rows, 'row')} with a key seen before, left out: the first row of a key counts")
    if origin.shared_rows:
        samples = number_of(origin.shared_rows, "sample")
        said.append(
            f"{samples} with the key of another, and its text: keys must name one sample, or texts are of other pictures"
        )
    said += [f"{number_of(count, 'shard')} that cannot be read: {cause}" for cause, count in score.unreadable_shards.items()]
    said += [f"{number_of(count, 'sample')} whose texts cannot be read: {cause}" for cause, count in score.bad_samples.items()]
    said += [
        f"{number_of(count, 'sample')} without an original at {score.against}: {cause}" for cause, count in without.items()
    ]
    said += [
        f"{number_of(count, 'image')} that cannot be used, of those encoded: {cause}"
        for cause, count in score.bad_images.items()
    ]
    return said


def as_json(score: Score) -> dict[str, Any]:
    """Every figure, for score.json; what was not measured is null."""
    plain = score._asdict()
    for name in ("sheet", "failed"):
        del plain[name]
    plain["origin"] = score.origin._asdict()
    plain["original"] = _figures_json(score.original)
    plain["sources"] = [_figures_json(each) for each in score.sources]
    plain["advice"] = {**score.advice._asdict(), "rules": RULES}
    return plain


def _figures_json(figures: SourceFigures) -> dict[str, Any]:
    plain = figures._asdict()
    for name in ("words", "characters", "jaccard"):
        plain[name] = plain[name] and plain[name]._asdict()
    plain["distinct"] = dict(zip(map(str, DISTINCT), figures.distinct, strict=False))
    plain["word_counts"] = {str(number): count for number, count in sorted(figures.word_counts.items())}
    if figures.nearness:
        near = figures.nearness._asdict()
        del near["cosines"]
        plain["nearness"] = near | {name: near[name]._asdict() for name in ("original", "new", "difference", "nearer", "texts")}
    return plain
