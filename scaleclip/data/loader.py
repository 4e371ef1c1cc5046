"""From a batch's number to its tensors: order, read, caption, transform, tokenize.

A batch is a pure function of (config, batch number, rank, world size): loader processes hold no state, augmentation and
caption choice are seeded by (seed, epoch, sample), so a run resumes by asking for the next number. A sample that cannot be
used stays in its place, marked invalid, and is counted by source and cause.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from scaleclip.config import RunConfig
from scaleclip.data.augment import augment
from scaleclip.data.cache import ShardCache
from scaleclip.data.captions import CaptionPolicy
from scaleclip.data.mixture import BatchOrder, Slots, rank_slots
from scaleclip.data.order import hash64
from scaleclip.data.sample import Fault, SampleError
from scaleclip.data.shards import is_remote
from scaleclip.data.source import Source
from scaleclip.data.text_pairs import TEXT_PAIRS, TextPairs
from scaleclip.data.tokenizer import Tokenizer
from scaleclip.data.transform import open_image, random_crop, resize

# what a sample's random numbers are for; the number is part of the contract with existing runs
_AUGMENT, _PATCHES = 0, 1
_AUGMENTED_VIEWS = 2


class Batch(NamedTuple):
    """A rank's share of a global batch, or a chunk of it: B slots, in the global batch's order."""

    pixels_BCHW: Tensor
    """uint8; zeros where invalid."""
    tokens_BT: tuple[Tensor, ...]
    """int64, one a view."""
    ids_B: Tensor
    """int64; equal ones mark pairs of the same concept."""
    valid_B: Tensor
    """bool; False for a sample that could not be used and for slots past the end of the global batch."""
    seeds_B: Tensor
    """int64; a sample's own seed for what the model draws (patch dropout)."""
    keys: tuple[str, ...]
    """Keys of the samples; empty where invalid."""
    faults: tuple[Fault, ...]
    """Samples that could not be used."""
    counts: dict[str, int]
    """Valid samples by source (`source/NAME`), texts by view and name (`text/VIEW/NAME`), rows by source of texts
    (`text_pairs/NAME`)."""
    cache: dict[str, int]
    """What the loader process did in the cache of remote shards meanwhile (ShardCache.take_counts)."""
    stage_s: dict[str, float]
    """Seconds that the loader process spent in each stage."""
    ready_s: float
    """time.monotonic() when the loader process had it ready."""
    augmented_BCHW: tuple[Tensor, ...] = ()
    """uint8, two further views of each image where `model.projector` is set."""
    captions_BS: Tensor | None = None
    """int64, what `model.caption_decoder` is to write, from the start token on."""
    caption_lengths_B: Tensor | None = None
    """int64, tokens of each caption without the start token; 0 where invalid."""
    pairs_BT: tuple[Tensor, ...] = ()
    """int64, the same slots of a batch of `data.text_pairs`: queries, positives and then each of the negatives."""
    pairs_valid_B: Tensor | None = None
    """bool, likewise."""
    pairs_keys: tuple[str, ...] = ()
    """File and row of each; empty where invalid."""


