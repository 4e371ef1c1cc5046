"""What is read of the samples of shards: images of the model's size, texts as its tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from scaleclip.config import DataConfig, SourceConfig
from scaleclip.data.cache import ShardCache
from scaleclip.data.read_ahead import Chunk, ReadAhead, cut
from scaleclip.data.sample import Sample, SampleError
from scaleclip.data.source import open_shards
from scaleclip.data.texts import MAX_CHARACTERS, parse_location
from scaleclip.data.tokenizer import Tokenizer
from scaleclip.data.transform import centre_crop, open_image, resize


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


class Inputs(NamedTuple):
    """Of the model, for B samples."""

    pixels_BCHW: Tensor | None
    """uint8; None without images."""
    tokens_BT: Tensor | None
    """int64; None without texts."""


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
        self.manifest, reader = open_shards("--data", wanted.data, wanted.manifest, cache)
        self._find_text = parse_location("--text", wanted.text, {}) if wanted.text is not None else None
        self._max_pixels = DataConfig().max_pixels
        self._ahead = ReadAhead(self.manifest, reader, self._prepare, self._collate, wanted.workers)

    def chunks(self, shards: Sequence[int], *, pin_memory: bool) -> Iterator[Chunk[Inputs]]:
        """Those of some shards in order, at least one a shard.

        Raises:
            RunError: a loader process died.
        """
        counts = self.manifest.counts
        # a shard without samples has a file of features, too
        pieces = [piece for shard in shards for piece in cut(shard, int(counts[shard]), self.wanted.batch)]
        return self._ahead.chunks(pieces, pin_memory=pin_memory)

    def _prepare(self, sample: Sample, shard: int, ordinal: int) -> tuple[Tensor | None, str | None]:
        text = self._text(sample, shard, ordinal)
        return self._image(sample), text

    def _collate(self, items: Sequence[tuple[Tensor | None, str | None]]) -> Inputs:
        pixels = [image for image, _ in items if image is not None]
        texts = [text for _, text in items if text is not None]
        return Inputs(torch.stack(pixels) if pixels else None, self._tokenizer(texts) if texts else None)

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
