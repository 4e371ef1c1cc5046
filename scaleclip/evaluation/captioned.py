"""Images with captions, for retrieval: COCO and Flickr30k (Karpathy's splits), Urban-1k, and one's own.

Layouts, found by what lies at a data set's path:

- `dataset_*.json`, a file or in a folder, of Karpathy's (arXiv:1412.2306): images with `filename`, `filepath`, `split` and
  `sentences`; the images lie beside it or in a folder there.
- tars of clip-benchmark's webdataset layout: `KEY.jpg` (png, webp) with `KEY.txt`, a caption a line.
- `image/` and `caption/`, Urban-1k's (arXiv:2403.15378): files of the same stem, a caption a file.
- `.parquet` or `.jsonl`, a row an image: `image`, its bytes or its path below the file's folder, and `captions`, a list.
"""

import glob
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from scaleclip.config import SourceConfig
from scaleclip.data.cache import ShardCache
from scaleclip.data.rows import TABLES, RowReader
from scaleclip.data.sample import SampleError
from scaleclip.data.shards import expand_shards
from scaleclip.data.webdataset import TarReader
from scaleclip.errors import ConfigError, RunError
from scaleclip.evaluation.encoder import Encoder
from scaleclip.evaluation.fingerprint import digest, shard_stamp, stamp
from scaleclip.evaluation.over_ranks import read_and_encode_over_ranks
from scaleclip.evaluation.pixels import square_pixels
from scaleclip.evaluation.results import Figure
from scaleclip.evaluation.retrieval import retrieval_figures

LAYOUTS = (
    "Karpathy's dataset_*.json beside its images, tars with KEY.jpg and KEY.txt (a caption a line), image/ and caption/ with "
    "the same stems, or a .parquet or .jsonl of image and captions"
)


class Captioned(NamedTuple):
    """An image as it is stored, with its captions."""

    image: bytes
    captions: Sequence[str]


