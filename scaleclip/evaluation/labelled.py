"""Labelled image sets: what is classified."""

import torch
from torch import Tensor

from scaleclip.data.cache import ShardCache
from scaleclip.data.sample import SampleError
from scaleclip.errors import ConfigError, RunError
from scaleclip.evaluation.layouts import Layout, open_layout, text_beside
from scaleclip.evaluation.pixels import square_pixels
from scaleclip.files import resolve_path


class LabelledImages:
    """An opened data set: images by number, each with the number of its class.

    `written_classes` and `written_templates` are what classnames.txt and zeroshot_classification_templates.txt say, in the
    data set's folder or the one above; `stored_classes` is what folders or metadata call the classes, in the order of labels;
    `class_names` the former, or else the latter.
    """

    def __init__(self, name: str, path: str, layout: Layout) -> None:
        key = f"data set {name}"
        if layout.num_images == 0:
            raise ConfigError(f"{key}: {path} holds no images: check the path")
        kind = text_beside(key, path, "dataset_type.txt")
        if kind and kind[0] != "classification":
            raise ConfigError(f"{key}: dataset_type.txt says {kind[0]}: only one class an image is classified here")
        self.name = name
        self.num_images = layout.num_images
        self.written_classes = _tuple(text_beside(key, path, "classnames.txt"))
        self.written_templates = _tuple(text_beside(key, path, "zeroshot_classification_templates.txt"))
        self.stored_classes = layout.class_names
        self.class_names = self.written_classes or layout.class_names
        if self.written_classes and layout.class_names and len(self.written_classes) != len(layout.class_names):
            raise ConfigError(
                f"{key}: classnames.txt has {len(self.written_classes)} lines for the {len(layout.class_names)} classes of "
                f"{path}: one a class is needed, in the order of labels"
            )
        self._layout = layout

    def images(self, start: int, stop: int, size: int) -> tuple[Tensor, Tensor]:
        """Pixels uint8 (B, 3, size, size) of images `start` to `stop`, centre-cropped, and labels int64 (B,).

        Raises:
            RunError: an image cannot be used or has a label outside of the classes; figures over a part of a data set would
                not be comparable.
        """
        data, labels = [], []
        for number in range(start, min(stop, self.num_images)):
            try:
                item = self._layout(number)
            except SampleError as error:
                raise self._broken(number, error) from None
            data.append(item.data)
            labels.append(item.label)
            self._check_label(number, item.label)
        pixels_BCHW = square_pixels(data, size, lambda place, error: self._broken(start + place, error))
        return pixels_BCHW, torch.tensor(labels, dtype=torch.int64)

    def where(self, number: int) -> str:
        """The image's file or place in one, for people."""
        return self._layout.where(number)

    def fingerprint(self) -> str:
        """Digest that changes with the images."""
        return self._layout.fingerprint()

    def check_labels(self, labels_N: Tensor, num_classes: int) -> None:
        """Raises RunError where an image's label is none of the classes or a class has no image."""
        if len(outside := (labels_N >= num_classes).nonzero()):
            number = int(outside[0])
            raise RunError(self._outside(number, int(labels_N[number]), num_classes))
        if len(empty := (torch.bincount(labels_N, minlength=num_classes) == 0).nonzero()):
            first = int(empty[0])
            called = f" ({self.class_names[first]!r})" if self.class_names else ""
            raise RunError(
                f"data set {self.name}: {len(empty)} of {num_classes} classes have no image, such as {first}{called}: "
                f"add images, or take the class out of the class names"
            )

    def _broken(self, number: int, error: SampleError) -> RunError:
        return RunError(f"data set {self.name}: {self.where(number)} cannot be used: {error}; mend or remove it")

    def _check_label(self, number: int, label: int) -> None:
        if label < 0 or (self.class_names is not None and label >= len(self.class_names)):
            raise RunError(self._outside(number, label, len(self.class_names or ())))

    def _outside(self, number: int, label: int, num_classes: int) -> str:
        classes = f"one of 0 to {num_classes - 1}" if num_classes else "a class's number"
        return (
            f"data set {self.name}: {self.where(number)} has label {label}, which is not {classes}: mend the labels, the class "
            f"names, or take a split whose labels are public"
        )


def open_labelled(name: str, path: str, cache: ShardCache) -> LabelledImages:
    """The data set at `path`: a folder of classes; tars or Parquet files by folder, pattern or URL (README.md).

    Raises:
        ConfigError: nothing that can be read as a labelled image set is there.
    """
    path = resolve_path(path) if "://" not in path else path
    return LabelledImages(name, path, open_layout(f"data set {name}", path, cache))


def _tuple(lines: list[str] | None) -> tuple[str, ...] | None:
    return tuple(lines) if lines else None
