"""Batches of text pairs and triplets. A batch comes from one source, so that its negatives are alike (arXiv:2405.20204).

Which source is a pure function of the batch's number: a cycle of batches gives every source its share by largest remainder, in
an order that a keyed permutation draws anew for each cycle. Within a source the order is that of samples (data/order.py).
"""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scaleclip.config import RunConfig, TextSourceConfig
from scaleclip.data.cache import ShardCache
from scaleclip.data.mixture import BatchOrder, quotas_of
from scaleclip.data.order import GOLDEN, Ints, hash64, permute
from scaleclip.data.sample import Fault, Sample, SampleError
from scaleclip.data.source import open_shards
from scaleclip.data.tokenizer import Tokenizer
from scaleclip.errors import ConfigError

TEXT_PAIRS = "text_pairs"
"""What names of text sources stand behind in faults and counts: a source of images may have the same."""
_CYCLE = 1024
# what random numbers are for; part of the contract with existing runs
_TURNS, _NEGATIVES = 2, 3


class TextBatch(NamedTuple):
    """Slots of a global batch of texts: B slots, T tokens."""

    source: str
    """Name of the one source."""
    texts_BT: tuple[Tensor, ...]
    """int64: queries, positives and then each of the negatives."""
    valid_B: Tensor
    """bool; False for a row that could not be used and for slots past the end of the global batch."""
    keys: tuple[str, ...]
    """File and row; empty where invalid."""
    faults: tuple[Fault, ...]
    """Rows that could not be used."""


class TextPairs:
    """Batches of texts by their number.

    Args:
        sources: by name.
        cache: local copies of remote files.
        tokenizer: of the text tower.
        seed: another seed is another order.
        global_batch: rows a batch; a multiple of `canonical_streams`.
        canonical_streams: ranges that an epoch of a source is cut into.
        shuffle_shards: average files' worth of rows that a stream shuffles together.
        num_negatives: texts drawn from a row's negatives, 0 for pairs.

    Raises:
        ConfigError: no file matches or one is unreadable, a source's share of the batches is nothing, or it has fewer rows than
            streams.
    """

    def __init__(
        self,
        sources: Mapping[str, TextSourceConfig],
        cache: ShardCache,
        tokenizer: Tokenizer,
        *,
        seed: int,
        global_batch: int,
        canonical_streams: int,
        shuffle_shards: int,
        num_negatives: int,
    ) -> None:
        self._tokenizer, self._seed, self._num_negatives = tokenizer, seed, num_negatives
        self._sources = [_TextSource(name, config, cache) for name, config in sources.items()]
        for source in self._sources:
            if num_negatives and not source.config.negatives:
                raise ConfigError(
                    f"{source.key}.negatives is empty, and {num_negatives} negatives a row are asked for: name columns"
                )
        # a source's seed is its number's, so that two of equal files have orders of their own
        self._orders = [
            BatchOrder(
                {source.name: source.manifest.counts},
                {source.name: None},
                seed=seed ^ (number * GOLDEN % 2**63),
                global_batch=global_batch,
                canonical_streams=canonical_streams,
                shuffle_shards=shuffle_shards,
            )
            for number, source in enumerate(self._sources)
        ]
        weights = {source.name: source.config.weight or float(source.manifest.num_samples) for source in self._sources}
        self._turns = quotas_of(weights, _CYCLE)
        missing = [name for name, turns in self._turns.items() if not turns]
        if missing:
            raise ConfigError(
                f"text source {missing[0]} gets none of {_CYCLE} text batches: raise its weight={weights[missing[0]]:g}"
            )

    def turn(self, batch: int) -> tuple[int, int]:
        """Number of the source of a batch, and how many batches it gave before."""
        cycle, place = divmod(batch, _CYCLE)
        drawn = permute(np.arange(_CYCLE), np.array([_CYCLE]), hash64(self._seed, _TURNS, cycle))
        turns = np.array(list(self._turns.values()))
        source_of_place: Ints = np.searchsorted(np.cumsum(turns), drawn, side="right")
        source = int(source_of_place[place])
        return source, cycle * int(turns[source]) + int(np.count_nonzero(source_of_place[:place] == source))

    @property
    def fingerprints(self) -> list[tuple[str, str]]:
        """Key of each source and digest of its rows, wherever the files lie."""
        return [(source.key, source.manifest.fingerprint) for source in self._sources]

    def read(self, batch: int, first: int, last: int) -> TextBatch:
        """Slots `first` to `last` - 1 of global text batch `batch`."""
        number, turn = self.turn(batch)
        source = self._sources[number]
        slots = self._orders[number].slots(turn, first, last)
        num_slots, num_texts = len(slots.source_N), 2 + self._num_negatives
        texts = [[""] * num_slots for _ in range(num_texts)]
        keys, faults = [""] * num_slots, list[Fault]()
        for slot in np.flatnonzero(slots.source_N >= 0):
            epoch, shard, index = (int(column[slot]) for column in slots[1:])
            seed = int(hash64(self._seed, _NEGATIVES, number, epoch, shard, index)[0])
            try:
                sample = source.read(shard, source.manifest.ordinal(shard, index))
                row = source.texts(sample, self._num_negatives, np.random.Generator(np.random.PCG64(seed)))
            except SampleError as error:
                shard_name = source.manifest.shards[shard]
                faults.append(Fault(f"{TEXT_PAIRS}/{source.name}", shard_name, index, error.cause, error.detail))
                continue
            keys[slot] = sample.key
            for column, text in zip(texts, row, strict=True):
                column[slot] = text
        valid_B = torch.tensor([bool(key) for key in keys])
        return TextBatch(source.name, tuple(map(self._tokenizer, texts)), valid_B, tuple(keys), tuple(faults))


