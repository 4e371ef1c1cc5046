"""MDS shards: what mosaicml-streaming writes is read back; whatever is wrong with a shard has a name."""

import hashlib
import io
import json
import os
import pickle
from decimal import Decimal
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image
from streaming import LocalDataset, MDSWriter
from streaming.base.format.json import JSONWriter
from streaming.base.util import merge_index

from helpers import encode_image
from scaleclip.config import CacheConfig
from scaleclip.data import mds
from scaleclip.data.cache import ShardCache
from scaleclip.data.mds import open_mds
from scaleclip.data.sample import SampleError
from scaleclip.errors import ConfigError

COLUMNS = {"__key__": "str", "jpg": "bytes", "txt": "str"}


@pytest.fixture
def cache(tmp_path):
    return ShardCache(CacheConfig(folder=str(tmp_path / "cache")))


def make_row(number):
    return {"__key__": f"{number:05d}", "jpg": bytes([number]) * (number * 37 % 50), "txt": f"the caption {number} ü"}


def write_folder(folder: Path, rows, columns=COLUMNS, **options) -> str:
    """An MDS folder; path of its index."""
    with MDSWriter(columns=dict(columns), out=str(folder), **options) as writer:
        for row in rows:
            writer.write(row)
    return str(folder / "index.json")


def change_index(index: str, **changes):
    """Change every shard's entry of an index."""
    tree = json.loads(Path(index).read_text())
    for entry in tree["shards"]:
        entry.update(changes)
    Path(index).write_text(json.dumps(tree))


def stored_file(folder: Path) -> Path:
    (path,) = folder.glob("shard.00000.*")
    return path


def read_all(source):
    return [source.reader(shard, ordinal) for shard, count in enumerate(source.counts) for ordinal in range(count)]


def cause_of(source, shard=0, ordinal=0):
    with pytest.raises(SampleError) as caught:
        source.reader(shard, ordinal)
    return caught.value.cause


@pytest.mark.parametrize("compression", [None, "zstd", "zstd:7", "gz", "bz2", "br:3", "snappy"])
def test_samples_are_read_as_the_library_wrote_them(tmp_path, cache, compression):
    rows = [make_row(number) for number in range(40)]
    index = write_folder(tmp_path / "mds", rows, compression=compression, hashes=["sha1", "xxh64"], size_limit=1000)
    source = open_mds("data.sources.test", [index], cache)
    assert len(source.shards) > 2
    assert source.names[1] == "shard.00001.mds"
    assert all(os.path.exists(shard) for shard in source.shards)
    assert source.counts.dtype == np.int64
    assert source.counts.sum() == 40
    for row, sample in zip(rows, read_all(source), strict=True):
        assert sample.key == row["__key__"]
        assert sample.members == {"jpg": row["jpg"], "txt": row["txt"].encode()}
    assert [key for shard in range(len(source.shards)) for key in source.reader.keys(shard)] == [row["__key__"] for row in rows]


@pytest.mark.parametrize(
    ("encoding", "value", "member"),
    [
        ("bytes", b"\0\xff", b"\0\xff"),
        ("str", "grün", "grün".encode()),
        ("json", {"a": [1, "ü"]}, b'{"a": [1, "\\u00fc"]}'),
        ("int", -3, b"-3"),
        ("uint8", 200, b"200"),
        ("int64", -(2**62), b"-4611686018427387904"),
        ("float16", 0.5, b"0.5"),
        ("float32", 0.1, b"0.1"),
        ("float64", -1e300, b"-1e+300"),
        ("str_int", 10**30, b"1" + b"0" * 30),
        ("str_float", 0.25, b"0.25"),
        ("str_decimal", Decimal("1.10"), b"1.10"),
        ("ndarray", np.array([[1, 2], [3, 4]], np.int16), b"[[1, 2], [3, 4]]"),
        ("ndarray:float32", np.array([0.5, 1.5], np.float32), b"[0.5, 1.5]"),
        ("ndarray:uint8:2,2", np.array([[1, 2], [3, 4]], np.uint8), b"[[1, 2], [3, 4]]"),
    ],
)
def test_a_column_becomes_a_member_of_bytes(tmp_path, cache, encoding, value, member):
    # between others, of fixed and of varying size
    columns = {"a": "str", "b": encoding, "c": "int32", "d": "bytes"}
    index = write_folder(tmp_path / "mds", [{"a": "x", "b": value, "c": 7, "d": b"end"}] * 2, columns)
    source = open_mds("data.sources.test", [index], cache)
    assert source.reader(0, 1).members == {"a": b"x", "b": member, "c": b"7", "d": b"end"}


