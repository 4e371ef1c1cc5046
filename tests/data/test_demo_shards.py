"""The embedded shards: img2dataset's layout, and held-out splits that the training shards do not leak into."""

import io
import json
import tarfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

DEMO = Path(__file__).parents[2] / "scaleclip" / "data" / "demo"
SHARDS = sorted(DEMO.glob("*/*.tar"))
SPLITS = ("unseen_vendor", "unseen_concept", "unseen_family", "unseen_clipart")
NUM_IMAGES = {
    "unseen_concept": range(600, 1001),
    "unseen_family": range(300, 501),
    "unseen_vendor": range(1200, 1400),
    "unseen_clipart": range(500, 501),
}
NUM_TEXTS = {
    "unseen_concept": range(200, 201),
    "unseen_family": range(100, 101),
    "unseen_vendor": range(1200, 1400),
    "unseen_clipart": range(500, 501),
}
NEAR_DUPLICATE = 6.0


class Sample(NamedTuple):
    shard: str
    txt: str
    fields: dict[str, Any]
    pixels: np.ndarray
    thumbnail: np.ndarray
    """(768,) float32: the means of 16x16 blocks of the image."""


def read_shard(path: Path) -> list[Sample]:
    with tarfile.open(path) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    samples = []
    for key in sorted({name.partition(".")[0] for name in files}):
        pixels = np.asarray(Image.open(io.BytesIO(files[f"{key}.webp"])))
        thumbnail = pixels.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3), dtype=np.float32).ravel()
        fields = json.loads(files[f"{key}.json"])
        samples.append(Sample(path.name, files[f"{key}.txt"].decode(), fields, pixels, thumbnail))
    return samples


def thumbnails(samples: list[Sample]) -> np.ndarray:
    return np.stack([sample.thumbnail for sample in samples])


def read_split(name: str) -> dict[str, Any]:
    return json.loads((DEMO / "eval" / f"{name}.json").read_bytes())


@pytest.fixture(scope="module")
def train() -> list[Sample]:
    return [sample for path in SHARDS if path.parent.name == "train" for sample in read_shard(path)]


@pytest.fixture(scope="module")
def held_out() -> dict[str, list[Sample]]:
    return {name: read_shard(DEMO / "eval" / f"{name}-00000.tar") for name in SPLITS}


@pytest.fixture(scope="module")
def everything(train: list[Sample], held_out: dict[str, list[Sample]]) -> list[Sample]:
    return train + [sample for samples in held_out.values() for sample in samples]


@pytest.mark.parametrize("path", SHARDS, ids=lambda path: path.stem)
def test_shard_has_img2dataset_layout(path: Path) -> None:
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    names = [member.name for member in members]
    number = path.stem.rpartition("-")[2]
    num_samples = json.loads(path.with_name(f"{path.stem}_stats.json").read_bytes())["successes"]
    keys = [f"{number}{place:04d}" for place in range(num_samples)]
    assert names == [f"{key}.{suffix}" for key in keys for suffix in ("json", "txt", "webp")]
    assert {(member.mtime, member.uid, member.gid, member.mode) for member in members} == {(0, 0, 0, 0o644)}


def test_train_shards_are_one_set_a_vendor(train: list[Sample]) -> None:
    counts = Counter(sample.fields["source"] for sample in train)
    assert set(counts) == {"noto", "twemoji", "emojione", "fxemoji", "openclipart"}
    assert all(sample.shard.startswith(sample.fields["source"]) for sample in train)
    assert sum(counts.values()) > 9000


def test_images_are_64_pixel_rgb_and_show_something(everything: list[Sample]) -> None:
    assert {(sample.pixels.shape, sample.pixels.dtype.name) for sample in everything} == {((64, 64, 3), "uint8")}
    assert thumbnails(everything).std(axis=1).min() > 3


def test_caption_is_name_and_keywords(everything: list[Sample]) -> None:
    for sample in everything:
        texts = sample.fields["captions"]
        assert all(text.strip() for text in texts.values())
        expected = ", ".join(texts[view] for view in ("name", "keywords") if view in texts)
        assert sample.txt == sample.fields["caption"] == expected


