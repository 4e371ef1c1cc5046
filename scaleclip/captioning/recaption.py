"""New captions of images, by a vision-language model (Recap-DataComp-1B, arXiv:2406.08478)."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from scaleclip.captioning import filters
from scaleclip.captioning.examples import one_line
from scaleclip.captioning.filters import Limits
from scaleclip.captioning.generation import Sampling
from scaleclip.captioning.job import batch_seed, without_text
from scaleclip.captioning.journal import Made
from scaleclip.captioning.vision_language_model import VisionLanguageModel
from scaleclip.config import DataConfig, SourceConfig
from scaleclip.data.read_ahead import BadSample, Chunk, Piece, cut
from scaleclip.data.sample import Sample
from scaleclip.data.transform import Crop, open_image
from scaleclip.errors import ConfigError

PROMPT = "Please generate a detailed caption of this image. Please be as descriptive as possible."
"""Recap-DataComp-1B's."""
SOURCE = "recaption"
LIMITS = Limits(must_end=False, max_words=500, max_characters=4000)
"""A description that is cut off at its last token is used, as Recap-DataComp's were."""
_REFUSED = "refused_image"
_log = logging.getLogger(__name__)


class Images(NamedTuple):
    """Of a piece, as the model takes them."""

    inputs: dict[str, Tensor]
    """Without those that the processor refuses; empty if it refuses all."""
    refused: Mapping[int, str]
    """What the processor raised of those, by place."""
    fault: str = ""
    """What it raised of the others together, each of which it takes alone."""


class Recaptioning:
    """A caption of each image.

    Args:
        model: writes.
        model_name: what the user calls it.
        model_digest: of its folder.
        prompt: what the model was built to be asked.
        sampling: of tokens; Recap-DataComp's are the likeliest, 128 at most.
        image: names that an image may have in a sample.
        batch: images described at once.
        seed: of all that is drawn.
        limits: when a caption is not fit for training.
    """

    sources: Sequence[str] = (SOURCE,)

    def __init__(
        self,
        model: VisionLanguageModel,
        model_name: str,
        model_digest: str,
        prompt: str,
        sampling: Sampling,
        *,
        image: Sequence[str] = SourceConfig().image,
        batch: int = 32,
        seed: int = 0,
        limits: Limits = LIMITS,
    ) -> None:
        self.model_name, self.batch, self.seed = model_name, batch, seed
        self._model, self._digest, self._sampling, self._limits = model, model_digest, sampling, limits
        self._prompt, self._members, self._max_pixels = prompt, tuple(image), DataConfig().max_pixels
        self._has_refused = False
        self.prompt_name = f"{SOURCE}-{hashlib.sha256(model.asked.encode()).hexdigest()[:8]}"

    @property
    def identity(self) -> Mapping[str, Any]:
        """What all captions in a folder share."""
        return {
            "task": "recaption", "model_digest": self._digest, "dtype": self._model.dtype,
            "prompts": {self.prompt_name: self._model.asked}, "sources": {SOURCE: {}}, "image": list(self._members),
            "sampling": {**self._sampling.as_json(), "seed": self.seed}, "limits": asdict(self._limits),
        }  # fmt: skip

    def pieces(self, shard: int, num_samples: int, done: int) -> list[Piece]:
        """Batches, in the shard's order: images are of one length."""
        return cut(shard, num_samples, self.batch)[done:]

    def prepare(self, sample: Sample, shard: int, ordinal: int) -> Image.Image:
        """All of the image. Raises SampleError where it cannot be read."""
        picture = open_image(sample.image(self._members), self._max_pixels)
        whole = Crop(0, 0, picture.height, picture.width, flip=False)
        return Image.fromarray(picture.decode(whole, max(picture.height, picture.width)).permute(1, 2, 0).numpy())

    def collate(self, items: Sequence[Image.Image]) -> Images:
        """Inputs of the model."""
        # one that the processor cannot take must not cost the others
        inputs, fault = self._inputs(items)
        if not fault:
            return Images(inputs, {})
        refused = {place: why for place, item in enumerate(items) if (why := self._inputs([item])[1])}
        kept = [item for place, item in enumerate(items) if place not in refused]
        inputs, fault = self._inputs(kept) if kept else ({}, "")
        return Images(inputs, refused, fault)

    def make(self, shard: str, chunk: Chunk[Images], done: int) -> Iterator[list[Made]]:
        """The batch."""
        images = chunk.content or Images({}, {})
        if images.fault:
            raise ConfigError(
                f"{self.model_name}: its processor takes images of {shard} each alone, but not {len(chunk.keys)} together: "
                f"{images.fault}; give --batch 1, or take another model"
            )
        refused = [
            BadSample(chunk.keys[place], shard, chunk.ordinals[place], _REFUSED, why) for place, why in images.refused.items()
        ]
        for first in refused[: not self._has_refused]:
            self._has_refused = True
            _log.warning("image %s of %s is refused by the model's processor: %s", first.key, shard, first.detail)
        rows = without_text([*chunk.bad, *refused], self.sources)
        if images.inputs:
            written = self._model.write(images.inputs, self._sampling, batch_seed(self.seed, shard, SOURCE, chunk.piece.start))
            places = [place for place in range(len(chunk.keys)) if place not in images.refused]
            for place, new in zip(places, written, strict=True):
                reason = filters.fault(
                    new.text, self._prompt, task=one_line(self._prompt), labels=(), examples=_no_example, ended=new.ended,
                    limits=self._limits,
                )  # fmt: skip
                rows.append(Made(chunk.ordinals[place], chunk.keys[place], SOURCE, new.text, reason, new.tokens))
        yield rows

    def _inputs(self, images: Sequence[Image.Image]) -> tuple[dict[str, Tensor], str]:
        """What the model takes, or what its processor raised."""
        try:
            return self._model.inputs(images), ""
        except MemoryError:
            raise
        # what processors raise has no common base
        except Exception as error:
            return {}, f"{type(error).__name__}: {error}"


def _no_example(text: str) -> bool:
    return False