def test_encoded_images_keep_their_bytes(tmp_path, cache):
    picture = Image.open(io.BytesIO(encode_image(1)))
    index = write_folder(tmp_path / "mds", [{"jpg": picture, "png": picture}], {"jpg": "jpeg", "png": "png"})
    members = open_mds("data.sources.test", [index], cache).reader(0, 0).members
    assert members["jpg"].startswith(b"\xff\xd8\xff")
    assert members["png"].startswith(b"\x89PNG")
    assert np.array_equal(np.array(Image.open(io.BytesIO(members["png"]))), np.array(picture))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "1"])
def test_a_raw_image_becomes_a_png_of_the_same_pixels(tmp_path, cache, mode):
    picture = Image.open(io.BytesIO(encode_image(2))).convert(mode)
    index = write_folder(tmp_path / "mds", [{"image": picture}], {"image": "pil"})
    member = open_mds("data.sources.test", [index], cache).reader(0, 0).members["image"]
    assert member.startswith(b"\x89PNG")
    assert np.array_equal(np.array(Image.open(io.BytesIO(member)).convert("RGB")), np.array(picture.convert("RGB")))


@pytest.mark.parametrize("encoding", ["jpegarray", "jpeg_array", "list[jpeg]", "list[png]", "list[pil]"])
def test_the_images_of_a_list_are_members_of_their_own(tmp_path, cache, encoding):
    kind = "JPEG" if "jpeg" in encoding else "PNG"
    encoded = [encode_image(seed, kind) for seed in (1, 2, 3)]
    images = encoded if "array" in encoding else [Image.open(io.BytesIO(image)) for image in encoded]
    index = write_folder(tmp_path / "mds", [{"frames": images, "n": 3}], {"frames": encoding, "n": "int"})
    members = open_mds("data.sources.test", [index], cache).reader(0, 0).members
    assert list(members) == ["frames.0", "frames.1", "frames.2", "n"]
    for number, image in enumerate(encoded):
        ours, theirs = (np.array(Image.open(io.BytesIO(each)), np.int16) for each in (members[f"frames.{number}"], image))
        # the library encodes a JPEG that has no file anew
        assert np.abs(ours - theirs).mean() <= (12 if encoding == "list[jpeg]" else 0)


def test_a_pickle_is_never_opened(tmp_path, cache):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "opened"),)

    index = write_folder(tmp_path / "mds", [{"thing": Trap()}], {"thing": "pkl"})
    assert open_mds("data.sources.test", [index], cache).reader(0, 0).members == {"thing": pickle.dumps(Trap())}
    assert not (tmp_path / "opened").exists()


def test_without_keys_a_sample_is_called_by_its_place(tmp_path, cache):
    index = write_folder(tmp_path / "mds", [{"txt": "a"}, {"txt": "b"}], {"txt": "str"})
    assert open_mds("data.sources.test", [index], cache).reader(0, 1).key == "shard.00000/1"


def test_an_empty_shard_is_a_shard(tmp_path, cache):
    # the library writes one before a first sample beyond the size limit
    index = write_folder(tmp_path / "mds", [make_row(40), make_row(41)], size_limit=100)
    source = open_mds("data.sources.test", [index], cache)
    assert source.counts.tolist() == [0, 1, 1]
    source.reader.fetch(0)
    assert [sample.key for sample in read_all(source)] == ["00040", "00041"]


