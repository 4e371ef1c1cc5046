"""Held-out splits: tar shards with a JSON description that fixes galleries, evaluation texts, classes and templates.

Measured are retrieval both ways and zero-shot accuracy, with chance beside every figure.
"""

import glob
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from scaleclip.config import Section, SourceConfig
from scaleclip.data.cache import ShardCache
from scaleclip.data.sample import SampleError
from scaleclip.data.source import open_shards
from scaleclip.errors import ConfigError, RunError
from scaleclip.evaluation.encoder import Encoder
from scaleclip.evaluation.fingerprint import digest, shard_stamp
from scaleclip.evaluation.over_ranks import read_and_encode_over_ranks
from scaleclip.evaluation.pixels import square_pixels
from scaleclip.evaluation.results import Figure
from scaleclip.evaluation.retrieval import retrieval_figures
from scaleclip.evaluation.zero_shot import Outcomes, class_vectors, label_ranks, top_figure
from scaleclip.files import resolve_path

_KEY = "eval.splits (--split)"


class GalleryText(Section):
    concept: str
    """What the text names."""
    text: str
    """The evaluation text."""


class ZeroShotTask(Section):
    name: str
    """Name of the task."""
    classes: tuple[str, ...]
    """Class names."""
    templates: tuple[str, ...]
    """Prompts with `{}` where the class name goes; a class's vector is the mean over them."""
    labels: dict[str, int]
    """Class number of each image, by key."""


class Split(Section):
    """A split's description."""

    name: str
    """Name of the split."""
    about: str
    """What it holds out, in a line."""
    gallery: tuple[GalleryText, ...]
    """Texts of the retrieval gallery."""
    concepts: dict[str, str]
    """Concept of each image, by key; a text and an image of one concept match."""
    zero_shot: tuple[ZeroShotTask, ...] = ()
    """Classifications of the images."""


class SplitData:
    """A split and its images; the shards lie beside the description and share its stem."""

    def __init__(self, path: Path, cache: ShardCache) -> None:
        try:
            described = path.read_text()
            self.split = Split.model_validate(json.loads(described))
        except (OSError, ValueError, ValidationError) as error:
            raise ConfigError(f"{_KEY}: {path} cannot be read as a split: {error}") from None
        strange = set(self.split.concepts.values()) - {entry.concept for entry in self.split.gallery}
        if strange:
            raise ConfigError(f"{_KEY}: {path}: images show concepts without a gallery text, such as {min(strange)!r}")
        patterns = [f"{path.with_suffix('')}-*.tar"]
        self.manifest, self._reader = open_shards(f"{_KEY}: {path}", patterns, None, cache)
        self.place = str(path.resolve())
        """See scaleclip.evaluation.evaluate.Evaluation."""
        self._described = described

    @property
    def name(self) -> str:
        """Of the split."""
        return self.split.name

    @property
    def definition(self) -> str:
        """The description, and which tars there are."""
        return f"{self._described} {digest(shard_stamp(shard) for shard in self.manifest.shards)}"

    @property
    def num_images(self) -> int:
        """Images of the split."""
        return self.manifest.num_samples

    @property
    def num_items(self) -> int:
        """Images of the split."""
        return self.num_images

    def images(self, start: int, stop: int, size: int) -> tuple[list[str], Tensor]:
        """Keys and uint8 [B, 3, size, size] pixels of images `start` to `stop`, centre-cropped, in shard order.

        Raises:
            RunError: an image cannot be used; figures over a part of a split would not be comparable.
        """
        keys: list[str] = []
        data: list[bytes] = []
        for number in range(start, min(stop, self.num_images)):
            shard, ordinal = self._place(number)
            try:
                sample = self._reader(shard, ordinal)
                data.append(sample.image(SourceConfig().image))
            except SampleError as error:
                raise self._broken(number, error) from None
            if sample.key not in self.split.concepts or any(sample.key not in t.labels for t in self.split.zero_shot):
                raise RunError(f"split {self.split.name} does not say what image {sample.key} shows: mend its .json")
            keys.append(sample.key)
        return keys, square_pixels(data, size, lambda place, error: self._broken(start + place, error))

    def _place(self, number: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.manifest.first_sample, number, side="right")) - 1
        return shard, number - int(self.manifest.first_sample[shard])

    def _broken(self, number: int, error: SampleError) -> RunError:
        shard, ordinal = self._place(number)
        where = f"{self.manifest.shards[shard]} sample {ordinal}"
        return RunError(f"split {self.split.name}: {where} cannot be used: {error}; mend it, or fetch the split again")

    def run(self, encoder: Encoder, features: Path | None = None) -> list[Figure]:
        """Its figures; see scaleclip.evaluation.evaluate.Evaluation. A split is encoded anew each time."""

        def encode(read: tuple[list[str], Tensor]) -> tuple[list[str], Tensor]:
            keys, pixels_BCHW = read
            return keys, encoder.images(pixels_BCHW)

        split = self.split
        parts = read_and_encode_over_ranks(self.num_images, encoder.batch, partial(self.images, size=encoder.size), encode)
        keys = [key for some_keys, _ in parts for key in some_keys]
        image_NE = torch.cat([vectors_BE for _, vectors_BE in parts])
        text_GE = encoder.texts([entry.text for entry in split.gallery])
        number = {concept: i for i, concept in enumerate(dict.fromkeys(entry.concept for entry in split.gallery))}
        image_concept_N = torch.tensor([number[split.concepts[key]] for key in keys])
        text_concept_G = torch.tensor([number[entry.concept] for entry in split.gallery])

        figures = retrieval_figures(split.name, image_NE, text_GE, image_concept_N, text_concept_G)
        for task in split.zero_shot:
            class_CE = class_vectors(task.classes, task.templates, encoder.texts)
            label_N = torch.tensor([task.labels[key] for key in keys])
            outcomes = Outcomes(label_ranks(image_NE, class_CE, label_N), label_N, len(task.classes))
            figures.append(top_figure(split.name, f"zero-shot {task.name}", outcomes))
        return figures


def open_splits(patterns: Sequence[str], cache: ShardCache) -> list[SplitData]:
    """The splits that patterns (paths, globs, `package:`) name; `cache` keeps what is made from their shards.

    Raises:
        ConfigError: a pattern matches nothing, or a file is no split.
    """
    splits = []
    for pattern in patterns:
        paths = [path for path in sorted(glob.glob(resolve_path(pattern))) if not path.endswith("_stats.json")]
        if not paths:
            raise ConfigError(f"{_KEY}: nothing matches {pattern!r}")
        splits += [SplitData(Path(path), cache) for path in paths]
    return splits
