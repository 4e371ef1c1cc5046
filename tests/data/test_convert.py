"""Tars to MDS and back: nothing is lost, nothing is done twice, and a killed conversion ends with the same bytes."""

import json
import os
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from streaming import MDSWriter, StreamingDataset
from streaming.base.util import clean_stale_shared_memory

from helpers import make_sample, write_tar
from scaleclip.config import CacheConfig
from scaleclip.data import convert
from scaleclip.data.cache import ShardCache
from scaleclip.data.convert import to_mds, to_tar
from scaleclip.data.index import index_tar
from scaleclip.data.mds import open_mds
from scaleclip.data.sample import SampleError
from scaleclip.data.webdataset import TarReader
from scaleclip.errors import ConfigError, RunError

SAMPLES = [make_sample(number) for number in range(11)]


@pytest.fixture
def cache(tmp_path):
    return ShardCache(CacheConfig(folder=str(tmp_path / "cache")))


@pytest.fixture
def tars(tmp_path):
    """Three tars of 4, 1 and 6 samples."""
    (tmp_path / "tars").mkdir()
    parts = {"00000": SAMPLES[:4], "00001": SAMPLES[4:5], "00002": SAMPLES[5:]}
    return [str(write_tar(tmp_path / "tars" / f"{name}.tar", samples)) for name, samples in parts.items()]


def read_tars(folder: Path, cache):
    """(key, members) of all samples of the tars in a folder, in order."""
    samples = []
    for path in sorted(folder.glob("*.tar")):
        reader = TarReader([str(path)], cache)
        samples += [tuple(reader(0, ordinal)) for ordinal in range(len(index_tar(str(path))))]
    return samples


def read_mds(folder: Path, cache):
    source = open_mds("test", [str(folder / "index.json")], cache)
    return [tuple(source.reader(shard, ordinal)) for shard, count in enumerate(source.counts) for ordinal in range(count)]


