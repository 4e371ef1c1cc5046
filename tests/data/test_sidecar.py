"""Texts beside the shards: joined from a release by key, read at random."""

import gzip
import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import make_sample, write_tar
from scaleclip.config import CacheConfig
from scaleclip.data import join
from scaleclip.data.cache import ShardCache
from scaleclip.data.join import JoinedShard, ScannedTable, write_sidecar
from scaleclip.data.manifest import Manifest
from scaleclip.data.sample import Sample, SampleError
from scaleclip.data.sidecar import Sidecar, sidecar_path, write_rows
from scaleclip.data.source import open_shards
from scaleclip.errors import ConfigError, RunError

KEYS = {"0.tar": ["a", "b", "c"], "1.tar": [], "2.tar": ["d", "x/e", "b", "g", "h"]}


class Shards:
    """A reader of samples that are their keys, with a JSON that says the uid."""

    def __init__(self, keys, broken=()):
        self._keys, self._broken = list(keys.values()), broken

    def fetch(self, shard):
        raise AssertionError

    def keys(self, shard):
        if shard in self._broken:
            raise SampleError("unreadable_shard", "no such file")
        return self._keys[shard]

    def __call__(self, shard, ordinal):
        key = self._keys[shard][ordinal]
        if key == "c":
            raise SampleError("corrupt_shard", "c")
        return Sample(key, {"json": json.dumps({"meta": {"uid": f"uid of {key}"}}).encode()})


def manifest_of(keys):
    return Manifest([f"/nowhere/{name}" for name in keys], list(keys), np.array([len(each) for each in keys.values()]))


def write_parquet(path, rows, names=("id", "re")):
    pq.write_table(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), path, row_group_size=3)
    return str(path)