class TrainDataset(Dataset[Batch]):
    """The chunks of a rank's shares, batch after batch: item i is chunk i % num_chunks of global batch i // num_chunks.

    Args:
        config: the run's configuration.
        sources: data sets, open.
        cache: of remote shards.
        tokenizer: the text tower's.
        rank: number of the rank.
        world_size: ranks.
        micro_batch: slots of a chunk, the last one of a share may have fewer; none: the share is one chunk.
        text_pairs: the batches of texts beside those of images, if the run has any.
    """

    def __init__(
        self,
        config: RunConfig,
        sources: Sequence[Source],
        cache: ShardCache,
        tokenizer: Tokenizer,
        rank: int,
        world_size: int,
        micro_batch: int | None = None,
        text_pairs: TextPairs | None = None,
    ) -> None:
        self._augments, self._decoder = config.model.projector is not None, config.model.caption_decoder
        self._text_pairs = text_pairs
        self._data, self._seed, self._size = config.data, config.run.seed, config.model.image.size
        self.sources, self.cache, self._tokenizer = sources, cache, tokenizer
        self._share = rank_slots(config.train.global_batch, rank, world_size)
        self._first_slots = range(*self._share, micro_batch or self._share[1] - self._share[0])
        self._policies = [CaptionPolicy(view) for view in config.data.views]
        self._caption = CaptionPolicy(config.data.caption) if config.data.caption and self._decoder else None
        self._order = order_of(config, sources)
        sizes = [source.manifest.num_samples for source in sources]
        self._first_of_source = np.cumsum([0, *sizes[:-1]])
        for source in sources:
            # what the rank's streams read at a time, and what follows
            source.reader.open.most = 2 * self.num_streams * config.data.shuffle_shards

    @property
    def num_tokens(self) -> int:
        """Tokens of a text in a batch: those of the widest view, since the tower takes all views at once."""
        return self._data.num_tokens(self._tokenizer.context_length)

    @property
    def num_chunks(self) -> int:
        """Chunks of the rank's share."""
        return len(self._first_slots)

    @property
    def num_streams(self) -> int:
        """Canonical streams that the rank reads."""
        per_stream = self._order.global_batch // self._order.canonical_streams
        return (self._share[1] - 1) // per_stream - self._share[0] // per_stream + 1

    def quota(self, source: str) -> int:
        """Samples of a source in every global batch."""
        return self._order.quotas[source] * self._order.canonical_streams

    def slots(self, item: int) -> Slots:
        """Where the samples of an item's slots lie."""
        return self._order.slots(*self._batch_and_slots(item))

    def remote_shards(self, item: int) -> list[str]:
        """URLs of the remote shards that an item needs."""
        slots = self.slots(item)
        pairs = np.unique(np.stack([slots.source_N, slots.shard_N])[:, slots.source_N >= 0], axis=1)
        shards = [self.sources[source].manifest.shards[shard] for source, shard in pairs.T]
        return [shard for shard in shards if is_remote(shard)]

    def __getitem__(self, item: int) -> Batch:
        clock = _Clock("collate")
        slots = self.slots(item)
        num_slots = len(slots.source_N)
        sample_B = self._sample_numbers(slots)
        seed_B = hash64(self._seed, _AUGMENT, slots.epoch_N, sample_B)
        # channels last in memory, as decoders and convolutions have them
        pixels_BCHW, *augmented_BCHW = (
            torch.zeros(num_slots, self._size, self._size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
            for _ in range(1 + _AUGMENTED_VIEWS * self._augments)
        )
        # a pair is its own concept unless the data says otherwise
        ids_B = torch.from_numpy(sample_B.copy())
        valid_B = torch.zeros(num_slots, dtype=torch.bool)
        texts, captions = [[""] * num_slots for _ in self._policies], [""] * num_slots
        randoms = [np.random.Generator(np.random.PCG64(int(seed))) for seed in seed_B]
        keys, faults, counts = [""] * num_slots, list[Fault](), Counter[str]()
        for slot in np.flatnonzero(slots.source_N >= 0):
            source, shard, index = self.sources[slots.source_N[slot]], int(slots.shard_N[slot]), int(slots.index_N[slot])
            random = randoms[slot]
            ordinal = source.manifest.ordinal(shard, index)
            try:
                clock.enter("fetch")
                source.reader.fetch(shard)
                clock.enter("read")
                sample = source.reader(shard, ordinal)
                clock.enter("caption")
                found = source.texts(sample, shard, ordinal)
                chosen = [policy.choose(found, random) for policy in self._policies]
                captions[slot] = self._caption.choose(found, random).text if self._caption else ""
                concept = source.texts.concept(sample)
                clock.enter("decode")
                picture = open_image(sample.image(source.image_members), self._data.max_pixels)
                crop = random_crop(picture.height, picture.width, self._data, random)
                pixels = picture.decode(crop, self._size)
                clock.enter("resize")
                views = [resize(pixels, self._size, crop.flip)]
                if self._augments:
                    clock.enter("augment")
                    views += [augment(picture, self._data.augment, self._size, random) for _ in augmented_BCHW]
                for view_BCHW, pixels in zip((pixels_BCHW, *augmented_BCHW), views, strict=True):
                    view_BCHW[slot] = pixels
            except SampleError as error:
                faults.append(Fault(source.name, source.manifest.shards[shard], ordinal, error.cause, error.detail))
                continue
            finally:
                clock.enter("collate")
            keys[slot], valid_B[slot] = sample.key, True
            if concept is not None:
                ids_B[slot] = _concept_id(concept)
            counts[f"source/{source.name}"] += 1
            for view, caption in enumerate(chosen):
                texts[view][slot] = caption.text
                counts[f"text/{view}/{caption.name}"] += 1
        clock.enter("tokenize")
        tokens = [
            self._tokenizer(each, max_tokens=view.max_tokens, keep=view.keep, randoms=randoms)
            for each, view in zip(texts, self._data.views, strict=True)
        ]
        captions_BS, caption_lengths_B = self._encode_captions(captions, valid_B)
        pairs = None
        if self._text_pairs:
            clock.enter("text pairs")
            pairs = self._text_pairs.read(*self._batch_and_slots(item))
            counts[f"{TEXT_PAIRS}/{pairs.source}"] += int(pairs.valid_B.sum())
        clock.enter("collate")
        patch_seeds_B = torch.from_numpy(hash64(self._seed, _PATCHES, slots.epoch_N, sample_B).astype(np.int64))
        return Batch(
            pixels_BCHW, self._padded(tokens), ids_B, valid_B, patch_seeds_B, tuple(keys),
            (*faults, *(pairs.faults if pairs else ())), dict(counts),
            dict(self.cache.take_counts()), clock.read(), ready_s=time.monotonic(), augmented_BCHW=tuple(augmented_BCHW),
            captions_BS=captions_BS, caption_lengths_B=caption_lengths_B,
            pairs_BT=self._padded(pairs.texts_BT) if pairs else (), pairs_valid_B=pairs.valid_B if pairs else None,
            pairs_keys=pairs.keys if pairs else (),
        )  # fmt: skip

    def _batch_and_slots(self, item: int) -> tuple[int, int, int]:
        """Number of an item's global batch, its first slot there and its last + 1."""
        batch, chunk = divmod(item, self.num_chunks)
        first = self._first_slots[chunk]
        return batch, first, min(first + self._first_slots.step, self._share[1])

    def _encode_captions(self, texts: Sequence[str], valid_B: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What the decoder is to write and how much of it counts."""
        if self._decoder is None:
            return None, None
        captions_BS = self._tokenizer(texts, max_tokens=self._decoder.queries + 1)
        # an end token closes every text, also one that was cut; padding may have the id of a token that texts use
        lengths_B = (captions_BS[:, 1:] == self._tokenizer.end_id).int().argmax(1) + 1
        return captions_BS, lengths_B * valid_B

    def _padded(self, tokens: Iterable[Tensor]) -> tuple[Tensor, ...]:
        return tuple(pad(each, (0, self.num_tokens - each.shape[1]), value=self._tokenizer.pad_id) for each in tokens)

    def _sample_numbers(self, slots: Slots) -> np.ndarray[Any, np.dtype[np.int64]]:
        """A number of its own for every sample of every source; 0 for slots past the end."""
        number = np.zeros_like(slots.source_N)
        for position, source in enumerate(self.sources):
            here = slots.source_N == position
            number[here] = (
                self._first_of_source[position] + source.manifest.first_sample[slots.shard_N[here]] + slots.index_N[here]
            )
        return number


def order_of(config: RunConfig, sources: Sequence[Source]) -> BatchOrder:
    """The order of a run's samples."""
    return BatchOrder(
        {source.name: source.manifest.counts for source in sources},
        {name: source.weight for name, source in config.data.sources.items()},
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        canonical_streams=config.data.canonical_streams,
        shuffle_shards=config.data.shuffle_shards,
    )


class _Clock:
    """Seconds by stage."""

    def __init__(self, stage: str) -> None:
        self._stage, self._since = stage, time.perf_counter()
        self._spent_s: dict[str, float] = {}

    def enter(self, stage: str) -> None:
        """What follows is another stage."""
        now = time.perf_counter()
        self._spent_s[self._stage] = self._spent_s.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now

    def read(self) -> dict[str, float]:
        """Until now."""
        self.enter(self._stage)
        return self._spent_s


def _concept_id(name: str) -> int:
    """A string as 63 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()) >> 1
