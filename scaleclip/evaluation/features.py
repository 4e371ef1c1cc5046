"""Features of a labelled image set, encoded once and kept in a folder.

A part is 1024 images in a safetensors file; a job that is killed loses the part that each rank was at. Parts lie in a folder
whose name is a digest of what they depend on: weights and configuration of the image side, the images, their size, and which
feature it is. So a stale cache is never found. Ranks share the folder.

Shapes: N images, B images of a part, D width of the feature.
"""

import hashlib
from pathlib import Path
from typing import Literal, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scaleclip.distributed import on_main
from scaleclip.errors import RunError
from scaleclip.evaluation.encoder import Encoder
from scaleclip.evaluation.labelled import LabelledImages
from scaleclip.evaluation.over_ranks import ahead, encode_over_ranks
from scaleclip.files import write_atomic

_PART = 1024
# of the files' layout and of what makes the pixels: another one makes old files unfindable
_VERSION = 1
Kind = Literal["embedding", "pooled"]


class Features(NamedTuple):
    """Features of a data set, in files or in memory."""

    label_N: Tensor
    """int64."""
    parts: tuple[Path | Tensor, ...]
    """Each of 1024 images, the last one of the rest."""

    def part(self, number: int) -> tuple[Tensor, Tensor]:
        """Features fp32 (B, D) and labels int64 (B,) of a part. Raises RunError where its file cannot be read."""
        part = self.parts[number]
        feature_BD = part if isinstance(part, Tensor) else _read(part, "features")
        return feature_BD, self.label_N[rows_of(number)]

    def whole(self) -> Tensor:
        """All of them, fp32 (N, D)."""
        return torch.cat([self.part(number)[0] for number in range(len(self.parts))])


def rows_of(part: int) -> slice:
    """The images of a part."""
    return slice(part * _PART, (part + 1) * _PART)


def encode_features(encoder: Encoder, data: LabelledImages, kind: Kind, folder: Path | None) -> Features:
    """Features of every image, from `folder` as far as they are there. All ranks call and get the same.

    Args:
        encoder: what encodes.
        data: the images.
        kind: `embedding`, the projection's output of unit length, or `pooled`, the image tower's output before it.
        folder: where parts are kept, on a disk that all ranks see; None keeps all in every rank's memory, N x D floats.

    Raises:
        RunError: an image cannot be used, or a part cannot be read.
    """
    encode = encoder.images if kind == "embedding" else encoder.pooled_images
    place = None if folder is None else _place(encoder, data, kind, folder)

    def encode_part(start: int, stop: int) -> tuple[Path | Tensor, Tensor]:
        path = None if place is None else place / f"{start // _PART:06d}.safetensors"
        if path is not None and path.exists():
            return path, _read(path, "labels")
        spans = [(first, min(first + encoder.batch, stop)) for first in range(start, stop, encoder.batch)]
        read = ahead(lambda first, last: data.images(first, last, encoder.size), spans)
        batches = [(encode(pixels_BCHW), label_B) for pixels_BCHW, label_B in read]
        feature_BD, label_B = (torch.cat(each) for each in zip(*batches, strict=True))
        if path is None:
            return feature_BD, label_B
        write_atomic(path, safetensors.torch.save({"features": feature_BD, "labels": label_B}))
        return path, label_B

    with encoder.evaluating():
        parts, labels = zip(*encode_over_ranks(data.num_images, _PART, encode_part), strict=True)
    return Features(torch.cat(labels), parts)


def _place(encoder: Encoder, data: LabelledImages, kind: Kind, folder: Path) -> Path:
    """Folder of these features, by rank 0: every rank would look at every file, and file systems may disagree on times."""

    def make() -> Path:
        depends_on = [_VERSION, kind, encoder.size, encoder.image_digest(), data.fingerprint()]
        place = folder / f"{kind}-{hashlib.sha256(repr(depends_on).encode()).hexdigest()[:24]}"
        place.mkdir(parents=True, exist_ok=True)
        return place

    return on_main(make)


def _read(path: Path, name: str) -> Tensor:
    """A tensor of a part; of the file only what is asked for is read."""
    try:
        with safe_open(path, framework="pt") as stored:
            tensor: Tensor = stored.get_tensor(name)
            return tensor
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{path} cannot be read ({error}): delete it, and it is made again; all ranks must see its folder"
        ) from error