def write_jsonl(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def do_join(folder, tables, keys=KEYS, broken=(), key_column="id", columns=("re",), **options):
    options = {"key_column": key_column, "columns": list(columns), **options}
    done = list(write_sidecar(manifest_of(keys), Shards(keys, broken), tables, folder, **options))
    return [each for each in done if isinstance(each, ScannedTable)], [each for each in done if isinstance(each, JoinedShard)]


def texts_of(folder, keys=KEYS, column="re"):
    sidecar = Sidecar("key", str(folder), list(keys))
    return {name: [sidecar.text(shard, i, column, key) for i, key in enumerate(keys[name])] for shard, name in enumerate(keys)}


@pytest.fixture
def release(tmp_path):
    """Two tables: keys that are missing, unmatched, in it twice, null; one that two samples share."""
    first = write_parquet(
        tmp_path / "t1.parquet", [("b", "B"), ("nobody", "?"), ("a", "A"), (None, "?"), ("d", "D\u00e9"), ("a", "A2")]
    )
    second = write_jsonl(
        tmp_path / "t2.jsonl",
        [{"id": "g", "re": None}, {"id": "d", "re": "D2"}, {"id": "x/e", "re": "E"}, {"id": "e", "re": "?"}],
    )
    return [first, second]


EXPECTED = {"0.tar": ["A", "B", None], "1.tar": [], "2.tar": ["D\u00e9", "E", "B", None, None]}


def test_rows_find_their_samples(tmp_path, release):
    tables, shards = do_join(tmp_path / "out", release)
    assert texts_of(tmp_path / "out") == EXPECTED
    assert tables == [ScannedTable(release[0], 6, 2), ScannedTable(release[1], 4, 1)]
    assert shards == [JoinedShard("0.tar", 3, 2, 1, ""), JoinedShard("1.tar", 0, 0, 0, ""), JoinedShard("2.tar", 5, 4, 1, "")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.tar.arrow", "1.tar.arrow", "2.tar.arrow"]


@pytest.mark.parametrize("keys_a_scan", [1, 2, 3])
@pytest.mark.parametrize("batch_rows", [1, 2, 100])
def test_little_memory_changes_nothing(tmp_path, release, monkeypatch, keys_a_scan, batch_rows):
    _, whole = do_join(tmp_path / "whole", release)
    monkeypatch.setattr(join, "_BATCH_ROWS", batch_rows)
    monkeypatch.setattr(join, "_HASHES_AT_ONCE", 2)
    memory_gib = 2 * keys_a_scan * 40 / 2**30
    tables, shards = do_join(tmp_path / "out", release, memory_gib=memory_gib)
    assert shards == whole
    assert len(tables) == 2 * -(-8 // keys_a_scan)
    assert sum(table.rows for table in tables) == 10
    assert sum(table.unmatched for table in tables) == 3
    for name in KEYS:
        assert sidecar_path(tmp_path / "out", name).read_bytes() == sidecar_path(tmp_path / "whole", name).read_bytes()


def test_many_rows_in_many_runs_equal_a_dictionary(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    keys = {f"{shard}.tar": [f"k{number}" for number in random.integers(0, 3000, 400)] for shard in range(7)}
    rows = [(f"k{number}", f"text {i} " + "x" * int(number % 50)) for i, number in enumerate(random.integers(0, 4000, 3000))]
    tables = [write_parquet(tmp_path / f"{i}.parquet", rows[i * 1000 : i * 1000 + 1000]) for i in range(3)]
    monkeypatch.setattr(join, "_BATCH_ROWS", 64)
    first_of = dict(reversed(rows))
    expected = {name: [first_of.get(key) for key in each] for name, each in keys.items()}
    for number, memory_gib in enumerate((1.0, 1e-4, 2e-5)):
        scanned, shards = do_join(tmp_path / str(number), tables, keys, memory_gib=memory_gib)
        assert texts_of(tmp_path / str(number), keys) == expected
        assert sum(table.unmatched for table in scanned) == sum(
            row[0] not in {k for each in keys.values() for k in each} for row in rows
        )
        assert [shard.matched for shard in shards] == [sum(text is not None for text in each) for each in expected.values()]


def test_the_first_of_the_tables_wins(tmp_path):
    tables = [write_parquet(tmp_path / f"{i}.parquet", [("a", f"from {i}"), ("a", f"late {i}")]) for i in range(2)]
    do_join(tmp_path / "out", tables)
    assert texts_of(tmp_path / "out")["0.tar"][0] == "from 0"
    _, shards = do_join(tmp_path / "reversed", tables[::-1])
    assert texts_of(tmp_path / "reversed")["0.tar"][0] == "from 1"
    assert shards[0].duplicates == 3


def test_globs_compression_and_several_columns(tmp_path):
    write_jsonl(tmp_path / "a-0.jsonl.gz", [{"id": "a", "re": "A", "n": 1}, {"id": "b", "n": 2.5, "more": [1]}])
    write_jsonl(tmp_path / "a-1.jsonl.gz", [{"id": "d", "re": "D", "n": float("nan")}])
    (tmp_path / "a-1.jsonl.gz").write_bytes((tmp_path / "a-1.jsonl.gz").read_bytes() + gzip.compress(b"\n"))
    do_join(tmp_path / "out", [f"{tmp_path}/a-*.jsonl.gz"], columns=("n", "re"))
    assert texts_of(tmp_path / "out", column="re")["0.tar"] == ["A", None, None]
    assert texts_of(tmp_path / "out", column="n")["0.tar"] == ["1", "2.5", None]
    assert texts_of(tmp_path / "out", column="n")["2.tar"][0] is None


def test_keys_may_be_numbers(tmp_path):
    table = write_parquet(tmp_path / "t.parquet", [(7, "seven"), (12, "twelve")])
    do_join(tmp_path / "out", [table], {"0.tar": ["12", "7", "07"]})
    assert texts_of(tmp_path / "out", {"0.tar": ["12", "7", "07"]}) == {"0.tar": ["twelve", "seven", None]}


def test_samples_are_found_by_a_field_of_their_json(tmp_path):
    table = write_parquet(tmp_path / "t.parquet", [("uid of a", "A"), ("uid of c", "C"), ("b", "?"), ("uid of x/e", "E")])
    _, shards = do_join(tmp_path / "out", [table], sample_key="meta.uid")
    assert texts_of(tmp_path / "out") == {"0.tar": ["A", None, None], "1.tar": [], "2.tar": [None, "E", None, None, None]}
    assert [shard.matched for shard in shards] == [1, 0, 1]


def test_no_key_matches_no_key(tmp_path):
    keys = {"0.tar": ["000000001", "000000002", "000000003", "000000004"]}
    manifest = Manifest([str(tmp_path / "0.tar")], list(keys), np.array([4]))
    write_parquet(tmp_path / "0.parquet", [("000000001", ""), ("000000002", None), ("000000003", "u")], ("key", "uid"))
    table = write_parquet(tmp_path / "t.parquet", [("", "?"), (None, "?"), ("u", "U")])
    options = {"key_column": "id", "columns": ["re"], "sample_key": "uid"}
    done = list(write_sidecar(manifest, Shards(keys), [table], tmp_path / "out", **options))
    assert texts_of(tmp_path / "out", keys) == {"0.tar": [None, None, "U", None]}
    assert done == [ScannedTable(table, 3, 2), JoinedShard("0.tar", 4, 1, 0, "")]


def test_samples_are_found_by_the_metadata_beside_their_tar(tmp_path):
    keys = {"00000.tar": ["000000001", "sub/000000004", "000000009"]}
    manifest = Manifest([str(tmp_path / "00000.tar")], list(keys), np.array([3]))
    write_parquet(tmp_path / "00000.parquet", [("000000001", 11), ("000000002", 12), ("000000004", 14)], ("key", "uid"))
    table = write_parquet(tmp_path / "t.parquet", [("14", "D"), ("12", "?"), ("11", "A")])
    options = {"key_column": "id", "columns": ["re"]}
    list(write_sidecar(manifest, Shards(keys), [table], tmp_path / "out", sample_key="uid", **options))
    assert texts_of(tmp_path / "out", keys) == {"00000.tar": ["A", "D", None]}
    with pytest.raises(ConfigError, match=r"00000\.parquet: has no key or no url among its columns key, uid"):
        list(write_sidecar(manifest, Shards(keys), [table], tmp_path / "out", sample_key="url", **options))


def test_samples_of_real_tars(tmp_path):
    write_tar(tmp_path / "00000.tar", [make_sample(i) for i in range(4)])
    write_tar(tmp_path / "00001.tar", [make_sample(i) for i in range(4, 7)])
    manifest, reader = open_shards("x", [f"{tmp_path}/*.tar"], None, ShardCache(CacheConfig(folder=str(tmp_path / "cache"))))
    table = write_parquet(tmp_path / "t.parquet", [("thing 5", "five"), ("thing 0", "zero")])
    options = {"key_column": "id", "columns": ["re"]}
    list(write_sidecar(manifest, reader, [table], tmp_path / "out", sample_key="captions.name", **options))
    keys = {"00000.tar": [make_sample(i)[0] for i in range(4)], "00001.tar": [make_sample(i)[0] for i in range(4, 7)]}
    assert texts_of(tmp_path / "out", keys) == {
        "00000.tar": ["zero", None, None, None],
        "00001.tar": [None, "five", None],
    }


def test_a_shard_without_keys_is_said_and_gets_no_file(tmp_path, release):
    _, shards = do_join(tmp_path / "out", release, broken=[0])
    assert shards[0] == JoinedShard("0.tar", 0, 0, 0, "unreadable_shard: no such file")
    assert not sidecar_path(tmp_path / "out", "0.tar").exists()
    sidecar = Sidecar("key", str(tmp_path / "out"), list(KEYS), may_lack=True)
    with pytest.raises(SampleError, match="missing_sidecar"):
        sidecar.text(0, 0, "re", KEYS["0.tar"][0])
    assert [sidecar.text(2, i, "re", key) for i, key in enumerate(KEYS["2.tar"])] == EXPECTED["2.tar"]


def test_no_match_at_all_gives_a_sidecar_without_texts(tmp_path):
    _, shards = do_join(tmp_path / "out", [write_parquet(tmp_path / "t.parquet", [("z", "Z")])])
    assert [shard.matched for shard in shards] == [0, 0, 0]
    assert texts_of(tmp_path / "out")["0.tar"] == [None, None, None]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"id,re\na,A\n", "is neither .parquet nor .jsonl"),
        ("t.jsonl", b'{"id": "a", "re": "A"}\n{"id"\n', r"t\.jsonl, line 2: is no JSON"),
        ("t.jsonl", b'{"id": "a", "re": "A"}\n[1]\n', r"t\.jsonl, line 2: is a list, not an object"),
        ("t.jsonl", b'{"id": "a", "re": ["A"]}\n', r"t\.jsonl: column re: a text is a list"),
        ("t.jsonl", b'{"id": "a", "other": "A"}\n', r"t\.jsonl: has no column re; it has id, other"),
        ("t.jsonl", b"", r"t\.jsonl: has no column id, re"),
        ("none.jsonl", None, r"tables: no shards match '.*none\.jsonl'"),
    ],
)
def test_tables_that_cannot_be_used_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        do_join(tmp_path / "out", [str(tmp_path / name)])


def test_a_wrong_column_is_said_before_anything_is_read(tmp_path, monkeypatch):
    good = write_parquet(tmp_path / "a.parquet", [("a", "A")])
    bad = write_parquet(tmp_path / "b.parquet", [("a", "A")], ("id", "caption"))
    monkeypatch.setattr(join, "_scan", None)
    with pytest.raises(ConfigError, match=r"b\.parquet: has no column re; it has id, caption"):
        do_join(tmp_path / "out", [good, bad])


def test_a_column_of_lists_is_refused(tmp_path):
    table = write_parquet(tmp_path / "t.parquet", [("a", ["A", "B"])])
    with pytest.raises(ConfigError, match=r"column re \(list<.*\) holds no strings"):
        do_join(tmp_path / "out", [table])


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl.gz"])
def test_a_damaged_table_ends_the_join_and_leaves_no_spilled_files(tmp_path, name):
    rows = [(f"key {i}", os.urandom(200).hex()) for i in range(5000)]
    path = tmp_path / name
    if name.endswith("parquet"):
        write_parquet(path, rows)
        data = bytearray(path.read_bytes())
        data[len(data) // 4 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 4)
        path.write_bytes(data)
    else:
        write_jsonl(path, [{"id": key, "re": text} for key, text in rows])
        path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(RunError, match=str(path)):
        do_join(tmp_path / "out", [str(path)])
    assert list((tmp_path / "out").iterdir()) == []


def write_one(folder: Path, name: str = "0.tar") -> None:
    write_rows(sidecar_path(folder, name), ["a", "b"], pa.record_batch({"re": ["A", "B"]}))


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda path: path.unlink(), "missing_sidecar"),
        (lambda path: path.write_bytes(b""), "bad_sidecar"),
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "bad_sidecar"),
        (lambda path: path.write_bytes(b"x" * 1000), "bad_sidecar"),
        (lambda path: write_rows(path, ["a"], pa.record_batch({"re": ["A"]})), "short_sidecar"),
        (lambda path: write_rows(path, ["a", "b"], pa.record_batch({"other": ["A", "B"]})), "bad_sidecar"),
        (lambda path: write_rows(path, ["a", "b"], not_utf8()), "undecodable_text"),
        (lambda path: write_rows(path, ["a", "c"], pa.record_batch({"re": ["A", "B"]})), "wrong_sidecar"),
    ],
)
def test_what_is_wrong_with_a_file_is_counted_at_its_samples(tmp_path, damage, cause):
    write_one(tmp_path)
    write_one(tmp_path, "1.tar")
    damage(sidecar_path(tmp_path, "1.tar"))
    sidecar = Sidecar("key", str(tmp_path), ["0.tar", "1.tar"], may_lack=True)
    with pytest.raises(SampleError) as caught:
        sidecar.text(1, 1, "re", "b")
    assert caught.value.cause == cause
    assert sidecar.text(0, 1, "re", "b") == "B"


