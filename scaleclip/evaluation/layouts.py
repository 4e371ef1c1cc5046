"""How a labelled image set lies on disk: folders of images, clip-benchmark's tars, Parquet. README.md shows the trees."""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from scaleclip.config import SourceConfig
from scaleclip.data.cache import ShardCache
from scaleclip.data.image_rows import ImageRows
from scaleclip.data.sample import SampleError
from scaleclip.data.shards import expand_shards, is_remote, read_remote
from scaleclip.data.webdataset import TarReader
from scaleclip.errors import ConfigError
from scaleclip.evaluation.fingerprint import digest, shard_stamp, stamp

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_SPLITS = {"train", "test", "val", "validation"}
_COUNT = "nshards.txt"


class Item(NamedTuple):
    """An image as it is stored."""

    data: bytes
    label: int


class Layout(Protocol):
    """Random access to labelled images."""

    num_images: int
    class_names: tuple[str, ...] | None
    """What folders or metadata call the classes, by label."""

    def __call__(self, number: int) -> Item:
        """Raises SampleError when the image cannot be had."""

    def where(self, number: int) -> str:
        """The image's file or place in one, for people."""

    def fingerprint(self) -> str:
        """Digest that changes with the images: of names, sizes and times of files, and of counts."""


def open_layout(key: str, path: str, cache: ShardCache) -> Layout:
    """What lies at `path`: a folder of classes, or tars or Parquet files by folder, pattern or URL.

    Raises:
        ConfigError: nothing that is known, or something that is broken.
    """
    if not is_remote(path) and os.path.isdir(path):
        inside = glob.escape(path)
        if os.path.exists(os.path.join(path, _COUNT)) or glob.glob(os.path.join(inside, "*.tar")):
            return TarLayout(key, _counted_tars(key, path), cache)
        if glob.glob(os.path.join(inside, "*.parquet")):
            return ParquetLayout(key, expand_shards(key, [os.path.join(inside, "*.parquet")]), cache)
        return FolderLayout(key, Path(path))
    if is_remote(path) and not path.partition("?")[0].endswith((".tar", ".parquet")):
        return TarLayout(key, _counted_tars(key, path), cache)
    files = expand_shards(key, [path])
    kinds = {os.path.splitext(file.partition("?")[0] if is_remote(file) else file)[1] for file in files}
    if kinds == {".tar"}:
        return TarLayout(key, files, cache)
    if kinds == {".parquet"}:
        return ParquetLayout(key, files, cache)
    raise ConfigError(f"{key}: {path} names files of {', '.join(sorted(kinds))}: give a folder, tars or Parquet files")


class FolderLayout:
    """A folder a class, images at any depth in it. Labels number the folders by name; names that are numbers, by number."""

    def __init__(self, key: str, path: Path) -> None:
        names = [entry.name for entry in os.scandir(path) if entry.is_dir()]
        if not names:
            raise ConfigError(f"{key}: {path} holds neither folders of images nor tars nor Parquet files: check the path")
        if set(names) <= _SPLITS:
            raise ConfigError(f"{key}: {path} holds splits, not classes: name one of them, such as {path / min(names)}")
        # 10 comes after 9: Flowers-102's folders are the data set's own numbers
        names.sort(key=(lambda name: (int(name), name)) if all(name.isdecimal() for name in names) else None)
        self.class_names: tuple[str, ...] | None = tuple(names)
        self._path = path
        self._files: list[str] = []
        counts = []
        for name in names:
            found = sorted(_images_below(path / name))
            if not found:
                raise ConfigError(
                    f"{key}: class {name!r} has no image ({', '.join(_EXTENSIONS)}) in {path / name}: add some or delete the "
                    f"folder"
                )
            self._files += found
            counts.append(len(found))
        self._labels_N = np.repeat(np.arange(len(names)), counts)
        self.num_images = len(self._files)

    def __call__(self, number: int) -> Item:
        try:
            return Item(Path(self._files[number]).read_bytes(), int(self._labels_N[number]))
        except OSError as error:
            raise SampleError("unreadable_file", error.strerror or str(error)) from error

    def where(self, number: int) -> str:
        return self._files[number]

    def fingerprint(self) -> str:
        return digest((os.path.relpath(file, self._path), *stamp(file)) for file in self._files)


