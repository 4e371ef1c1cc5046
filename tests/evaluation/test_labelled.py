"""Labelled image sets: every layout gives the same images, and what is wrong with one is said."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from classified import PROMPTS, digits, write_folder, write_parquet, write_tars
from scaleclip.data.cache import ShardCache
from scaleclip.errors import ConfigError, RunError
from scaleclip.evaluation.labelled import open_labelled

IMAGES, LABELS = digits(130)
SIZE = 32


def all_images(path: Path | str, cache: ShardCache) -> tuple[torch.Tensor, torch.Tensor]:
    data = open_labelled("digits", str(path), cache)
    batches = [data.images(start, start + 48, SIZE) for start in range(0, data.num_images, 48)]
    return torch.cat([pixels for pixels, _ in batches]), torch.cat([labels for _, labels in batches])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """URL of `tmp_path`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def test_layouts_give_the_same_images_and_labels(tmp_path: Path, cache: ShardCache, server: str) -> None:
    tars = write_tars(tmp_path / "tars", IMAGES, LABELS)
    folder = write_folder(tmp_path / "folder", IMAGES, LABELS)
    structs = write_parquet(tmp_path / "hf" / "test-00000-of-00001.parquet", IMAGES, LABELS)
    plain = write_parquet(tmp_path / "plain.parquet", IMAGES, LABELS, as_struct=False)
    pixels, labels = all_images(tars, cache)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (130, 3, SIZE, SIZE)
    assert labels.dtype == torch.int64
    assert labels.tolist() == LABELS
    assert pixels.float().std() > 50
    for path in (f"{tars}/*.tar", f"{tars}/{{0..2}}.tar", structs.parent, structs, plain, f"{server}/tars/test"):
        others, their_labels = all_images(path, cache)
        assert torch.equal(others, pixels)
        assert torch.equal(their_labels, labels)
    others, their_labels = all_images(folder, cache)
    order = torch.tensor(LABELS).argsort(stable=True)
    assert torch.equal(others, pixels[order])
    assert torch.equal(their_labels, labels[order])


def test_names_and_templates_beside_images_are_found(tmp_path: Path, cache: ShardCache, server: str) -> None:
    tars = write_tars(tmp_path / "tars", IMAGES, LABELS)
    for path in (tars, f"{tars}/*.tar", f"{server}/tars/test", f"{server}/tars/test/0.tar"):
        data = open_labelled("digits", str(path), cache)
        assert data.class_names == data.written_classes == PROMPTS.classes
        assert data.written_templates == ("the digit {c}", "a photo of {c}.")
    data = open_labelled("digits", str(write_folder(tmp_path / "folder", IMAGES, LABELS)), cache)
    assert data.class_names == tuple("0123456789")
    assert data.written_classes is None
    data = open_labelled("digits", str(write_parquet(tmp_path / "p" / "a.parquet", IMAGES, LABELS)), cache)
    assert data.class_names == PROMPTS.classes


def test_folders_are_sorted_and_numbers_by_number(tmp_path: Path, cache: ShardCache) -> None:
    for name in ("10", "9", "1"):
        (tmp_path / "numbers" / name / "deep").mkdir(parents=True)
        (tmp_path / "numbers" / name / "deep" / f"{name}.PNG").write_bytes(IMAGES[0])
        (tmp_path / "numbers" / name / "notes.txt").write_text("no image")
    data = open_labelled("flowers", str(tmp_path / "numbers"), cache)
    assert data.class_names == ("1", "9", "10")
    assert [Path(data.where(number)).name for number in range(3)] == ["1.PNG", "9.PNG", "10.PNG"]
    for name in ("b", "10", "A"):
        (tmp_path / "words" / name).mkdir(parents=True)
        (tmp_path / "words" / name / "0.png").write_bytes(IMAGES[0])
    assert open_labelled("words", str(tmp_path / "words"), cache).class_names == ("10", "A", "b")