def test_columns_that_a_sample_lacks_are_no_members(tmp_path, cache):
    rows = [{"jpg": b"x", "txt": b"", "__absent__": []}, {"jpg": b"", "txt": b"", "__absent__": ["jpg"]}]
    index = write_folder(tmp_path / "mds", rows, {"jpg": "bytes", "txt": "bytes", "__absent__": "json"})
    samples = read_all(open_mds("data.sources.test", [index], cache))
    assert [sample.members for sample in samples] == [{"jpg": b"x", "txt": b""}, {"txt": b""}]


def test_a_merged_index_and_those_of_its_folders_give_the_same_shards(tmp_path, cache):
    indexes = []
    for part in range(3):
        rows = [make_row(number) for number in range(part * 10, part * 10 + 10)]
        indexes.append(write_folder(tmp_path / "mds" / str(part), rows, size_limit=500, compression="zstd"))
    merge_index(str(tmp_path / "mds"))
    parts, merged = (open_mds("data.sources.test", files, cache) for files in (indexes, [str(tmp_path / "mds" / "index.json")]))
    assert parts.shards == merged.shards
    assert parts.names == merged.names
    assert merged.names[0] == "0/shard.00000.mds"
    assert len(set(merged.names)) == len(merged.names) > 3
    assert read_all(parts) == read_all(merged)
    assert [sample.key for sample in read_all(merged)] == [f"{number:05d}" for number in range(30)]


def test_names_do_not_depend_on_where_the_folders_lie(tmp_path, cache):
    names = []
    for at in ("here", "there/deeper"):
        indexes = [write_folder(tmp_path / at / f"part{part}" / "mds", [make_row(0)]) for part in range(2)]
        names.append(open_mds("data.sources.test", indexes, cache).names)
    assert names[0] == names[1] == ["part0/mds/shard.00000.mds", "part1/mds/shard.00000.mds"]


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_remote_folders_are_read_through_the_cache(tmp_path, cache, compression):
    rows = [make_row(number) for number in range(20)]
    write_folder(tmp_path / "mds", rows, compression=compression, hashes=["sha1"], size_limit=500)
    remote = fsspec.filesystem("memory")
    remote.put(str(tmp_path / "mds"), f"/{tmp_path.name}", recursive=True)
    source = open_mds("data.sources.test", [f"memory://{tmp_path.name}/index.json"], cache)
    assert source.shards[0].startswith(f"memory://{tmp_path.name}/shard.00000.mds")
    assert [sample.key for sample in read_all(source)] == [row["__key__"] for row in rows]
    remote.rm(f"/{tmp_path.name}", recursive=True)


def test_a_sample_past_the_end_is_missing(tmp_path, cache):
    source = open_mds("data.sources.test", [write_folder(tmp_path / "mds", [make_row(1)])], cache)
    assert cause_of(source, ordinal=1) == "missing_sample"


@pytest.mark.parametrize("compression", [None, "gz"])
def test_a_changed_byte_is_a_wrong_checksum_and_other_shards_stay_readable(tmp_path, cache, compression):
    rows = [make_row(number) for number in range(20)]
    index = write_folder(tmp_path / "mds", rows, compression=compression, hashes=["xxh64"], size_limit=500)
    path = stored_file(tmp_path / "mds")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    source = open_mds("data.sources.test", [index], cache)
    assert cause_of(source) == "wrong_checksum"
    assert source.reader(1, 0).key == rows[source.counts[0]]["__key__"]


