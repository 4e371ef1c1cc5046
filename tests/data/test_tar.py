"""Tars: their members from their bytes, the index of their samples, the reader; whole and damaged."""

import errno
import io
import os
import resource
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from helpers import encode_image, make_sample, write_tar
from scaleclip.data.index import index_tar, load_index
from scaleclip.data.sample import SampleError
from scaleclip.data.tar import TarDamage, split_name, walk
from scaleclip.data.webdataset import TarReader, index_path

NAMES = ["a.jpg", "folder/b.txt", "ü/ж.json", "d" * 90 + "/" + "e" * 90 + ".txt", "x" * 120 + ".jpg", "f" * 300 + ".txt"]


def tar_of(names, tar_format, **options):
    """Bytes of a tar with files of these names, a folder and a link; sizes from nothing to three blocks."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format, **options) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = number * 300, 1.5 if tar_format == tarfile.PAX_FORMAT else 1
            tar.addfile(member, io.BytesIO(bytes([number]) * member.size))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, names[0]
        tar.addfile(link)
        last = tarfile.TarInfo("last.txt")
        last.size = 7
        tar.addfile(last, io.BytesIO(b"the end"))
    return out.getvalue()


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["ustar", "gnu", "pax"]
)
@pytest.mark.parametrize("whole", [True, False])
def test_members_are_those_that_tarfile_finds(tar_format, whole):
    names = NAMES[:4] if tar_format == tarfile.USTAR_FORMAT else NAMES
    data = tar_of(names, tar_format)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(entry.name, entry.offset_data, entry.size) for entry in tar if entry.isreg()]
    assert [tuple(member)[:3] for member in walk(data, whole=whole)] == expected
    assert len(expected) == len(names) + 1


def test_a_size_that_octal_digits_cannot_hold_is_read():
    """Eight GiB and more are written in base 256; a small number may be, too."""
    data = bytearray(tar_of(["a.jpg", "b.jpg"], tarfile.GNU_FORMAT))
    at = data.index(b"b.jpg")
    assert int(data[at + 124 : at + 135], 8) == 300
    data[at + 124 : at + 136] = b"\x80" + (300).to_bytes(11, "big")
    checksum = sum(data[at : at + 512]) - sum(data[at + 148 : at + 156]) + 8 * 32
    data[at + 148 : at + 156] = f"{checksum:06o}\0 ".encode()
    assert [member.name for member in walk(bytes(data), whole=True)] == ["a.jpg", "b.jpg", "last.txt"]


@pytest.mark.parametrize("cut", [100, 512, 700, 1024 + 30])
def test_what_ends_too_soon_is_damage(cut):
    with pytest.raises(TarDamage):
        list(walk(tar_of(["a.jpg", "b.jpg"], tarfile.USTAR_FORMAT)[:cut], whole=True))


@pytest.mark.parametrize("at", [0, 124, 148, 156])
def test_a_damaged_header_is_found_by_its_checksum(at):
    data = bytearray(tar_of(["a.jpg", "b.jpg"], tarfile.USTAR_FORMAT))
    data[512 + at] ^= 0x15
    with pytest.raises(TarDamage):
        list(walk(bytes(data), whole=True))


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [("a/b.c/d.JPG", "a/b.c/d", "jpg"), ("d.seg.png", "d", "seg.png"), ("none", "none", ""), (".hidden", "", "hidden")],
)
def test_keys_follow_webdatasets_rule(name, key, extension):
    assert split_name(name) == (key, extension)


def test_an_index_is_found_again_and_is_small(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(f"{i:09d}", {"jpg": b"x", "txt": b"y"}) for i in range(5000)])
    index = index_tar(str(path))
    assert index.keys == tuple(f"{i:09d}" for i in range(5000))
    assert not index.truncated
    packed = index.pack()
    again = load_index(io.BytesIO(packed))
    assert again.keys == index.keys
    np.testing.assert_array_equal(again.block_S1, index.block_S1)
    assert len(packed) < 24 * 5000, "bytes a sample, the key included"


def test_a_key_that_comes_twice_is_two_samples(tmp_path):
    path = write_tar(tmp_path / "a.tar", [make_sample(1), make_sample(1), make_sample(2)])
    assert index_tar(str(path)).keys == ("000000001", "000000001", "000000002")


def test_what_webdataset_writes_and_reads_is_read_alike(tmp_path, cache):
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(20):
            key, files = make_sample(number)
            writer.write({"__key__": f"part/{key}", **files})
    read = TarReader([str(path)], cache)
    ours = [read(0, ordinal) for ordinal in range(20)]
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample.key for sample in ours] == [sample["__key__"] for sample in theirs] == list(read.keys(0))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.members == {name: value for name, value in other.items() if not name.startswith("__")}


def test_the_reader_returns_what_lies_in_the_tar(shards, cache):
    read = TarReader([str(path) for path in sorted(shards.glob("*.tar"))], cache)
    read.fetch(2)
    sample = read(2, 5)
    assert sample.key == "000000018"
    assert sample.image(("png", "jpg")) == encode_image(18, "JPEG")
    assert sample.members["txt"] == b"a picture of thing 18"
    with pytest.raises(SampleError, match=r"no_image.*has jpg, txt, json, none of png, webp"):
        sample.image(("png", "webp"))


def test_names_in_capitals_are_the_same_members(tmp_path, cache):
    path = write_tar(tmp_path / "a.tar", [("1", {"JPG": b"image", "TXT": b"text"})])
    assert TarReader([str(path)], cache)(0, 0).members == {"jpg": b"image", "txt": b"text"}


def offset_of(path, name):
    return next(member.offset for member in walk(path.read_bytes()) if member.name == name)


@pytest.mark.parametrize("before_data", [0, 100, 512], ids=["after the header", "in the header", "before the header"])
def test_a_cut_between_files_of_a_sample_drops_the_sample(shards, before_data):
    path = shards / "00000.tar"
    path.write_bytes(path.read_bytes()[: offset_of(path, "000000003.txt") - before_data])
    index = index_tar(str(path))
    assert index.truncated
    assert len(index) == 3


def test_a_broken_header_ends_the_tar(shards):
    path = shards / "00000.tar"
    data = bytearray(path.read_bytes())
    at = offset_of(path, "000000005.jpg") - 512
    data[at : at + 200] = b"x" * 200
    path.write_bytes(data)
    index = index_tar(str(path))
    assert index.truncated
    assert len(index) == 4, "the sample before may have lost files"


@pytest.mark.parametrize("content", [b"", b"x" * 5000, b"x"])
def test_a_file_that_is_no_tar_has_no_samples(tmp_path, cache, content):
    (tmp_path / "a.tar").write_bytes(content)
    index = index_tar(str(tmp_path / "a.tar"))
    assert index.truncated
    assert len(index) == 0
    with pytest.raises(SampleError, match=r"truncated_shard.*holds 0 samples, sample 3 was asked for"):
        TarReader([str(tmp_path / "a.tar")], cache)(0, 3)


def test_what_is_cut_off_after_it_was_indexed_is_a_fault_of_its_samples(shards, cache):
    path = shards / "00000.tar"
    read = TarReader([str(path)], cache)
    whole = read(0, 2)
    os.truncate(path, offset_of(path, "000000005.txt"))
    assert read(0, 2) == whole
    with pytest.raises(SampleError, match=r"truncated_shard.*ends within sample 5"):
        read(0, 5)


def test_a_tar_that_was_rewritten_since_it_was_indexed_is_a_fault(shards, cache):
    path = shards / "00000.tar"
    read = TarReader([str(path)], cache)
    read.fetch(0)
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(SampleError, match=r"corrupt_shard.*was it changed since\?"):
        read(0, 1)


def open_files():
    return len(os.listdir("/proc/self/fd"))


def open_tars(folder):
    """Files of a folder that this process has open."""
    files = Path("/proc/self/fd")
    links = [str((files / name).readlink()) for name in os.listdir(files) if (files / name).is_symlink()]
    return sum(link.startswith(str(folder)) for link in links)


def test_few_shards_stay_open_and_a_lack_of_descriptors_is_no_fault(tmp_path, cache):
    paths = [str(write_tar(tmp_path / f"{i}.tar", [make_sample(i)])) for i in range(40)]
    read = TarReader(paths, cache)
    read.open.most = 5
    for shard in range(40):
        assert read(shard, 0).key == f"{shard:09d}"
    assert open_tars(tmp_path) == 5
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    read.open.most = 1000
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files() + 10, limits[1]))
    try:
        for shard in range(40):
            assert read(shard, 0).key == f"{shard:09d}"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_stale_handle_is_opened_again(shards, cache, monkeypatch):
    read = TarReader([str(shards / "00000.tar")], cache)
    expected, real, failing = read(0, 1), os.preadv, [1]

    def preadv(*arguments):
        if failing:
            failing.pop()
            raise OSError(errno.ESTALE, "stale file handle")
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    assert read(0, 1) == expected
    failing += [1, 1]
    with pytest.raises(SampleError, match="unreadable_shard"):
        read(0, 1)


@pytest.mark.parametrize("damage", [b"", bytes(2000), b"PK\x03\x04"])
def test_a_damaged_index_is_made_again_or_a_fault(shards, tmp_path, cache, damage):
    path = str(shards / "00000.tar")
    expected = TarReader([path], cache)(0, 1)
    (made,) = (tmp_path / "cache" / "derived").iterdir()
    made.write_bytes(damage)
    assert TarReader([path], cache)(0, 1) == expected
    indexes = tmp_path / "index"
    indexes.mkdir()
    index_path(indexes, path).write_bytes(damage)
    with pytest.raises(SampleError, match=r"bad_index: .*delete it and run `scaleclip data index` again"):
        TarReader([path], cache, indexes)(0, 1)


def test_a_missing_tar_is_a_fault_of_its_samples(tmp_path, cache):
    read = TarReader([str(tmp_path / "none.tar")], cache)
    with pytest.raises(SampleError, match="missing_shard"):
        read.fetch(0)
