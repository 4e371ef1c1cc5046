"""What made texts are worth: by figures of their own, against the originals, and under a dual encoder."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from scaleclip.captioning.advice import Judged, advise
from scaleclip.captioning.made_texts import MadeTexts
from scaleclip.captioning.nearness import Cosines, Nearness, Subject, cosines, nearness
from scaleclip.captioning.plural import number_of
from scaleclip.captioning.reading import ORIGINAL, Counts, Pass, Seen, Show, Wanted
from scaleclip.captioning.scored import Score, Shown, SourceFigures
from scaleclip.captioning.words import distinct, spread, vocabulary, words
from scaleclip.data.sample import SampleError
from scaleclip.errors import ConfigError
from scaleclip.evaluation.encoder import Encoder

DISTINCT_OF = 1000
"""Fewest words of a source's sample of which distinct-n says something."""
_HUNDREDTH = 0.01
_Found = Mapping[tuple[int, int], Cosines | str]
"""By shard and ordinal: cosines, or why there are none."""


def score(made: MadeTexts, wanted: Wanted, encoder: Encoder | None, model: str, show: Show) -> Score:
    """Score texts against the samples that they were made of.

    Args:
        made: the texts.
        wanted: the samples, and what of them.
        encoder: for cosines, or none.
        model: what the user calls it, or empty.
        show: is told how far it is.

    Raises:
        ConfigError: none of the texts is of one of the samples, or a file's are of another shard of the same name; no sample
            has an original, or, with an encoder, an image that can be used.
        RunError: a file of texts is damaged.
    """
    passed = Pass(made, wanted._replace(needs_image=encoder is not None), show)
    passed.run()
    sheet, paired = passed.sheet.items(), passed.paired.items() if encoder else []
    failed = [(*named, seen) for named, each in sorted(passed.failed.items()) for seen in each.items()]
    found = _encode(encoder, wanted, [*paired, *sheet, *(seen for *_, seen in failed)], show) if encoder else {}
    bad_images = _faults(found[seen.shard, seen.ordinal] for seen in paired)
    if paired and sum(bad_images.values()) == len(paired):
        raise ConfigError(_no_images(wanted, paired, bad_images))
    near = {name: nearness(_cosines_of(name, paired, found)) for name in passed.sources} if encoder else {}
    figures = _figures(passed, near)
    judged = {
        each.name: Judged(
            each.usable / max(each.rows + each.missing, 1),
            each.changed,
            each.nearness,
            each.jaccard.median if each.jaccard else None,
        )
        for each in figures.sources
    }

    def shown(seen: Seen) -> Shown:
        measured = found.get((seen.shard, seen.ordinal))
        of_both = None if isinstance(measured, str) else measured
        shard = wanted.manifest.names[seen.shard]
        return Shown(shard, seen.key, partial(_image, wanted, seen), seen.original, seen.fault, seen.texts, of_both)

    return Score(
        origin=made.origin,
        against=wanted.against,
        shards=passed.shards,
        missing_shards=passed.missing_shards,
        unreadable_shards=dict(passed.unreadable_shards),
        samples=passed.samples,
        unknown_rows=passed.unknown_rows,
        bad_samples=dict(passed.bad_samples.most_common()),
        seed=wanted.seed,
        limit=wanted.limit,
        model=model,
        model_samples=len(paired),
        bad_images=bad_images,
        **figures._asdict(),
        advice=advise(made.origin.task, judged, ORIGINAL, passed.available, had_model=encoder is not None),
        sheet=[shown(seen) for seen in sheet],
        failed=[(source, reason, shown(seen)) for source, reason, seen in failed],
    )


class _Texts(NamedTuple):
    sampled: int
    num_words: int
    original: SourceFigures
    sources: list[SourceFigures]


def _figures(passed: Pass, near: Mapping[str, Nearness | None]) -> _Texts:
    drawn = passed.drawn.items()
    texts = {name: _words_of(name, drawn) for name in passed.sources}
    texts[ORIGINAL] = [words(seen.original) for seen in drawn if seen.original]
    totals = {name: sum(map(len, some)) for name, some in texts.items()}
    # of as many words of each, since distinct-n falls with their number; a source of a few words would decide for all
    num_words = min((total for total in totals.values() if total >= DISTINCT_OF), default=0)
    originals = vocabulary(texts[ORIGINAL])

    def of(name: str, counts: Counts) -> SourceFigures:
        own = vocabulary(texts[name])
        return SourceFigures(
            name=name,
            rows=counts.rows,
            missing=passed.samples - counts.rows,
            usable=counts.usable,
            reasons=dict(counts.reasons.most_common()),
            words=spread(counts.words),
            characters=spread(counts.characters),
            vocabulary=len(own),
            growth=len(own - originals) / len(originals) if originals and name != ORIGINAL else None,
            distinct=distinct(texts[name], num_words) if totals[name] >= DISTINCT_OF else (),
            changed=counts.changed / counts.pairs if counts.pairs else None,
            jaccard=spread(counts.hundredths, _HUNDREDTH),
            nearness=near.get(name),
            word_counts=counts.words,
        )

    of_sources = [of(name, counts) for name, counts in passed.sources.items()]
    return _Texts(len(drawn), num_words, of(ORIGINAL, passed.original), of_sources)


def _words_of(source: str, drawn: Sequence[Seen]) -> list[list[str]]:
    made = [seen.texts[source] for seen in drawn if source in seen.texts]
    return [words(each.text) for each in made if each.reason is None]


def _encode(encoder: Encoder, wanted: Wanted, some: Sequence[Seen], show: Show) -> _Found:
    # a shard's samples follow each other
    samples = dict(sorted({(seen.shard, seen.ordinal): seen for seen in some}.items()))
    done = 0

    def advance(number: int) -> None:
        nonlocal done
        done += number
        show("encoding", done, len(samples))

    subjects = [_subject(wanted, seen) for seen in samples.values()]
    return dict(zip(samples, cosines(encoder, subjects, advance), strict=True))


def _subject(wanted: Wanted, seen: Seen) -> Subject:
    texts = {source: made.text for source, made in seen.texts.items() if made.text and not made.text.isspace()}
    return Subject(partial(_image, wanted, seen), seen.original, texts)


def _image(wanted: Wanted, seen: Seen) -> bytes:
    return wanted.reader(seen.shard, seen.ordinal).image(wanted.image_members)


def _no_images(wanted: Wanted, paired: Sequence[Seen], causes: Mapping[str, int]) -> str:
    counts = ", ".join(f"{cause}: {count:,}" for cause, count in causes.items())
    detail = ""
    try:
        _image(wanted, paired[0])
    except SampleError as error:
        detail = f"; {error.detail}"
    return (
        f"--image={', '.join(wanted.image_members)}: none of the {number_of(len(paired), 'sample')} drawn for --model has an "
        f"image that can be used ({counts}{detail}): name the image, or leave --model out to look at the texts alone"
    )


def _cosines_of(source: str, paired: Sequence[Seen], found: _Found) -> list[tuple[float, float, float]]:
    """Of samples whose original and text are fit for training: with the image, and of both."""
    rows = []
    for seen in paired:
        measured, made = found[seen.shard, seen.ordinal], seen.texts.get(source)
        is_fit = made is not None and made.reason is None
        if is_fit and not isinstance(measured, str) and measured.original is not None and source in measured.new:
            rows.append((measured.original, measured.new[source], measured.texts[source]))
    return rows


def _faults(found: Iterable[Cosines | str]) -> dict[str, int]:
    return dict(Counter(each for each in found if isinstance(each, str)).most_common())