def test_a_shard_decompressed_to_other_bytes_is_a_wrong_checksum(tmp_path, cache):
    index = write_folder(tmp_path / "mds", [make_row(1)], compression="gz", hashes=["sha1"])
    tree = json.loads(Path(index).read_text())
    tree["shards"][0]["raw_data"]["hashes"]["sha1"] = hashlib.sha1(b"another").hexdigest()
    Path(index).write_text(json.dumps(tree))
    assert cause_of(open_mds("data.sources.test", [index], cache)) == "wrong_checksum"


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_damaged_shard_is_read_whole_once_a_process(tmp_path, cache, monkeypatch, compression):
    index = write_folder(tmp_path / "mds", [make_row(number) for number in range(9)], compression=compression, hashes=["sha1"])
    path = stored_file(tmp_path / "mds")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    source, hashed = open_mds("data.sources.test", [index], cache), []
    monkeypatch.setattr(mds, "get_hash", lambda algorithm, data: hashed.append(algorithm) or "no hash")
    assert {cause_of(source, ordinal=ordinal) for ordinal in range(9)} == {"wrong_checksum"}
    assert hashed == ["sha1"]


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_node_checks_and_decompresses_a_shard_once(tmp_path, cache, monkeypatch, compression):
    index = write_folder(tmp_path / "mds", [make_row(number) for number in range(9)], compression=compression, hashes=["sha1"])
    done = []
    for name in ("get_hash", "decompress"):
        real = getattr(mds, name)
        monkeypatch.setattr(mds, name, lambda *args, name=name, real=real: done.append(name) or real(*args))
    for _ in range(3):
        open_mds("data.sources.test", [index], ShardCache(CacheConfig(folder=str(tmp_path / "cache")))).reader.fetch(0)
    assert done == ["get_hash"] + ([] if compression is None else ["decompress", "get_hash"])


def test_a_shard_that_was_opened_can_be_read_after_the_cache_dropped_it(tmp_path, cache):
    index = write_folder(tmp_path / "mds", [make_row(number) for number in range(9)], compression="zstd")
    source = open_mds("data.sources.test", [index], cache)
    source.reader.fetch(0)
    dropped = [path.unlink() for path in (tmp_path / "cache").rglob("*-mds")]
    assert dropped
    assert source.reader(0, 8).key == "00008"


@pytest.mark.parametrize("compression", [None, "zstd", "gz"])
def test_a_cut_off_shard_is_truncated(tmp_path, cache, compression):
    index = write_folder(tmp_path / "mds", [make_row(number) for number in range(9)], compression=compression, hashes=["sha1"])
    path = stored_file(tmp_path / "mds")
    os.truncate(path, path.stat().st_size - 10)
    assert cause_of(open_mds("data.sources.test", [index], cache)) == "truncated_shard"


def test_a_shard_that_was_cut_off_while_open_is_truncated(tmp_path, cache):
    source = open_mds("data.sources.test", [write_folder(tmp_path / "mds", [make_row(number) for number in range(9)])], cache)
    source.reader.fetch(0)
    os.truncate(source.shards[0], os.path.getsize(source.shards[0]) - 10)
    assert cause_of(source, ordinal=8) == "truncated_shard"
    assert source.reader(0, 0).key == "00000"


@pytest.mark.parametrize("compression", ["zstd", "gz", "bz2", "br:3", "snappy"])
def test_a_shard_that_cannot_be_decompressed_is_corrupt(tmp_path, cache, compression):
    index = write_folder(tmp_path / "mds", [make_row(number) for number in range(9)], compression=compression)
    path = stored_file(tmp_path / "mds")
    path.write_bytes(bytes(range(256))[: path.stat().st_size].ljust(path.stat().st_size, b"\xff"))
    assert cause_of(open_mds("data.sources.test", [index], cache)) == "corrupt_shard"


@pytest.mark.parametrize("at", [0, 8, 4 * 10])
def test_wrong_offsets_are_a_corrupt_shard(tmp_path, cache, at):
    index = write_folder(tmp_path / "mds", [make_row(number) for number in range(9)])
    path = stored_file(tmp_path / "mds")
    content = bytearray(path.read_bytes())
    content[at : at + 4] = np.uint32(60).tobytes()
    path.write_bytes(content)
    assert cause_of(open_mds("data.sources.test", [index], cache)) == "corrupt_shard"


