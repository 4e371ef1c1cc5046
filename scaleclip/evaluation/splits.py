"""Held-out splits: tar shards with a JSON description that fixes galleries, evaluation texts, classes and templates.

Measured are retrieval both ways and zero-shot accuracy, with chance beside every figure.
"""

import glob
import json
from collections.abc import Sequence
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
from scaleclip.evaluation.over_ranks import encode_over_ranks
from scaleclip.evaluation.pixels import square_pixels
from scaleclip.evaluation.results import Figure
from scaleclip.evaluation.retrieval import retrieval_figures
from scaleclip.evaluation.zero_shot import accuracy, class_vectors, majority_share
from scaleclip.files import resolve_path


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
            self.definition = path.read_text()
            self.split = Split.model_validate(json.loads(self.definition))
        except (OSError, ValueError, ValidationError) as error:
            raise ConfigError(f"eval.splits: {path} cannot be read as a split: {error}") from None
        strange = set(self.split.concepts.values()) - {entry.concept for entry in self.split.gallery}
        if strange:
            raise ConfigError(f"eval.splits: {path}: images show concepts without a gallery text, such as {min(strange)!r}")
        patterns = [f"{path.with_suffix('')}-*.tar"]
        self.manifest, self._reader = open_shards(f"eval.splits: {path}", patterns, None, cache)

    @property
    def name(self) -> str:
        """Of the split."""
        return self.split.name

    @property
    def num_images(self) -> int:
        """Images of the split."""
        return self.manifest.num_samples

    def images(self, start: int, stop: int, size: int) -> tuple[list[str], Tensor]:
        """Keys and uint8 [B, 3, size, size] pixels of images `start` to `stop`, centre-cropped, in shard order.

        Raises:
            RunError: an image cannot be used; figures over a part of a split would not be comparable.
        """
        keys: list[str] = []
        pixels: list[Tensor] = []
        for number in range(start, min(stop, self.num_images)):
            shard = int(np.searchsorted(self.manifest.first_sample, number, side="right")) - 1
            index = number - int(self.manifest.first_sample[shard])
            try:
                sample = self._reader(shard, index)
                image = square_pixels(sample.image(SourceConfig().image), size)
            except SampleError as error:
                raise RunError(f"split {self.split.name}, image {index} of shard {shard} cannot be used: {error}") from None
            if sample.key not in self.split.concepts or any(sample.key not in t.labels for t in self.split.zero_shot):
                raise RunError(f"split {self.split.name} does not say what image {sample.key} shows: mend its .json")
            keys.append(sample.key)
            pixels.append(image)
        return keys, torch.stack(pixels)

    def run(self, encoder: Encoder, features: Path | None = None) -> list[Figure]:
        """Its figures; see scaleclip.evaluation.evaluate.Evaluation. A split is encoded anew each time."""

        def encode_images(start: int, stop: int) -> tuple[list[str], Tensor]:
            keys, pixels_BCHW = self.images(start, stop, encoder.size)
            return keys, encoder.images(pixels_BCHW)

        split = self.split
        parts = encode_over_ranks(self.num_images, encoder.batch, encode_images)
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
            value, chance = accuracy(image_NE, class_CE, label_N), 1 / len(task.classes)
            figures.append(Figure(split.name, f"zero-shot {task.name}", value, chance, majority_share(label_N)))
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
            raise ConfigError(f"eval.splits: nothing matches {pattern!r}")
        splits += [SplitData(Path(path), cache) for path in paths]
    return splits
