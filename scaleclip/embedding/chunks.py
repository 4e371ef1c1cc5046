"""Samples of shards, read and decoded ahead of the model by loader processes, a chunk at a time."""

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from scaleclip.config import DataConfig, SourceConfig
from scaleclip.data.cache import ShardCache
from scaleclip.data.open_shards import allow_open_files
from scaleclip.data.sample import Sample, SampleError
from scaleclip.data.source import open_shards
from scaleclip.data.texts import MAX_CHARACTERS, parse_location
from scaleclip.data.tokenizer import Tokenizer
from scaleclip.data.transform import centre_crop, open_image, resize
from scaleclip.errors import RunError

# of a shard and not of a sample; another start may find it
_OF_A_SHARD = ("missing_shard", "forbidden_shard", "unreachable_shard", "unreadable_shard", "cache_full", "unwritable_cache")
_AHEAD = 4  # chunks a loader process
_WORKER_DIED = "exited unexpectedly"  # as torch.utils.data says it


@dataclass(frozen=True)
class Wanted:
    """What to read."""

    data: tuple[str, ...]
    """Patterns of tars, of the index files of MDS folders, or of tables of rows."""
    manifest: str | None = None
    """Folder of the tars' manifest; none: the `*_stats.json` beside each."""
    images: bool = True
    """Whether images are encoded."""
    members: tuple[str, ...] = SourceConfig().image
    """Names that an image may have in a sample."""
    text: str | None = None
    """Where the text lies that is encoded: `txt`, `json:a.b`; none: no text is."""
    batch: int = 256
    """Samples encoded at once."""
    workers: int = 0
    """Loader processes of a rank."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Of features."""
        return (*["image"] * self.images, *["text"] * (self.text is not None))


class BadSample(NamedTuple):
    """A sample that has no features."""

    key: str
    """Empty where even that is unknown."""
    shard: str
    sample: int
    """Its number in the shard, of all that it holds."""
    cause: str
    """What it is counted as."""
    detail: str
    """What was wrong, for people."""


class Chunk(NamedTuple):
    """Some samples of a shard, in its order."""

    shard: int
    num_samples: int
    """Bad ones included."""
    keys: tuple[str, ...]
    """Of the B samples that can be used."""
    pixels_BCHW: Tensor | None
    """uint8; None without images."""
    tokens_BT: Tensor | None
    """int64; None without texts."""
    bad: tuple[BadSample, ...]
    error: str
    """Why the shard cannot be had, or empty."""


class Shards:
    """The shards that are wanted.

    Args:
        wanted: which, and what of their samples.
        cache: local copies of remote shards.
        tokenizer: of the model.
        size: height and width of the model's images.

    Raises:
        ConfigError: no shard matches, a count is missing, or `wanted.text` is malformed.
    """

    def __init__(self, wanted: Wanted, cache: ShardCache, tokenizer: Tokenizer, size: int) -> None:
        self.wanted, self._tokenizer, self._size = wanted, tokenizer, size
        self.manifest, self._reader = open_shards("--data", wanted.data, wanted.manifest, cache)
        self._find_text = parse_location("--text", wanted.text, {}) if wanted.text is not None else None
        self._max_pixels = DataConfig().max_pixels

    def chunks(self, shards: Sequence[int], *, pin_memory: bool) -> Iterator[Chunk]:
        """Those of some shards in order, at least one a shard.

        Raises:
            RunError: a loader process died.
        """
        allow_open_files()
        workers, dataset = self.wanted.workers, _Chunks(self, shards)
        loader = DataLoader(
            dataset, batch_size=None, sampler=range(len(dataset)), collate_fn=_as_is, num_workers=workers,
            prefetch_factor=_AHEAD if workers else None, worker_init_fn=_start_worker, pin_memory=pin_memory,
            multiprocessing_context="fork" if workers else None,
        )  # fmt: skip
        try:
            yield from loader
        except RuntimeError as error:
            if _WORKER_DIED not in str(error):
                raise
            raise RunError(
                "a loader process died: look for an out-of-memory kill in dmesg, or take fewer --workers; what is written is "
                "safe: start the same command again"
            ) from error

    def read(self, shard: int, start: int, stop: int) -> Chunk:
        """Samples `start` to `stop` of a shard, of those that the manifest counts."""
        keys, pixels, texts, bad, error = list[str](), list[Tensor](), list[str](), list[BadSample](), ""
        try:
            self._reader.fetch(shard)
            for index in range(start, stop):
                ordinal, key = self.manifest.ordinal(shard, index), ""
                try:
                    sample = self._reader(shard, ordinal)
                    key = sample.key
                    text = self._text(sample, shard, ordinal)
                    image = self._image(sample)
                except SampleError as fault:
                    if fault.cause in _OF_A_SHARD:
                        raise
                    bad.append(BadSample(key, self.manifest.names[shard], ordinal, fault.cause, fault.detail))
                    continue
                keys.append(key)
                pixels += [] if image is None else [image]
                texts += [] if text is None else [text]
        except SampleError as fault:
            error = str(fault)
        pixels_BCHW = torch.stack(pixels) if pixels else None
        tokens_BT = self._tokenizer(texts) if texts else None
        return Chunk(shard, stop - start, tuple(keys), pixels_BCHW, tokens_BT, tuple(bad), error)

    def _text(self, sample: Sample, shard: int, ordinal: int) -> str | None:
        if self._find_text is None:
            return None
        text = self._find_text(sample, shard, ordinal)
        if text is None or not text or text.isspace():
            raise SampleError("empty_caption", f"{sample.key} has no text at {self.wanted.text}")
        return text[:MAX_CHARACTERS]

    def _image(self, sample: Sample) -> Tensor | None:
        """uint8 [3, size, size], as evaluations have it: the largest square in the middle, every pixel of it."""
        if not self.wanted.images:
            return None
        picture = open_image(sample.image(self.wanted.members), self._max_pixels)
        crop = centre_crop(picture.height, picture.width)
        return resize(picture.decode(crop, crop.height), self._size, flip=False)


class _Chunks(Dataset[Chunk]):
    def __init__(self, shards: Shards, numbers: Sequence[int]) -> None:
        self._shards, self._numbers = shards, numbers
        counts = shards.manifest.counts[list(numbers)]
        # a shard without samples has a file of features, too
        self._ends = np.cumsum(np.maximum(-(-counts // shards.wanted.batch), 1))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, item: int) -> Chunk:
        place = int(np.searchsorted(self._ends, item, side="right"))
        shard, batch = self._numbers[place], self._shards.wanted.batch
        start = (item - (int(self._ends[place - 1]) if place else 0)) * batch
        stop = min(start + batch, int(self._shards.manifest.counts[shard]))
        return self._shards.read(shard, start, stop)


def _as_is(chunk: Any) -> Any:
    return chunk


def _start_worker(worker: int) -> None:
    # a terminal sends it to the main process too, which ends the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