class TarLayout:
    """Tars of webdataset's layout with a number in `KEY.cls` beside each image, as clip-benchmark writes them."""

    class_names: tuple[str, ...] | None = None

    def __init__(self, key: str, shards: Sequence[str], cache: ShardCache) -> None:
        self._shards, self._cache = shards, cache
        self._reader = TarReader(shards, cache)
        try:
            counts = np.array([self._reader.whole_count(shard) for shard in range(len(shards))], np.int64)
        except SampleError as error:
            raise ConfigError(f"{key}: {error}") from error
        self._counts, self._first = counts, np.cumsum(counts) - counts
        self.num_images = int(counts.sum())

    def __call__(self, number: int) -> Item:
        shard, ordinal = self._place(number)
        sample = self._reader(shard, ordinal)
        label = sample.members.get("cls")
        if label is None:
            raise SampleError("no_label", f"{sample.key} has {', '.join(sample.members)}, no .cls with its class number")
        try:
            return Item(sample.image(SourceConfig().image), int(label))
        except ValueError:
            raise SampleError("no_label", f"{sample.key}.cls holds {label[:40]!r}, which is no class number") from None

    def where(self, number: int) -> str:
        shard, ordinal = self._place(number)
        return f"{self._shards[shard]} sample {ordinal}"

    def fingerprint(self) -> str:
        return digest((count, *shard_stamp(shard)) for shard, count in zip(self._shards, self._counts.tolist(), strict=True))

    def _place(self, number: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        return shard, number - int(self._first[shard])


class ParquetLayout:
    """Rows with an image and a label."""

    def __init__(self, key: str, files: Sequence[str], cache: ShardCache) -> None:
        self._files, self._cache = files, cache
        self._rows = ImageRows(key, files, cache)
        self.class_names, self.num_images = self._rows.columns.class_names, self._rows.num_rows

    def __call__(self, number: int) -> Item:
        return Item(*self._rows(number))

    def where(self, number: int) -> str:
        return self._rows.where(number)

    def fingerprint(self) -> str:
        rows = [shard_stamp(file) for file in self._files]
        return digest([*rows, (self.num_images, *self._rows.columns[:2])])


def text_beside(key: str, path: str, name: str) -> list[str] | None:
    """Lines of a text file in a data set's folder or in the one above it, stripped; None where there is none.

    Raises:
        ConfigError: the file is there and cannot be read.
    """
    base = path.partition("?")[0].rstrip("/") if is_remote(path) else path.rstrip("/")
    folder = base if is_remote(path) or os.path.isdir(base) else os.path.dirname(base)
    if base.endswith((".tar", ".parquet")):
        folder = os.path.dirname(base)
    above = os.path.dirname(folder)
    # above a bucket there is nothing but `s3:`
    for place in (folder,) if above.endswith(":") else (folder, above):
        file = os.path.join(place, name)
        try:
            content = read_remote(file) if is_remote(file) else Path(file).read_bytes()
        except FileNotFoundError:
            continue
        # what the file systems behind fsspec raise has no common base
        except Exception as error:
            raise ConfigError(f"{key}: {file} cannot be read ({type(error).__name__}: {error})") from error
        lines = [line.strip() for line in content.decode("utf-8").splitlines()]
        while lines and not lines[-1]:
            lines.pop()
        return lines
    return None


def _counted_tars(key: str, folder: str) -> list[str]:
    """0.tar and so on of a folder, as many as its nshards.txt says; all tars of a local folder without one."""
    folder = folder.rstrip("/")
    file = f"{folder}/{_COUNT}"
    try:
        count = int(read_remote(file) if is_remote(file) else Path(file).read_bytes())
    except FileNotFoundError:
        if not is_remote(folder):
            return expand_shards(key, [folder])
        raise ConfigError(f"{key}: {file} does not exist: name the tars themselves, {folder}/{{0..N}}.tar") from None
    # what the file systems behind fsspec raise has no common base
    except Exception as error:
        raise ConfigError(f"{key}: {file} does not say how many tars there are ({type(error).__name__}: {error})") from error
    return expand_shards(key, [f"{folder}/{number}.tar" for number in range(count)])


def _images_below(folder: Path) -> Iterable[str]:
    for place, _, files in os.walk(folder, followlinks=True):
        yield from (os.path.join(place, file) for file in files if file.lower().endswith(_EXTENSIONS))