def not_utf8():
    data = pa.array([b"A", b"caf\xe9"])
    return pa.RecordBatch.from_arrays([pa.Array.from_buffers(pa.string(), 2, data.buffers())], ["re"])


def test_a_folder_that_is_no_sidecar_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"mine=.*: has files of 0 of 1 shards: finish what writes them"):
        Sidecar("mine", str(tmp_path), ["0.tar"])
    with pytest.raises(ConfigError, match=r"mine=.*/nowhere: there is no such folder"):
        Sidecar("mine", str(tmp_path / "nowhere"), ["0.tar"])
    sidecar_path(tmp_path, "0.tar").write_bytes(b"x" * 1000)
    with pytest.raises(ConfigError, match=r"mine=.*0\.tar\.arrow cannot be read"):
        Sidecar("mine", str(tmp_path), ["0.tar"])


def test_a_sidecar_may_lie_here_and_have_linked_folders(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    write_one(tmp_path / "elsewhere")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "part").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "own")
    assert Sidecar("mine", ".", ["part/0.tar"]).text(0, 0, "re", "a") == "A"
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Sidecar("mine", ".", ["0.tar"]).text(0, 0, "re", "a") == "A"


def test_the_folder_of_a_captions_job_is_told_from_its_sidecar(tmp_path):
    write_one(tmp_path / "sidecar")
    with pytest.raises(ConfigError, match=r"mine=.*: is the folder of a captions job: give .*/sidecar$"):
        Sidecar("mine", str(tmp_path), ["0.tar"])