def test_a_fingerprint_changes_with_the_images(tmp_path: Path, cache: ShardCache) -> None:
    folder = write_folder(tmp_path / "folder", IMAGES, LABELS)
    tars = write_tars(tmp_path / "tars", IMAGES, LABELS)
    table = write_parquet(tmp_path / "a.parquet", IMAGES, LABELS)

    def fingerprints() -> list[str]:
        return [open_labelled("digits", str(path), cache).fingerprint() for path in (folder, tars, table)]

    before = fingerprints()
    assert before == fingerprints()
    (folder / "3" / "00003.png").write_bytes(IMAGES[4])
    write_tars(tmp_path / "other", IMAGES, [*LABELS[1:], LABELS[0]])
    (tmp_path / "other" / "test" / "0.tar").replace(tars / "0.tar")
    write_parquet(table, IMAGES, [*LABELS[1:], LABELS[0]])
    assert not set(before) & set(fingerprints())


@pytest.mark.parametrize("layout", ["folder", "tars", "parquet"])
def test_a_broken_image_is_named(tmp_path: Path, cache: ShardCache, layout: str) -> None:
    images = [*IMAGES[:59], IMAGES[59][:60], *IMAGES[60:]]
    path, place = {
        "folder": lambda: (write_folder(tmp_path, images, LABELS), f"{LABELS[59]}/00059.png"),
        "tars": lambda: (write_tars(tmp_path, images, LABELS), "1.tar sample 15"),
        "parquet": lambda: (write_parquet(tmp_path / "a.parquet", images, LABELS), "a.parquet row 59"),
    }[layout]()
    with pytest.raises(RunError, match=rf"data set digits: .*{place} cannot be used: undecodable_image.*mend or remove it"):
        all_images(path, cache)


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_outside_of_the_classes_is_named(tmp_path: Path, cache: ShardCache, label: int) -> None:
    labels = [*LABELS[:59], label, *LABELS[60:]]
    for path in (write_tars(tmp_path, IMAGES, labels), write_parquet(tmp_path / "a.parquet", IMAGES, labels)):
        with pytest.raises(RunError, match=rf"(1\.tar sample 15|row 59) has label {label}, which is not one of 0 to 9"):
            all_images(path, cache)


def test_classes_without_images_and_labels_without_classes_are_counted(tmp_path: Path, cache: ShardCache) -> None:
    data = open_labelled("digits", str(write_tars(tmp_path, IMAGES, LABELS)), cache)
    labels = torch.tensor(LABELS)
    data.check_labels(labels, 10)
    nameless = open_labelled(
        "digits", str(write_parquet(tmp_path / "p" / "q" / "a.parquet", IMAGES, LABELS, as_struct=False)), cache
    )
    with pytest.raises(RunError, match=r"2 of 12 classes have no image, such as 10: add images"):
        nameless.check_labels(labels, 12)
    with pytest.raises(RunError, match=r"1 of 10 classes have no image, such as 7 \('seven'\)"):
        data.check_labels(labels[labels != 7], 10)
    with pytest.raises(RunError, match=r"0\.tar sample 9 has label 9, which is not one of 0 to 8"):
        data.check_labels(labels, 9)


def test_faults_of_folders_are_errors(tmp_path: Path, cache: ShardCache) -> None:
    with pytest.raises(ConfigError, match=r"holds neither folders of images nor tars nor Parquet"):
        open_labelled("digits", str(tmp_path), cache)
    write_folder(tmp_path / "test", IMAGES, LABELS)
    with pytest.raises(ConfigError, match=r"holds splits, not classes: name one of them, such as .*/test"):
        open_labelled("digits", str(tmp_path), cache)
    (tmp_path / "test" / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"class 'empty' has no image .*add some or delete the folder"):
        open_labelled("digits", str(tmp_path / "test"), cache)
    (tmp_path / "test" / "empty").rmdir()
    (tmp_path / "classnames.txt").write_text("zero\none\n")
    with pytest.raises(ConfigError, match=r"classnames\.txt has 2 lines for the 10 classes"):
        open_labelled("digits", str(tmp_path / "test"), cache)
    with pytest.raises(ConfigError, match="no shards match"):
        open_labelled("digits", str(tmp_path / "nowhere"), cache)
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"names files of \.zip: give a folder, tars or Parquet files"):
        open_labelled("digits", str(tmp_path / "a.zip"), cache)