def open_text_pairs(config: RunConfig, cache: ShardCache, tokenizer: Tokenizer) -> TextPairs | None:
    """Those of `data.text_pairs`, with the order that the run's own has; None without sources."""
    pairs, data = config.data.text_pairs, config.data
    if not pairs.sources:
        return None
    return TextPairs(
        pairs.sources,
        cache,
        tokenizer,
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        canonical_streams=data.canonical_streams,
        shuffle_shards=data.shuffle_shards,
        num_negatives=pairs.num_negatives,
    )


class _TextSource:
    def __init__(self, name: str, config: TextSourceConfig, cache: ShardCache) -> None:
        self.name, self.key, self.config = name, f"data.text_pairs.sources.{name}", config
        self.manifest, self.read = open_shards(f"{self.key}.files", config.files, None, cache)

    def texts(self, sample: Sample, num_negatives: int, random: np.random.Generator) -> list[str]:
        """Query, positive, negatives."""
        pair = [self._text(sample, column) for column in (self.config.query, self.config.positive)]
        if not num_negatives:
            return pair
        every = [text for column in self.config.negatives for text in self._list(sample, column)]
        if len(every) < num_negatives:
            raise SampleError("few_negatives", f"{sample.key} has {len(every)} negatives, {num_negatives} are asked for")
        return pair + [every[i] for i in random.permutation(len(every))[:num_negatives]]

    def _text(self, sample: Sample, column: str) -> str:
        if column not in sample.members:
            raise SampleError("no_text", f"{sample.key} has {', '.join(sample.members)}, no {column}")
        try:
            text = sample.members[column].decode()
        except UnicodeDecodeError as error:
            raise SampleError("undecodable_text", f"{sample.key}, {column}: {error}") from None
        if not text.strip():
            raise SampleError("empty_caption", f"{sample.key}: {column} is blank")
        return text

    def _list(self, sample: Sample, column: str) -> Sequence[str]:
        if column not in sample.members:
            return []
        text = self._text(sample, column)
        if not text.lstrip().startswith("["):
            return [text]
        try:
            return [str(each) for each in json.loads(text)]
        except ValueError:
            return [text]