@pytest.mark.parametrize("change", ["size", "text"])
def test_a_sample_that_is_none_is_corrupt_and_its_neighbours_are_read(tmp_path, cache, change):
    index = write_folder(tmp_path / "mds", [{"n": 1, "scores": np.array([1.0])}] * 3, {"n": "int", "scores": "ndarray"})
    path = stored_file(tmp_path / "mds")
    content = bytearray(path.read_bytes())
    begin = int(np.frombuffer(content, np.uint32, 1, 8)[0])  # of sample 1
    at = begin if change == "size" else begin + 4 + 8  # the size of `scores`, its dtype
    content[at] = 255
    path.write_bytes(content)
    source = open_mds("data.sources.test", [index], cache)
    assert cause_of(source, ordinal=1) == "corrupt_shard"
    assert source.reader(0, 0).members == source.reader(0, 2).members == {"n": b"1", "scores": b"[1.0]"}


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_missing_shard_is_named_and_may_come_back(tmp_path, cache, compression):
    index = write_folder(tmp_path / "mds", [make_row(1)], compression=compression)
    source, path = open_mds("data.sources.test", [index], cache), stored_file(tmp_path / "mds")
    path.rename(tmp_path / "away")
    assert cause_of(source) == "missing_shard"
    (tmp_path / "away").rename(path)
    assert source.reader(0, 0).key == "00001"


def test_a_cache_that_fails_is_asked_again(tmp_path):
    class Flaky(ShardCache):
        full = True

        def derived_path(self, *arguments):
            if self.full:
                raise SampleError("unwritable_cache", "no space left")
            return super().derived_path(*arguments)

    cache = Flaky(CacheConfig(folder=str(tmp_path / "cache")))
    source = open_mds("data.sources.test", [write_folder(tmp_path / "mds", [make_row(1)], compression="zstd")], cache)
    assert cause_of(source) == "unwritable_cache"
    cache.full = False
    assert source.reader(0, 0).key == "00001"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda index: Path(index).unlink(), "cannot be read"),
        (lambda index: Path(index).write_text("{"), "no index of an MDS folder"),
        (lambda index: Path(index).write_text("[]"), "no index of an MDS folder"),
        (lambda index: Path(index).write_text('{"version": 2, "shards": []}'), "no samples"),
        (lambda index: change_index(index, version=1), "version"),
        (lambda index: change_index(index, column_names=[], column_encodings=[], column_sizes=[]), "no columns"),
        (lambda index: change_index(index, column_encodings=["str", "bytes", "tensor"]), "'tensor'"),
        (lambda index: change_index(index, column_encodings=["str", "bytes", "ndarray:complex64"]), "described"),
        (lambda index: change_index(index, zip_data={"basename": "x", "bytes": 1, "hashes": {}}, compression="zip"), "'zip'"),
        (lambda index: change_index(index, raw_data={"basename": "x", "bytes": 1, "hashes": {"crc99": "0"}}), "'crc99'"),
        (lambda index: change_index(index, raw_data=None), "described"),
    ],
)
def test_an_index_that_cannot_be_used_is_said_at_once(tmp_path, cache, change, said):
    index = write_folder(tmp_path / "mds", [make_row(1)])
    change(index)
    with pytest.raises(ConfigError, match=r"^data\.sources\.test: ") as caught:
        open_mds("data.sources.test", [index], cache)
    assert said in str(caught.value)
    assert index in str(caught.value)


def test_other_formats_of_the_library_are_named(tmp_path, cache):
    with JSONWriter(columns={"txt": "str"}, out=str(tmp_path / "json")) as writer:
        writer.write({"txt": "a"})
    with pytest.raises(ConfigError, match="shards of format json"):
        open_mds("data.sources.test", [str(tmp_path / "json" / "index.json")], cache)


def test_a_shard_named_twice_is_refused(tmp_path, cache):
    index = write_folder(tmp_path / "mds" / "a", [make_row(1)])
    merge_index(str(tmp_path / "mds"))
    with pytest.raises(ConfigError, match="named before"):
        open_mds("data.sources.test", [index, str(tmp_path / "mds" / "index.json")], cache)


def test_the_librarys_own_reader_agrees(tmp_path, cache):
    index = write_folder(tmp_path / "mds", [make_row(number) for number in range(40)], size_limit=700)
    theirs = LocalDataset(str(tmp_path / "mds"))
    for number, sample in enumerate(read_all(open_mds("data.sources.test", [index], cache))):
        row = theirs[number]
        assert {"__key__": sample.key, "jpg": sample.members["jpg"], "txt": sample.members["txt"].decode()} == row