def test_every_licence_is_free_and_its_text_is_here(everything: list[Sample]) -> None:
    licenses = {sample.fields["license"] for sample in everything}
    assert licenses == {"Apache-2.0", "MIT", "CC-BY-4.0", "CC-PDDC"}
    assert {path.stem for path in (DEMO / "LICENSES").glob("*.txt")} == licenses


def test_every_picture_of_a_vendor_is_in_one_place(everything: list[Sample]) -> None:
    pictures = Counter((sample.fields["source"], sample.pixels.tobytes()) for sample in everything)
    assert max(pictures.values()) == 1


@pytest.mark.parametrize("name", SPLITS)
def test_split_description_covers_its_shard(name: str, held_out: dict[str, list[Sample]]) -> None:
    split, samples = read_split(name), held_out[name]
    assert len(samples) in NUM_IMAGES[name]
    assert len(split["gallery"]) in NUM_TEXTS[name]
    assert split["concepts"] == {sample.fields["key"]: sample.fields["concept"] for sample in samples}
    text_of = {entry["concept"]: entry["text"] for entry in split["gallery"]}
    assert len(set(text_of.values())) == len(text_of) == len(split["gallery"])
    assert all(text_of[sample.fields["concept"]] == sample.txt for sample in samples)


@pytest.mark.parametrize("name", SPLITS)
def test_zero_shot_labels_name_the_class_of_the_sample(name: str, held_out: dict[str, list[Sample]]) -> None:
    for task in read_split(name)["zero_shot"]:
        field = "group" if task["name"] == "category" else task["name"]
        assert {key: task["classes"][label] for key, label in task["labels"].items()} == {
            sample.fields["key"]: sample.fields[field] for sample in held_out[name]
        }
        assert len(set(task["classes"])) == len(task["classes"]) >= 9
        assert not any("-" in title for title in task["classes"])
        assert all("{}" in template for template in task["templates"])


@pytest.mark.parametrize("name", ["unseen_concept", "unseen_family", "unseen_clipart"])
def test_held_out_concepts_and_texts_are_not_trained_on(name: str, train: list[Sample]) -> None:
    gallery = read_split(name)["gallery"]
    assert {entry["concept"] for entry in gallery}.isdisjoint(sample.fields["concept"] for sample in train)
    assert {entry["text"].lower() for entry in gallery}.isdisjoint(sample.txt.lower() for sample in train)


def test_unseen_vendor_shows_none_of_the_unseen_concepts(held_out: dict[str, list[Sample]]) -> None:
    assert {sample.fields["source"] for sample in held_out["unseen_vendor"]} == {"fluent-emoji-flat"}
    vendor, concept, family = (
        {sample.fields["concept"] for sample in held_out[name]} for name in ("unseen_vendor", "unseen_concept", "unseen_family")
    )
    assert vendor.isdisjoint(concept | family)
    assert concept.isdisjoint(family)


@pytest.mark.parametrize("name", ["unseen_family", "unseen_clipart"])
def test_no_near_duplicate_in_train(name: str, held_out: dict[str, list[Sample]], train: list[Sample]) -> None:
    queries = thumbnails(held_out[name])
    assert count_near_duplicates(queries, thumbnails(train)) == 0
    if name == "unseen_clipart":
        assert count_near_duplicates(queries, queries) == len(queries), "a picture is near to itself alone"


def count_near_duplicates(queries: np.ndarray, pool: np.ndarray) -> int:
    # Averaging over blocks can only lower the mean absolute difference, so the coarse pass loses nothing.
    coarse_queries, coarse_pool = (
        images.reshape(-1, 4, 4, 4, 4, 3).mean(axis=(2, 4)).reshape(-1, 48) for images in (queries, pool)
    )
    count = 0
    for query, coarse_query in zip(queries, coarse_queries, strict=True):
        near = np.flatnonzero(np.abs(coarse_pool - coarse_query).sum(axis=1) < 48 * NEAR_DUPLICATE)
        count += int((np.abs(pool[near] - query).mean(axis=1) < NEAR_DUPLICATE).sum())
    return count


def test_packed_size_is_below_10_mb() -> None:
    """What git and a wheel store, which deflate every file; unpacked, tar headers and padding are the larger part."""
    packed = sum(len(zlib.compress(path.read_bytes())) for path in DEMO.rglob("*") if path.is_file())
    assert packed < 10_000_000