def contents(folder: Path):
    """Every file of a folder, the conversion's own records included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def go(converted):
    """Results of a conversion in which nothing goes wrong."""
    done = list(converted)
    assert [warning for each in done for warning in each.warnings()] == []
    return done


@pytest.mark.parametrize(("compression", "hashes"), [(None, ()), ("zstd", ("xxh64", "sha1")), ("gz:1", ("sha256",))])
def test_a_round_trip_keeps_keys_members_and_bytes_in_order(tmp_path, cache, tars, compression, hashes):
    done = go(to_mds(tars, tmp_path / "mds", cache, workers=1, compression=compression, hashes=hashes))
    assert [(each.shard, each.samples) for each in done] == list(zip(tars, [4, 1, 6], strict=True))
    assert read_mds(tmp_path / "mds", cache) == SAMPLES
    source = open_mds("test", [str(tmp_path / "mds" / "index.json")], cache)
    assert source.names == ["00000.mds", "00001.mds", "00002.mds"]
    done = go(to_tar([str(tmp_path / "mds" / "index.json")], tmp_path / "back", cache, workers=1))
    assert [(each.shard, each.samples) for each in done] == list(zip(source.shards, [4, 1, 6], strict=True))
    assert read_tars(tmp_path / "back", cache) == SAMPLES
    for tar, count in zip(tars, [4, 1, 6], strict=True):
        stats = json.loads((tmp_path / "back" / f"{Path(tar).stem}_stats.json").read_text())
        assert (stats["count"], stats["successes"]) == (count, count)


def test_samples_with_other_members_and_odd_bytes_survive(tmp_path, cache):
    odd = [
        ("a/b.c/plain", {"jpg": b"\xff\xd8", "txt": b"not \xff UTF-8"}),
        ("no caption", {"jpg": b""}),
        ("only_text_\udcff", {"txt": b"", "seg.png": b"x", "__url__": b"http"}),
        ("same", {"jpg": b"1"}),
        ("same", {"jpg": b"2"}),
        ("long/" * 60 + "key", {"jpg": b"3", "json": b"{}"}),
        ("ключ", {"jpg": b"4"}),
        ("k" * 150, {"jpg": b"5"}),
    ]
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "odd.tar", odd)
    assert read_tars(tmp_path / "tars", cache) == odd
    go(to_mds([str(tmp_path / "tars" / "odd.tar")], tmp_path / "mds", cache, workers=1))
    assert read_mds(tmp_path / "mds", cache) == odd
    go(to_tar([str(tmp_path / "mds" / "index.json")], tmp_path / "back", cache, workers=1))
    assert read_tars(tmp_path / "back", cache) == [(key, dict(sorted(members.items()))) for key, members in odd]


def test_the_library_streams_what_was_written(tmp_path, cache, tars):
    go(to_mds(tars, tmp_path / "mds", cache, workers=1, compression="zstd", hashes=("sha1",)))
    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(tmp_path / "mds"), shuffle=False, batch_size=1, validate_hash="sha1")
    assert len(dataset) == 11
    rows = [dataset[number] for number in range(11)]
    assert [(row.pop("__key__"), row) for row in rows] == SAMPLES


def test_webdataset_reads_the_tars(tmp_path, cache, tars):
    go(to_mds(tars, tmp_path / "mds", cache, workers=1))
    go(to_tar([str(tmp_path / "mds" / "index.json")], tmp_path / "back", cache, workers=1))
    tars = sorted(str(tar) for tar in (tmp_path / "back").glob("*.tar"))
    rows = [row for tar in tars for row in webdataset.WebDataset(tar, shardshuffle=False)]
    found = [(row["__key__"], {name: value for name, value in row.items() if not name.startswith("__")}) for row in rows]
    assert found == SAMPLES


def test_two_workers_write_what_one_writes(tmp_path, cache, tars):
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        done = go(to_mds(tars, folder / "mds", cache, workers=workers, compression="zstd"))
        assert [each.shard for each in done] == tars
        go(to_tar([str(tmp_path / "1" / "mds" / "index.json")], folder / "tars", cache, workers=workers))
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_columns_of_other_types_become_files(tmp_path, cache):
    columns = {"id": "int", "caption": "str", "meta": "json", "image": "jpeg", "Score": "float32"}
    with MDSWriter(columns=columns, out=str(tmp_path / "mds"), size_limit=5000) as writer:
        for number in range(6):
            row = {"id": number, "caption": f"é {number}", "meta": {"n": number}, "image": SAMPLES[0][1]["jpg"]}
            writer.write({**row, "Score": np.float32(0.5)})
    done = go(to_tar([str(tmp_path / "mds" / "index.json")], tmp_path / "tars", cache, workers=1))
    assert len(done) > 1
    # shards that the library names are all called `shard`
    names = sorted(path.name for path in (tmp_path / "tars").glob("*.tar"))
    assert names == [f"{number:05d}.tar" for number in range(len(done))]
    key, members = read_tars(tmp_path / "tars", cache)[0]
    assert key == "shard.00000/0"
    assert members == {
        "id": b"0",
        "caption": "é 0".encode(),
        "meta": b'{"n": 0}',
        "image": SAMPLES[0][1]["jpg"],
        "score": b"0.5",
    }


def test_what_a_tar_cannot_hold_is_left_out_and_counted(tmp_path, cache):
    rows = [
        {"__key__": "good", "jpg": b"1", "JPG": b"", "__absent__": ["JPG"]},
        {"__key__": "do.t", "jpg": b"2", "JPG": b"", "__absent__": ["JPG"]},
        {"__key__": "clash", "jpg": b"3", "JPG": b"4", "__absent__": []},
        {"__key__": "nothing", "jpg": b"", "JPG": b"", "__absent__": ["JPG", "jpg"]},
        {"__key__": "nu\0l", "jpg": b"5", "JPG": b"", "__absent__": ["JPG"]},
        {"__key__": "good_too", "jpg": b"6", "JPG": b"", "__absent__": ["JPG"]},
    ]
    columns = {"__key__": "str", "jpg": "bytes", "JPG": "bytes", "__absent__": "json"}
    with MDSWriter(columns=columns, out=str(tmp_path / "mds")) as writer:
        for row in rows:
            writer.write(row)
    (done,) = to_tar([str(tmp_path / "mds" / "index.json")], tmp_path / "tars", cache, workers=1)
    assert (done.samples, dict(done.bad), done.error) == (2, {"no_tar_name": 4}, "")
    (warning,) = done.warnings()
    assert "4 samples were left out" in warning
    assert "do.t" in warning
    assert read_tars(tmp_path / "tars", cache) == [("good", {"jpg": b"1"}), ("good_too", {"jpg": b"6"})]
    assert json.loads((tmp_path / "tars" / "shard_stats.json").read_text())["successes"] == 2


def test_neighbours_that_a_tar_would_make_one_are_counted(tmp_path, cache):
    columns = {"__key__": "str", "jpg": "bytes", "txt": "bytes", "__absent__": "json"}
    with MDSWriter(columns=columns, out=str(tmp_path / "mds")) as writer:
        writer.write({"__key__": "same", "jpg": b"1", "txt": b"", "__absent__": ["txt"]})
        writer.write({"__key__": "same", "jpg": b"", "txt": b"2", "__absent__": ["jpg"]})
        writer.write({"__key__": "same", "jpg": b"3", "txt": b"", "__absent__": ["txt"]})
    (done,) = to_tar([str(tmp_path / "mds" / "index.json")], tmp_path / "tars", cache, workers=1)
    assert (done.samples, dict(done.bad)) == (2, {"duplicate_key": 1})
    assert read_tars(tmp_path / "tars", cache) == [("same", {"jpg": b"1"}), ("same", {"jpg": b"3"})]


def test_what_mds_has_another_use_for_is_left_out_and_counted(tmp_path, cache):
    samples = [("x", {"__key__": b"1", "jpg": b"2"}), ("y", {"jpg": b"3"}), ("z", {"__absent__": b"4"})]
    (done,) = to_mds([str(write_tar(tmp_path / "a.tar", samples))], tmp_path / "mds", cache, workers=1)
    assert (done.samples, dict(done.bad)) == (1, {"reserved_name": 2})
    assert read_mds(tmp_path / "mds", cache) == [("y", {"jpg": b"3"})]


def test_a_damaged_tar_gives_its_whole_samples_and_is_converted_again_when_it_is_mended(tmp_path, cache, tars):
    whole = Path(tars[0]).read_bytes()
    os.truncate(tars[0], len(whole) * 2 // 3)
    num_whole = len(index_tar(tars[0]))
    assert 0 < num_whole < 4
    done = list(to_mds(tars, tmp_path / "mds", cache, workers=1))
    assert (done[0].samples, dict(done[0].bad)) == (num_whole, {"truncated_shard": 1})
    assert read_mds(tmp_path / "mds", cache) == SAMPLES[:num_whole] + SAMPLES[4:]
    # what was left out is said at every start
    assert list(to_mds(tars, tmp_path / "mds", cache, workers=1)) == done
    Path(tars[0]).write_bytes(whole)
    go(to_mds(tars, tmp_path / "mds", cache, workers=1))
    assert read_mds(tmp_path / "mds", cache) == SAMPLES


def test_a_shard_that_cannot_be_read_is_tried_again_at_the_next_start(tmp_path, cache, tars):
    Path(tars[1]).rename(tmp_path / "away")
    done = list(to_mds(tars, tmp_path / "mds", cache, workers=1))
    assert [bool(each.error) for each in done] == [False, True, False]
    assert "00001.tar" in done[1].warnings()[0]
    (tmp_path / "away").rename(tars[1])
    go(to_mds(tars, tmp_path / "mds", cache, workers=1))
    go(to_mds(tars, tmp_path / "fresh", cache, workers=1))
    assert contents(tmp_path / "mds") == contents(tmp_path / "fresh")


def test_a_read_that_fails_on_the_way_is_no_bad_sample(tmp_path, cache, tars, monkeypatch):
    real = TarReader.__call__

    def flaky(reader, shard, ordinal):
        if ordinal == 5:
            raise SampleError("unreadable_shard", "Stale file handle")
        return real(reader, shard, ordinal)

    monkeypatch.setattr(TarReader, "__call__", flaky)
    done = list(to_mds(tars, tmp_path / "mds", cache, workers=1))
    assert [(each.samples, dict(each.bad), each.error) for each in done] == [
        (4, {}, ""),
        (1, {}, ""),
        (0, {}, "unreadable_shard: Stale file handle"),
    ]
    monkeypatch.undo()
    go(to_mds(tars, tmp_path / "mds", cache, workers=1))
    assert read_mds(tmp_path / "mds", cache) == SAMPLES


def test_an_mds_shard_with_a_wrong_checksum_is_no_tar(tmp_path, cache, tars):
    go(to_mds(tars, tmp_path / "mds", cache, workers=1, hashes=("sha1",)))
    path = tmp_path / "mds" / "00001.mds"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    done = list(to_tar([str(tmp_path / "mds" / "index.json")], tmp_path / "back", cache, workers=1))
    assert [each.error.partition(":")[0] for each in done] == ["", "wrong_checksum", ""]
    assert sorted(path.name for path in (tmp_path / "back").glob("*.tar")) == ["00000.tar", "00002.tar"]


def test_an_empty_tar_is_no_shard(tmp_path, cache, tars):
    tars.insert(1, str(write_tar(tmp_path / "tars" / "empty.tar", [])))
    assert [each.samples for each in go(to_mds(tars, tmp_path / "mds", cache, workers=1))] == [4, 0, 1, 6]
    assert read_mds(tmp_path / "mds", cache) == SAMPLES


def test_a_converted_shard_is_not_written_again(tmp_path, cache, tars):
    done = go(to_mds(tars, tmp_path / "mds", cache, workers=1, hashes=("xxh64", "sha1")))
    before = {path: path.stat().st_ino for path in (tmp_path / "mds").glob("*.mds")}
    Path(tars[0]).unlink()
    assert list(to_mds(tars, tmp_path / "mds", cache, workers=1, hashes=("sha1", "xxh64"))) == done
    assert {path: path.stat().st_ino for path in (tmp_path / "mds").glob("*.mds")} == before
    assert read_mds(tmp_path / "mds", cache) == SAMPLES


def test_half_of_a_shard_left_by_a_crash_is_written_anew(tmp_path, cache, tars):
    go(to_mds(tars, tmp_path / "mds", cache, workers=1))
    whole = contents(tmp_path / "mds")
    os.truncate(tmp_path / "mds" / "00000.mds", 20)
    (tmp_path / "mds" / ".conversion" / "00001.json").unlink()
    (tmp_path / "mds" / "00001.mds").write_bytes(b"another")
    (tmp_path / "mds" / "index.json").unlink()
    left = tmp_path / "mds" / ".conversion" / "work" / "left"
    left.mkdir(parents=True)
    (left / "shard.00000.mds").write_bytes(b"half")
    go(to_mds(tars, tmp_path / "mds", cache, workers=1))
    assert contents(tmp_path / "mds") == whole


@pytest.mark.parametrize("direction", ["mds", "tar"])
def test_killed_and_started_again_ends_with_the_same_bytes(tmp_path, cache, direction):
    (tmp_path / "tars").mkdir()
    tars = [str(write_tar(tmp_path / "tars" / f"{number}.tar", SAMPLES[number:])) for number in range(8)]
    go(to_mds(tars, tmp_path / "mds", cache, workers=1))
    index = str(tmp_path / "mds" / "index.json")

    def conversion(out):
        return to_mds(tars, out, cache, workers=2) if direction == "mds" else to_tar([index], out, cache, workers=2)

    go(conversion(tmp_path / "undisturbed"))
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        for number, _ in enumerate(conversion(tmp_path / "killed")):
            if number == 2:
                os.killpg(0, signal.SIGKILL)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not (tmp_path / "killed" / "index.json").exists()
    go(conversion(tmp_path / "killed"))
    names = [name for name in contents(tmp_path / "killed") if not Path(name).name.startswith(".")]
    assert {name: contents(tmp_path / "killed")[name] for name in names} == contents(tmp_path / "undisturbed")


def test_a_folder_with_other_files_is_refused(tmp_path, cache, tars):
    with pytest.raises(ConfigError, match="no conversion wrote"):
        list(to_mds(tars, tmp_path / "tars", cache, workers=1))
    go(to_mds(tars, tmp_path / "mds", cache, workers=1, compression="zstd"))
    with pytest.raises(ConfigError, match=r"compression=zstd.*compression=None"):
        list(to_mds(tars, tmp_path / "mds", cache, workers=1))
    other = tmp_path / "other"
    other.mkdir()
    write_tar(other / tars[0].rpartition("/")[2], [make_sample(1)])
    paths = [str(path) for path in other.glob("*.tar")]
    with pytest.raises(ConfigError, match=r"holds .* made from .*this one is .*other/.*: give a new folder"):
        list(to_mds(paths, tmp_path / "mds", cache, workers=1, compression="zstd"))


def test_unknown_options_are_refused_before_anything_is_written(tmp_path, cache, tars):
    with pytest.raises(ConfigError, match=r"compression=lzma is none of br, bz2, gz, snappy, zstd"):
        list(to_mds(tars, tmp_path / "mds", cache, workers=1, compression="lzma"))
    with pytest.raises(ConfigError, match=r"crc99.*xxh64"):
        list(to_mds(tars, tmp_path / "mds", cache, workers=1, hashes=("crc99",)))
    assert not (tmp_path / "mds").exists()


def test_a_folder_that_cannot_be_written_ends_the_conversion(tmp_path, cache, tars, monkeypatch):
    def full(path, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "_move", full)
    with pytest.raises(RunError, match=r"No space left.*start the same command again"):
        list(to_mds(tars, tmp_path / "mds", cache, workers=1))


def test_a_shard_beyond_the_formats_limit_is_said(tmp_path, cache, tars, monkeypatch):
    go(to_mds(tars, tmp_path / "mds", cache, workers=1))
    monkeypatch.setattr("scaleclip.data.mds._MOST_BYTES", (tmp_path / "mds" / "00000.mds").stat().st_size + 1000)
    done = list(to_mds(tars, tmp_path / "limited", cache, workers=1))
    assert [("4 GiB" in each.error, each.samples) for each in done] == [(False, 4), (False, 1), (True, 0)]


def test_tars_are_the_same_whenever_they_are_written(tmp_path, cache, tars):
    go(to_mds(tars, tmp_path / "mds", cache, workers=1))
    go(to_tar([str(tmp_path / "mds" / "index.json")], tmp_path / "back", cache, workers=1))
    with tarfile.open(tmp_path / "back" / "00000.tar") as tar:
        assert {(member.mtime, member.uid, member.mode) for member in tar} == {(0, 0, 0o444)}
