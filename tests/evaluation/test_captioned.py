"""Layouts of images with captions, what is wrong with them, and retrieval on them."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from evaluation_models import tiny_encoder
from helpers import encode_image, write_tar
from scaleclip.errors import ConfigError, RunError
from scaleclip.evaluation.captioned import CaptionedImages, evaluate_retrieval

CAPTIONS = [["a cat", "a small cat"], ["a dog"], ["a red bird", "a bird", "one bird on a tree"], ["a fish", "a fish"]]
NUM_CAPTIONS = sum(map(len, CAPTIONS))


def karpathy(folder, images="images", filepath=None, **changes):
    (folder / images).mkdir(parents=True)
    rows = [{"filename": "train.jpg", "split": "train", "sentences": [{"raw": "not this"}]}]
    for number, captions in enumerate(CAPTIONS):
        (folder / images / f"{number}.jpg").write_bytes(encode_image(number, "JPEG"))
        rows.append({"filename": f"{number}.jpg", "split": "test", "sentences": [{"raw": text} for text in captions]})
        if filepath:
            rows[-1]["filepath"] = filepath
    rows[2] |= changes
    path = folder / "dataset_mine.json"
    path.write_text(json.dumps({"dataset": "mine", "images": rows}))
    return path


def tars(folder, split=""):
    (folder / split).mkdir(parents=True)
    for shard, numbers in enumerate(([0, 1, 2], [3])):
        samples = [(f"s{n:06d}", {"jpg": encode_image(n, "JPEG"), "txt": "\n".join(CAPTIONS[n]).encode()}) for n in numbers]
        write_tar(folder / split / f"{shard}.tar", samples)
        (folder / split / f"{shard}_stats.json").unlink()  # clip-benchmark writes none
    return folder


def urban(folder):
    for part in ("image", "caption"):
        (folder / part).mkdir(parents=True)
    for number in range(4):
        (folder / "image" / f"{number}.jpg").write_bytes(encode_image(number, "JPEG"))
        (folder / "caption" / f"{number}.txt").write_text(f"Urban scene\n{number}. ")
    return folder


def rows(path, *, as_path=False, nested=False):
    images = [encode_image(number, "JPEG") for number in range(4)]
    if as_path:
        for number, image in enumerate(images):
            (path.parent / f"{number}.jpg").write_bytes(image)
    cells = [
        f"{number}.jpg" if as_path else ({"bytes": image, "path": None} if nested else image)
        for number, image in enumerate(images)
    ]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"image": c, "captions": t}) + "\n" for c, t in zip(cells, CAPTIONS, strict=True)))
    else:
        pq.write_table(pa.table({"image": cells, "captions": CAPTIONS}), path)
    return path


LAYOUTS = {
    "karpathy": lambda folder: karpathy(folder / "k"),
    "karpathy_folder": lambda folder: karpathy(folder / "k").parent,
    "karpathy_filepath": lambda folder: karpathy(folder / "k", "val2014", filepath="val2014"),
    "karpathy_root": lambda folder: karpathy(folder / "k", "."),
    "tars": lambda folder: tars(folder / "t"),
    "tars_of_a_split": lambda folder: tars(folder / "t", "test"),
    "tars_by_pattern": lambda folder: tars(folder / "t") / "{0..1}.tar",
    "parquet": lambda folder: rows(folder / "p.parquet"),
    "parquet_nested": lambda folder: rows(folder / "p.parquet", nested=True),
    "jsonl": lambda folder: rows(folder / "p.jsonl", as_path=True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same(layout, tmp_path, cache):
    data = CaptionedImages("mine", str(LAYOUTS[layout](tmp_path)), "test", cache)
    expected = CaptionedImages("mine", str(rows(tmp_path / "expected.parquet")), "test", cache)
    assert data.num_images == 4
    for start, stop in ((0, 3), (3, 9)):
        pixels, captions = data.read(start, stop, 32)
        assert captions == CAPTIONS[start:stop]
        assert (pixels.shape, pixels.dtype) == ((len(captions), 3, 32, 32), torch.uint8)
        assert torch.equal(pixels, expected.read(start, stop, 32)[0])


def test_urban_pairs_files_by_stem(tmp_path, cache):
    data = CaptionedImages("urban", str(urban(tmp_path)), "test", cache)
    assert data.read(0, 4, 32)[1] == [[f"Urban scene {number}."] for number in range(4)]


def no_image(folder):
    karpathy(folder / "k")
    (folder / "k" / "images" / "2.jpg").unlink()
    return folder / "k"


def no_stem(folder):
    urban(folder / "u")
    (folder / "u" / "image" / "3.jpg").unlink()
    return folder / "u"


def no_caption_file(folder):
    urban(folder / "u")
    (folder / "u" / "caption" / "0.txt").unlink()
    return folder / "u"


def text(path, content):
    path.write_text(content)
    return path


def empty(folder):
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_image, r"mine: .*dataset_mine.json names 1 images that are not there, the first is .*/images/2.jpg"),
        (lambda folder: karpathy(folder / "k", sentences=[]), "has 1 images without captions, the first is 1.jpg"),
        (lambda folder: karpathy(folder / "k", sentences=[{"text": "x"}]), "is no file of Karpathy's: KeyError: 'raw'"),
        (lambda folder: text(folder / "dataset_x.json", "{}"), "is no file of Karpathy's: KeyError: 'images'"),
        (no_stem, "caption has 1 files without one of the same stem in image/, such as 3"),
        (no_caption_file, "image has 1 files without one of the same stem in caption/, such as 0"),
        (lambda folder: text(folder / "x.jsonl", '{"image": "a.jpg"}\n'), "has no column 'captions'"),
        (lambda folder: empty(folder / "x"), "holds no data set of captions; it should be Karpathy's"),
        (lambda folder: folder / "nowhere" / "{0..1}.tar", "mine: no shards match"),
    ],
)
def test_faults_of_a_layout_are_errors_when_it_is_opened(make, message, tmp_path, cache):
    with pytest.raises(ConfigError, match=message):
        CaptionedImages("mine", str(make(tmp_path)), "test", cache)


def test_a_split_that_is_not_there_names_those_that_are(tmp_path, cache):
    with pytest.raises(ConfigError, match=r"no images of split 'val'; it has test, train"):
        CaptionedImages("mine", str(karpathy(tmp_path / "k")), "val", cache)


def test_a_broken_image_stops(tmp_path, cache):
    path = karpathy(tmp_path / "k")
    (path.parent / "images" / "1.jpg").write_bytes(b"no image")
    data = CaptionedImages("mine", str(path), "test", cache)
    with pytest.raises(RunError, match=r"data set mine: .*1\.jpg cannot be used: undecodable_image"):
        data.read(0, 4, 32)


def test_a_tar_that_is_cut_off_is_an_error(tmp_path, cache):
    path = tars(tmp_path / "t") / "1.tar"
    path.write_bytes(path.read_bytes()[:1200])
    with pytest.raises(ConfigError, match=r"1\.tar is cut off"):
        CaptionedImages("cut", str(tmp_path / "t"), "test", cache)


def test_an_image_without_captions_stops(tmp_path, cache):
    write_tar(tmp_path / "0.tar", [("a", {"jpg": encode_image(0, "JPEG"), "txt": b"\n \n"})])
    with pytest.raises(RunError, match=r"data set mine: .*0\.tar sample 0 has no captions"):
        CaptionedImages("mine", str(tmp_path), "test", cache).read(0, 1, 32)


def test_any_caption_finds_and_a_caption_finds_its_own_image(tmp_path, cache):
    data = CaptionedImages("mine", str(rows(tmp_path / "p.parquet")), "test", cache)

    class Known:
        """Images and captions as unit vectors; the second caption of an image is right, the others point at image 3."""

        size, batch = 32, 3

        def __init__(self):
            self.seen = 0

        def images(self, pixels):
            self.seen += len(pixels)
            return torch.eye(4)[self.seen - len(pixels) : self.seen]

        def texts(self, texts):
            assert texts == [text for captions in CAPTIONS for text in captions]
            place = [3, 0, 1, 3, 2, 3, 3, 3]
            return torch.eye(4)[place] * torch.tensor([0.9, 1, 1, 0.8, 1, 0.7, 0.95, 1])[:, None]

    figures = {figure.metric: figure for figure in evaluate_retrieval(Known(), data)}
    assert figures["image -> text R@1"].value == 1
    # the first of image 0, and the first and third of image 2, find image 3
    assert figures["text -> image R@1"].value == (NUM_CAPTIONS - 3) / NUM_CAPTIONS
    assert figures["text -> image R@1"].chance == pytest.approx(1 / 4)
    assert figures["image -> text R@1"].chance == pytest.approx((2 + 1 + 3 + 2) / 4 / NUM_CAPTIONS)
    assert figures["text -> image R@5"].value == 1
    low, high = figures["text -> image R@1"].low, figures["text -> image R@1"].high
    assert 0 < low < 5 / 8 < high <= 1


def test_a_tiny_model_gives_every_figure(tmp_path, cache):
    data = CaptionedImages("mine", str(rows(tmp_path / "p.parquet")), "test", cache)
    encoder = tiny_encoder(tmp_path)
    with encoder.evaluating():
        figures = evaluate_retrieval(encoder, data)
    assert [re.sub(r" R@\d+", "", figure.metric) for figure in figures] == ["image -> text"] * 3 + ["text -> image"] * 3
    assert {figure.split for figure in figures} == {"mine"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": None, "captions": ["a"]}, r"mine\.parquet row 1 cannot be used: no_image"),
        ({"image": {"bytes": None, "path": None}, "captions": ["a"]}, "row 1 cannot be used: no_image"),
        ({"image": {"bytes": encode_image(0, "JPEG"), "path": None}, "captions": [None]}, "row 1 has no captions"),
        ({"image": {"bytes": encode_image(0, "JPEG"), "path": None}, "captions": None}, "row 1 has no captions"),
    ],
)
def test_a_row_without_something_is_named(row, message, tmp_path, cache):
    whole = {"image": {"bytes": encode_image(0, "JPEG"), "path": None}, "captions": ["a", None, "b"]}
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {"image": pa.array([whole["image"], row["image"]], kind), "captions": [whole["captions"], row["captions"]]}
    pq.write_table(pa.table(columns), tmp_path / "mine.parquet")
    data = CaptionedImages("mine", str(tmp_path / "mine.parquet"), "test", cache)
    assert data.read(0, 1, 32)[1] == [["a", "b"]]
    with pytest.raises(RunError, match=message):
        data.read(0, 2, 32)


def test_a_caption_that_is_no_text_is_named(tmp_path, cache):
    (urban(tmp_path / "u") / "caption" / "2.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(RunError, match=r"2\.jpg cannot be used: undecodable_text: .*2\.txt is not UTF-8"):
        CaptionedImages("mine", str(tmp_path / "u"), "test", cache).read(0, 4, 32)


def test_images_that_a_table_names_count(tmp_path, cache):
    path = rows(tmp_path / "mine.jsonl", as_path=True)
    before = CaptionedImages("mine", str(path), "test", cache).fingerprint()
    (tmp_path / "2.jpg").write_bytes(encode_image(9, "JPEG"))
    assert CaptionedImages("mine", str(path), "test", cache).fingerprint() != before