@pytest.mark.parametrize(("num_shards", "num_missing", "is_error"), [(20, 2, False), (20, 3, True), (2, 1, True)])
def test_shards_without_a_file_are_warned_of_and_many_of_them_an_error(num_shards, num_missing, is_error, tmp_path):
    names = [f"{i}.tar" for i in range(num_shards)]
    for name in names[num_missing:]:
        write_one(tmp_path, name)
    said = f"mine={tmp_path}: has files of {num_shards - num_missing} of {num_shards} shards"
    if is_error:
        with pytest.raises(ConfigError, match=re.escape(said) + r": finish what writes them"):
            Sidecar("mine", str(tmp_path), names)
        assert Sidecar("mine", str(tmp_path), names, may_lack=True).text(num_missing, 0, "re", "a") == "A"
        return
    sidecar = Sidecar("mine", str(tmp_path), names)
    assert sidecar.warning == f"{said}; samples of the others are invalid (missing_sidecar)"
    assert sidecar.text(num_missing, 0, "re", "a") == "A"
    with pytest.raises(SampleError):
        sidecar.text(0, 0, "re", "a")


def test_open_shards_hold_no_file_descriptors(tmp_path):
    names = [f"{i}.tar" for i in range(50)]
    for name in names:
        write_one(tmp_path, name)
    sidecar = Sidecar("key", str(tmp_path), names)
    before = len(os.listdir("/proc/self/fd"))
    assert [sidecar.text(i, 0, "re", "a") for i in range(50)] == ["A"] * 50
    assert len(os.listdir("/proc/self/fd")) == before
    for name in names:
        sidecar_path(tmp_path, name).unlink()
    assert sidecar.text(20, 1, "re", "b") == "B", "the mapping outlives the file"
