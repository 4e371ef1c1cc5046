"""One pass over the samples and the texts that were made of them: counters, and a seeded sample for what counters cannot say.

Memory holds these and one shard's texts, however many shards there are.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from scaleclip.captioning.advice import FEWEST_WORDS, Available
from scaleclip.captioning.drawing import Drawn
from scaleclip.captioning.made_texts import MadeText, MadeTexts, ShardTexts
from scaleclip.captioning.plural import number_of
from scaleclip.captioning.words import jaccard, words
from scaleclip.data.manifest import Manifest
from scaleclip.data.sample import Sample, SampleError
from scaleclip.data.source import Reader
from scaleclip.data.texts import MAX_CHARACTERS, parse_location
from scaleclip.errors import ConfigError

ORIGINAL = "original"
"""What the texts that others were made of are called."""
NUM_SHOWN, NUM_FAILED_SHOWN = 12, 3
"""Samples on the sheet, and texts of each source and reason."""
WORDS_OF = 10_000
"""Samples whose texts are held, for vocabularies and distinct-n."""
_NO_TEXT = "empty_caption"  # as training calls it
MISSING_SAMPLE = "missing_sample"
"""Cause of the fault of a sample that the manifest counts and its shard does not have."""
_LOOKED_AT, _MOST_NAMES = 100, 12
"""Samples that are looked at for texts by other names, and names that an error tells."""

Show = Callable[[str, int, int], None]
"""(what is done, samples done, samples in all)"""


class Wanted(NamedTuple):
    """What to score."""

    manifest: Manifest
    reader: Reader
    against: str
    """Where the original text of a sample lies: `txt`, `json:a.b`."""
    image_members: Sequence[str]
    """Names that an image may have in a sample."""
    limit: int | None = None
    """Samples read at most; their shards are drawn then. None: all."""
    pairs: int = 2048
    """Samples whose cosines are measured."""
    seed: int = 0
    """Of all draws."""
    needs_original: bool = True
    """Whether it is an error that no sample has an original."""
    needs_image: bool = False
    """Whether it is an error that no sample has an image."""


class Seen(NamedTuple):
    """A sample that was drawn."""

    shard: int
    ordinal: int
    key: str
    original: str
    fault: str
    texts: Mapping[str, MadeText]


class Counts:
    """What is counted of a source as its texts pass by."""

    def __init__(self) -> None:
        self.rows = self.usable = self.pairs = self.changed = 0
        self.reasons, self.words, self.characters, self.hundredths = (Counter[Any]() for _ in range(4))

    def add(self, text: str, reason: str | None) -> list[str]:
        """Words of a usable text, else none."""
        self.rows += 1
        if reason is not None:
            self.reasons[reason] += 1
            return []
        found = words(text)
        self.usable += 1
        self.words[len(found)] += 1
        self.characters[len(text)] += 1
        return found

    def add_pair(self, original: Sequence[str], new: Sequence[str]) -> None:
        self.pairs += 1
        self.changed += original != new
        self.hundredths[round(100 * jaccard(original, new))] += 1


class Pass:
    """One pass over all shards.

    Args:
        made: the texts.
        wanted: the samples, and what of them.
        show: is told how far it is.

    Raises:
        ConfigError: `wanted.against` is malformed.
    """

    def __init__(self, made: MadeTexts, wanted: Wanted, show: Show) -> None:
        self._made, self._wanted, self._show = made, wanted, show
        self._find_original = parse_location("--against-text", wanted.against, {})
        self._counts: defaultdict[str, Counts] = defaultdict(Counts)
        self.original = Counts()
        self.samples = self.shards = self.missing_shards = self._read = self._images = 0
        self._members, self._places = dict[str, None](), dict[str, None]()
        self.unknown_rows = made.origin.unknown_rows
        self.unreadable_shards, self.bad_samples = Counter[str](), Counter[str]()
        self.available = Counter[Available]()
        """Samples by the texts that they have."""
        self.drawn, self.paired, self.sheet = (Drawn[Seen](most, wanted.seed) for most in (WORDS_OF, wanted.pairs, NUM_SHOWN))
        """For words; with a text and an original that are fit for training; to be shown."""
        self.failed: defaultdict[tuple[str, str], Drawn[Seen]] = defaultdict(lambda: Drawn(NUM_FAILED_SHOWN, wanted.seed))
        """By source and reason."""

    @property
    def sources(self) -> dict[str, Counts]:
        """What is counted of each that was met, by name."""
        return dict(sorted(self._counts.items()))

    def run(self) -> None:
        """Read all that is wanted.

        Raises:
            ConfigError: none of the texts is of one of the samples; no sample has an original or an image, and it is needed.
            RunError: a file of texts is damaged.
        """
        manifest, limit = self._wanted.manifest, self._wanted.limit
        total = manifest.num_samples if limit is None else min(limit, manifest.num_samples)
        shards = np.arange(len(manifest.shards))
        if limit is not None:
            np.random.default_rng(self._wanted.seed).shuffle(shards)
        example = ""
        for shard in shards.tolist():
            left = total - self.samples
            if left <= 0:
                break
            texts = self._made.open(shard)
            if texts is None:
                self.missing_shards += 1
                continue
            try:
                keys = self._wanted.reader.keys(shard)
            except SampleError as error:
                self.unreadable_shards[error.cause] += 1
                continue
            self.shards += 1
            self.unknown_rows += texts.num_unknown(keys)
            example = example or (f"{manifest.names[shard]} has {keys[0]!r}" if keys else "")
            for index in range(min(left, int(manifest.counts[shard]))):
                self._add(shard, manifest.ordinal(shard, index), keys, texts)
                if not self.samples % 256:
                    self._show("reading", self.samples, total)
            if ORIGINAL in self._counts:
                raise ConfigError(f"a source is called {ORIGINAL!r}, as the texts that it was made of are: rename it")
            # a name that nothing has should not cost a pass over all
            if self.samples >= WORDS_OF:
                self._check_names()
        self._show("reading", self.samples, total)
        if not self._counts:
            faults = self.unreadable_shards + self.bad_samples
            seen = [*([example] if example else []), *(f"{cause}: {count:,}" for cause, count in faults.items())]
            raise ConfigError(
                f"none of the texts is of a sample of --data: {number_of(self.unknown_rows, 'row has', 'rows have')} "
                f"other keys than the {number_of(self.samples, 'sample')} read ({', '.join(seen)}): give --data as the "
                f"texts' job had it"
            )
        self._check_names()

    def _check_names(self) -> None:
        """Raise ConfigError where what the user named is in no sample."""
        wanted, read = self._wanted, number_of(self.samples, "sample")
        if wanted.needs_original and not self.original.usable:
            causes = ", ".join(f"{cause}: {count:,}" for cause, count in self.original.reasons.most_common())
            there = f"their texts are {_listed(self._places)}" if self._places else "they have no text at all"
            raise ConfigError(
                f"--against-text={wanted.against}: none of the {read} read has such a text ({causes}), {there}: name the one "
                f"that the new texts were made of"
            )
        if wanted.needs_image and self._read and not self._images:
            raise ConfigError(
                f"--image={', '.join(wanted.image_members)}: none of the {read} read has an image of such a name, they have "
                f"{_listed(self._members)}: name it, or leave --model out to look at the texts alone"
            )

    def _add(self, shard: int, ordinal: int, keys: Sequence[str], texts: ShardTexts) -> None:
        self.samples += 1
        if ordinal >= len(keys):
            self.bad_samples[MISSING_SAMPLE] += 1
            self.original.add("", MISSING_SAMPLE)
            return
        original, fault = self._original(shard, ordinal)
        original_words = self.original.add(original, fault or None)
        try:
            made = texts.of(ordinal, keys[ordinal])
        except SampleError as error:
            self.bad_samples[error.cause] += 1
            return
        seen = Seen(shard, ordinal, keys[ordinal], original, fault, made)
        name = f"{self._wanted.manifest.names[shard]}/{ordinal}"
        for source, text in made.items():
            new = self._counts[source].add(text.text, text.reason)
            if text.reason is not None:
                self.failed[source, text.reason].offer(name, seen)
            elif not fault:
                self._counts[source].add_pair(original_words, new)
        fit = [source for source, text in made.items() if text.reason is None]
        usable = {source: made[source].text for source in fit} | ({} if fault else {ORIGINAL: original})
        short = frozenset(source for source, text in usable.items() if len(text.split()) < FEWEST_WORDS)
        self.available[Available(frozenset(usable), short)] += 1
        self.drawn.offer(name, seen)
        if made:
            self.sheet.offer(name, seen)
        if fit and not fault:
            self.paired.offer(name, seen)

    def _original(self, shard: int, ordinal: int) -> tuple[str, str]:
        """The text, and why there is none."""
        try:
            sample = self._wanted.reader(shard, ordinal)
            self._look_at(sample)
            text = self._find_original(sample, shard, ordinal)
        except SampleError as error:
            return "", error.cause
        if not text or text.isspace():
            return "", _NO_TEXT
        return text.strip()[:MAX_CHARACTERS], ""

    def _look_at(self, sample: Sample) -> None:
        """What there is, for whom names what there is not."""
        self._images += any(name in sample.members for name in self._wanted.image_members)
        if self._read < _LOOKED_AT:
            self._members |= dict.fromkeys(sample.members)
            self._places |= dict.fromkeys(_texts_of(sample))
        self._read += 1


def _texts_of(sample: Sample) -> Iterator[str]:
    """Where texts lie in a sample, as --against-text names it."""
    for name, data in sample.members.items():
        try:
            text = data.decode()
            if name == "json":
                yield from (f"json:{field}" for field in _fields(json.loads(text)))
            elif text and not text.isspace() and "\0" not in text:
                yield name
        except (ValueError, RecursionError):
            continue  # no text


def _fields(value: Any, at: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _fields(inner, f"{at}.{name}" if at else name)
    elif at and isinstance(value, str) and value and not value.isspace():
        yield at


def _listed(names: Mapping[str, None]) -> str:
    some = list(names)
    return ", ".join(some[:_MOST_NAMES]) + f" and {len(some) - _MOST_NAMES:,} more" * (len(some) > _MOST_NAMES)