def test_faults_of_tars_are_errors(tmp_path: Path, cache: ShardCache, server: str) -> None:
    tars = write_tars(tmp_path / "tars", IMAGES, LABELS)
    whole = (tars / "1.tar").read_bytes()
    (tars / "1.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"truncated_shard: .*1\.tar is cut off"):
        open_labelled("digits", str(tars), cache)
    (tars / "1.tar").unlink()
    with pytest.raises(ConfigError, match=r"no shards match .*1\.tar"):
        open_labelled("digits", str(tars), cache)
    (tars / "nshards.txt").write_text("many")
    with pytest.raises(ConfigError, match=r"nshards\.txt does not say how many tars"):
        open_labelled("digits", str(tars), cache)
    (tars / "nshards.txt").unlink()
    with pytest.raises(ConfigError, match=r"name the tars themselves, .*/\{0\.\.N\}\.tar"):
        open_labelled("digits", f"{server}/tars/test", cache)
    (tmp_path / "tars" / "dataset_type.txt").write_text("multilabel\n")
    with pytest.raises(ConfigError, match=r"dataset_type\.txt says multilabel"):
        open_labelled("digits", str(tars), cache)
    for label, said in ((b"seven", "which is no class number"), (None, r"no \.cls with its class number")):
        folder = write_tars(tmp_path / f"{label}", IMAGES, LABELS, num_tars=1)
        damage(folder / "0.tar", label)
        with pytest.raises(RunError, match=rf"0\.tar sample 0 cannot be used: no_label: .*{said}"):
            open_labelled("digits", str(folder), cache).images(0, 1, SIZE)


def damage(tar: Path, label: bytes | None) -> None:
    """Replace the first label's text, or call the file something else."""
    content = tar.read_bytes()
    at = content.index(b"s0000000.cls")
    if label is None:
        header = content[at : at + 512].replace(b"s0000000.cls", b"s0000000.clt")
        checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
        header = header[:148] + b"%06o\0 " % checksum + header[156:]
        content = content[:at] + header + content[at + 512 :]
    else:
        header = content[at : at + 512]
        resized = header[:124] + b"%011o\0" % len(label) + header[136:]
        checksum = sum(resized) - sum(resized[148:156]) + 8 * ord(" ")
        resized = resized[:148] + b"%06o\0 " % checksum + resized[156:]
        content = content[:at] + resized + label.ljust(512, b"\0") + content[at + 1024 :]
    tar.write_bytes(content)


def test_faults_of_parquet_are_errors(tmp_path: Path, cache: ShardCache) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": IMAGES[:3], "size": [1, 2, 3], "age": [1, 2, 3]}), path)
    with pytest.raises(ConfigError, match=r"has the columns image, size, age: one must hold images .* called label"):
        open_labelled("digits", str(path), cache)
    pq.write_table(pa.table({"image": [{"path": "a.png"}], "label": [1]}), path)
    with pytest.raises(ConfigError, match="has the columns image, label"):
        open_labelled("digits", str(path), cache)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array([{"bytes": None, "path": "a.png"}], kind), "label": [1]}), path)
    with pytest.raises(RunError, match=r"a\.parquet row 0 cannot be used: no_image: .*embed the images"):
        open_labelled("digits", str(path), cache).images(0, 1, SIZE)
    pq.write_table(pa.table({"image": IMAGES[:2], "label": [1, None]}), path)
    with pytest.raises(RunError, match=r"a\.parquet row 1 cannot be used: no_label"):
        open_labelled("digits", str(path), cache).images(0, 2, SIZE)
    pq.write_table(pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}), path)
    with pytest.raises(ConfigError, match="holds no images"):
        open_labelled("digits", str(path), cache)
    write_parquet(tmp_path / "b.parquet", IMAGES, LABELS)
    with pytest.raises(ConfigError, match=r"b\.parquet has other columns or class names than .*a\.parquet"):
        open_labelled("digits", str(tmp_path), cache)
    path.write_bytes(b"no table")
    with pytest.raises(ConfigError, match=r"a\.parquet cannot be read as Parquet"):
        open_labelled("digits", str(path), cache)