class _Layout(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Captioned:
        """Raises SampleError, or OSError, where it cannot be had."""

    def where(self, number: int) -> str:
        """The image's file or place in one, for people."""

    def fingerprint(self) -> str:
        """Digest that changes with images and captions (scaleclip/evaluation/fingerprint.py)."""


class CaptionedImages:
    """An opened data set.

    Args:
        name: for figures and errors.
        path: see the module; a folder or a file, for tars also a pattern or a URL.
        split: of Karpathy's JSON.
        cache: local copies of remote shards.

    Raises:
        ConfigError: nothing of a known layout lies there, an image that a file of captions names is not there, or an image has
            no captions.
    """

    def __init__(self, name: str, path: str, split: str, cache: ShardCache) -> None:
        self.name = name
        self._layout = _open(name, path, split, cache)
        if not len(self._layout):
            raise ConfigError(f"{name}: there are no images at {path}; it should hold {LAYOUTS}")

    @property
    def num_images(self) -> int:
        """Images of the data set."""
        return len(self._layout)

    def read(self, start: int, stop: int, size: int) -> tuple[Tensor, list[list[str]]]:
        """uint8 (B, 3, size, size) pixels of images `start` to `stop`, centre-cropped, and the captions of each.

        Raises:
            RunError: an image cannot be used or has no captions; figures over a part of a data set would not be comparable.
        """
        data, captions = [], []
        for number in range(start, min(stop, self.num_images)):
            try:
                found = self._layout[number]
            except (SampleError, OSError) as error:
                raise self._broken(number, error) from None
            texts = [text.strip() for text in found.captions if text.strip()]
            if not texts:
                raise RunError(f"data set {self.name}: {self._layout.where(number)} has no captions: mend it or leave it out")
            data.append(found.image)
            captions.append(texts)
        return square_pixels(data, size, lambda place, error: self._broken(start + place, error)), captions

    def fingerprint(self) -> str:
        """Digest that changes with images and captions."""
        return self._layout.fingerprint()

    def _broken(self, number: int, error: Exception) -> RunError:
        where = self._layout.where(number)
        return RunError(f"data set {self.name}: {where} cannot be used: {error}; mend it, or fetch it again")


def evaluate_retrieval(encoder: Encoder, data: CaptionedImages) -> list[Figure]:
    """Recall at 1, 5 and 10 both ways: an image finds any of its captions, a caption its own image. Every rank calls.

    Raises:
        RunError: an image cannot be used.
    """

    def encode(read: tuple[Tensor, list[list[str]]]) -> tuple[Tensor, list[list[str]]]:
        pixels_BCHW, captions = read
        return encoder.images(pixels_BCHW), captions

    parts = read_and_encode_over_ranks(data.num_images, encoder.batch, partial(data.read, size=encoder.size), encode)
    image_NE = torch.cat([vectors_BE for vectors_BE, _ in parts])
    captions = [texts for _, some in parts for texts in some]
    text_GE = encoder.texts([text for texts in captions for text in texts])
    number_N = torch.arange(len(captions))
    owner_G = number_N.repeat_interleave(torch.tensor([len(texts) for texts in captions]))
    return retrieval_figures(data.name, image_NE, text_GE, number_N, owner_G)


def _open(name: str, path: str, split: str, cache: ShardCache) -> _Layout:
    if path.endswith(TABLES):
        return _Rows(path, cache)
    if path.endswith(".json"):
        return _Karpathy(name, Path(path), split)
    folder = Path(path)
    if (folder / "image").is_dir() and (folder / "caption").is_dir():
        return _Stems(name, folder)
    described = sorted(folder.glob("dataset_*.json"))
    if described:
        return _Karpathy(name, described[0], split)
    within = sorted(
        glob.glob(os.path.join(glob.escape(path), "*.tar")) or glob.glob(os.path.join(glob.escape(path), split, "*.tar"))
    )
    if within or not folder.is_dir():
        return _Tars(name, within or [path], cache)
    raise ConfigError(f"{name}: {path} holds no data set of captions; it should be {LAYOUTS}")


class _Karpathy:
    def __init__(self, name: str, path: Path, split: str) -> None:
        try:
            images = json.loads(path.read_text())["images"]
            self._rows = [
                (_image_file(row), [each["raw"] for each in row["sentences"]]) for row in images if row["split"] == split
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{name}: {path} is no file of Karpathy's: {type(error).__name__}: {error}") from None
        if not self._rows:
            splits = ", ".join(sorted({row["split"] for row in images}))
            raise ConfigError(f"{name}: {path} has no images of split {split!r}; it has {splits or 'none at all'}")
        bare = [file for file, captions in self._rows if not captions]
        if bare:
            raise ConfigError(f"{name}: {path} has {len(bare)} images without captions, the first is {bare[0]}")
        beside = [path.parent, *sorted(each for each in path.parent.iterdir() if each.is_dir())]
        first = self._rows[0][0]
        self._folder = next((each for each in beside if (each / first).exists()), path.parent)
        unknown = [file for file, _ in self._rows if not (self._folder / file).exists()]
        if unknown:
            raise ConfigError(
                f"{name}: {path} names {len(unknown)} images that are not there, the first is {self._folder / unknown[0]}: put "
                f"them beside it, or into a folder there"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Captioned:
        file, captions = self._rows[number]
        return Captioned((self._folder / file).read_bytes(), captions)

    def where(self, number: int) -> str:
        return str(self._folder / self._rows[number][0])

    def fingerprint(self) -> str:
        return digest((file, *captions, *stamp(self._folder / file)) for file, captions in self._rows)


def _image_file(row: dict[str, Any]) -> str:
    return os.path.join(str(row.get("filepath", "")), str(row["filename"]))


class _Stems:
    def __init__(self, name: str, folder: Path) -> None:
        images, texts = ({each.stem: each for each in (folder / part).iterdir()} for part in ("image", "caption"))
        for strange, what in ((images.keys() - texts.keys(), "image"), (texts.keys() - images.keys(), "caption")):
            if strange:
                other = "caption" if what == "image" else "image"
                raise ConfigError(
                    f"{name}: {folder}/{what} has {len(strange)} files without one of the same stem in {other}/, such as "
                    f"{min(strange)}"
                )
        self._files = [(images[stem], texts[stem]) for stem in sorted(images)]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> Captioned:
        image, text = self._files[number]
        try:
            return Captioned(image.read_bytes(), [" ".join(text.read_text(encoding="utf-8").split())])
        except UnicodeDecodeError as error:
            raise SampleError("undecodable_text", f"{text} is not UTF-8: {error.reason}") from None

    def where(self, number: int) -> str:
        return str(self._files[number][0])

    def fingerprint(self) -> str:
        return digest((image.name, text.name, *stamp(image), *stamp(text)) for image, text in self._files)


class _Tars:
    def __init__(self, name: str, patterns: Sequence[str], cache: ShardCache) -> None:
        self._shards = expand_shards(name, patterns)
        self._read = TarReader(self._shards, cache)
        try:
            # clip-benchmark's shards have no counts beside them
            counts = [self._read.whole_count(shard) for shard in range(len(self._shards))]
        except SampleError as error:
            raise ConfigError(f"{name}: {error}") from None
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Captioned:
        sample = self._read(*self._place(number))
        captions = sample.members.get("txt", b"").decode(errors="replace").split("\n")
        return Captioned(sample.image(SourceConfig().image), captions)

    def where(self, number: int) -> str:
        shard, ordinal = self._place(number)
        return f"{self._shards[shard]} sample {ordinal}"

    def fingerprint(self) -> str:
        return digest(shard_stamp(shard) for shard in self._shards)

    def _place(self, number: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard - 1] if shard else 0)


class _Rows:
    def __init__(self, path: str, cache: ShardCache) -> None:
        self._path = path
        rows = RowReader([path], cache)
        rows.counts(path)  # which says what is wrong with the file
        self._table = rows.open(0)
        missing = {"image", "captions"} - set(self._table.column_names)
        if missing:
            raise ConfigError(f"{path} has no column {min(missing)!r}: it needs image (bytes or path) and captions (a list)")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, number: int) -> Captioned:
        image, captions = (self._table.column(name)[number].as_py() for name in ("image", "captions"))
        if isinstance(image, dict):  # as the datasets library stores them
            image = image.get("bytes") or image.get("path")
        if not image:
            raise SampleError("no_image", "its column image is empty")
        data = image if isinstance(image, bytes) else (Path(self._path).parent / image).read_bytes()
        return Captioned(data, [captions] if isinstance(captions, str) else [text for text in captions or [] if text])

    def where(self, number: int) -> str:
        return f"{self._path} row {number}"

    def fingerprint(self) -> str:
        images = self._table.column("image")
        beside = images.to_pylist() if str(images.type).endswith("string") else []
        files = [Path(self._path).parent / name for name in beside if name]
        return digest([shard_stamp(self._path), *(stamp(file) for file in files if file.exists())])
