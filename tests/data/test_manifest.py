"""Finding shards and their counts; manifests and subsets."""

import json
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import make_sample, write_tar
from scaleclip.data.index import index_tar
from scaleclip.data.manifest import write_manifest
from scaleclip.data.sample import SampleError
from scaleclip.data.shards import expand_shards, file_name
from scaleclip.data.source import open_shards
from scaleclip.data.subset import Choice, write_subset
from scaleclip.errors import ConfigError


@pytest.fixture
def open_manifest(shards, cache):
    """Of the test's shards, from their stats files or a folder."""
    return lambda folder=None: open_shards("data.sources.tiny", [f"{shards}/*.tar"], folder and str(folder), cache)[0]


def index(patterns, folder, cache):
    return list(write_manifest(expand_shards("SHARDS", patterns), folder, cache, workers=2))


def names(paths):
    return [Path(path).name for path in paths]


def test_globs_braces_and_paths(shards):
    def found(*patterns):
        return names(expand_shards("SHARDS", [f"{shards}/{pattern}" for pattern in patterns]))

    assert found("*.tar") == ["00000.tar", "00001.tar", "00002.tar", "00003.tar"]
    assert found("{00001..00003}.tar") == ["00001.tar", "00002.tar", "00003.tar"]
    assert found("{00000,00002}.tar", "0000[13].tar") == ["00000.tar", "00002.tar", "00001.tar", "00003.tar"]
    assert found("00003.tar", "0000{0,3}.tar") == ["00003.tar", "00000.tar"], "each once"


def test_globs_and_braces_of_urls():
    for number in range(3):
        with fsspec.open(f"memory://laion/part/{number:05d}.tar", "wb") as file:
            file.write(b"x")
    assert expand_shards("SHARDS", ["memory://laion/part/*.tar"]) == [f"memory:///laion/part/{n:05d}.tar" for n in range(3)]
    braces = ["s3://bucket/{00000..00002}.tar"]
    assert expand_shards("SHARDS", braces) == [f"s3://bucket/{n:05d}.tar" for n in range(3)], "the store is not asked"


@pytest.mark.parametrize("pattern", ["none-*.tar", "none.tar", "{00002..00005}.tar"])
def test_what_matches_nothing_is_an_error(shards, pattern):
    with pytest.raises(ConfigError, match=r"data\.sources\.tiny: no shards match"):
        expand_shards("data.sources.tiny", [f"{shards}/{pattern}"])


def test_counts_come_from_img2datasets_stats(open_manifest):
    manifest = open_manifest()
    assert manifest.counts.tolist() == [9, 4, 12, 7]
    assert manifest.num_samples == 32
    assert manifest.first_sample.tolist() == [0, 9, 13, 25]


@pytest.mark.parametrize("stats", [None, "{", "{}", '{"successes": null}'])
def test_a_missing_count_says_what_to_do(shards, open_manifest, stats):
    path = shards / "00002_stats.json"
    path.unlink() if stats is None else path.write_text(stats)
    with pytest.raises(ConfigError, match=r"data\.sources\.tiny: .*00002\.tar is unknown.*scaleclip data index"):
        open_manifest()


def test_a_manifest_counts_without_stats(shards, tmp_path, cache, open_manifest):
    for stats in shards.glob("*_stats.json"):
        stats.unlink()
    found = index([f"{shards}/*.tar"], tmp_path / "m", cache)
    assert [counted.samples for counted in found] == [9, 4, 12, 7]
    assert open_manifest(tmp_path / "m").counts.tolist() == [9, 4, 12, 7]
    write_tar(shards / "00004.tar", [make_sample(99)])
    with pytest.raises(ConfigError, match=r"data\.sources\.tiny\.manifest=.*no row for 00004\.tar: run `scaleclip data index`"):
        open_manifest(tmp_path / "m")


def test_indexing_again_reads_only_what_is_new(shards, tmp_path, cache, open_manifest):
    index([f"{shards}/0000[0-2].tar"], tmp_path / "m", cache)
    known = {path: path.stat().st_mtime_ns for path in (tmp_path / "m" / "index").iterdir()}
    assert len(known) == 3
    index([f"{shards}/*.tar"], tmp_path / "m", cache)
    assert {path: path.stat().st_mtime_ns for path in known} == known
    assert open_manifest(tmp_path / "m").counts.tolist() == [9, 4, 12, 7]


def test_indexing_says_what_is_wrong_with_a_shard(shards, tmp_path, cache):
    write_tar(shards / "00000.tar", [make_sample(i % 3) for i in range(6)])
    data = (shards / "00001.tar").read_bytes()
    (shards / "00001.tar").write_bytes(data[: len(data) // 2])
    (shards / "00003.tar").write_bytes(b"x" * 5000)
    found = index([f"{shards}/*.tar"], tmp_path / "m", cache)
    assert found[0].warnings() == ["3 samples have the key of another"]
    assert found[1].warnings() == ["is cut off; only its whole samples are counted"]
    assert found[2].warnings() == []
    assert found[3].warnings() == ["cannot be read: there is no whole sample in it: it is no tar, or cut off at once"]
    assert [counted.samples for counted in found] == [6, 2, 12, 0]


@pytest.mark.parametrize("content", [b"PAR1", b"{}", b""])
def test_a_file_that_is_no_manifest(tmp_path, open_manifest, content):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "manifest.parquet").write_bytes(content)
    with pytest.raises(ConfigError, match=r"data\.sources\.tiny\.manifest="):
        open_manifest(tmp_path / "m")


def test_a_manifest_that_is_not_there(tmp_path, open_manifest):
    with pytest.raises(ConfigError, match=r"data\.sources\.tiny\.manifest=.*: cannot be read"):
        open_manifest(tmp_path / "m")


def test_two_shards_of_one_name_are_refused(shards, tmp_path, cache):
    (tmp_path / "other").mkdir()
    write_tar(tmp_path / "other" / "00000.tar", [make_sample(1)])
    with pytest.raises(ConfigError, match=r"two shards are called 00000\.tar"):
        index([f"{shards}/00000.tar", f"{tmp_path}/other/00000.tar"], tmp_path / "m", cache)


def test_the_fingerprint_follows_names_and_counts_not_places(shards, tmp_path, cache, open_manifest):
    before = open_manifest().fingerprint
    moved = tmp_path / "moved"
    shards.rename(moved)
    assert open_shards("k", [f"{moved}/*.tar"], None, cache)[0].fingerprint == before
    (moved / "00001_stats.json").write_text(json.dumps({"successes": 5}))
    assert open_shards("k", [f"{moved}/*.tar"], None, cache)[0].fingerprint != before


def choose(shards, cache, out, choice, manifest=None):
    return list(write_subset([f"{shards}/*.tar"], manifest, cache, out, choice, workers=2))


def kept_keys(shards, cache, folder):
    """By shard, in the manifest's order."""
    manifest, read = open_shards("k", [f"{shards}/*.tar"], str(folder), cache)
    return [
        [read(shard, manifest.ordinal(shard, index)).key for index in range(count)]
        for shard, count in enumerate(manifest.counts)
    ]


def all_kept(shards, cache, folder):
    return [key for keys in kept_keys(shards, cache, folder) for key in keys]


def kept_of_all(shards):
    return [list(index_tar(str(path)).keys) for path in sorted(shards.glob("*.tar"))]


def write_keys(path, keys):
    """In each form that a file of keys has."""
    if path.suffix == ".txt":
        path.write_text("\n".join(keys) + "\n")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"key": key, "other": 1}) + "\n" for key in keys))
    elif path.suffix == ".csv":
        path.write_text("key,other\n" + "".join(f"{key},1\n" for key in keys))
    else:
        pq.write_table(pa.table({"key": keys}), path)
    return str(path)


KEEP = ["000000018", "000000003", "000000000", "000000030", "999999999"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_subset_by_a_file_of_keys(shards, tmp_path, cache, suffix):
    chosen = choose(shards, cache, tmp_path / "s", Choice(keep=write_keys(tmp_path / f"keys{suffix}", KEEP)))
    assert [(each.samples, len(each.kept)) for each in chosen] == [(9, 2), (4, 0), (12, 1), (7, 1)]
    assert kept_keys(shards, cache, tmp_path / "s") == [["000000000", "000000003"], [], ["000000018"], ["000000030"]]


def test_a_subset_without_some_keys(shards, tmp_path, cache):
    choose(shards, cache, tmp_path / "s", Choice(drop=write_keys(tmp_path / "keys.txt", KEEP)))
    kept = all_kept(shards, cache, tmp_path / "s")
    assert kept == [f"{i:09d}" for i in range(32) if f"{i:09d}" not in KEEP]


def test_a_subset_by_datacomps_uids(shards, tmp_path, cache):
    uids = {number: f"{number * 7919:016x}{number:016x}" for number in range(32)}
    for first, shard in zip((0, 9, 13, 25), sorted(shards.glob("*.tar")), strict=True):
        count = json.loads(shard.with_name(f"{shard.stem}_stats.json").read_text())["count"]
        numbers = range(first, first + count)
        write_tar(shard, [make_sample(i, json=json.dumps({"uid": uids[i]}).encode()) for i in numbers])
    halves = [(int(uids[i][:16], 16), int(uids[i][16:], 16)) for i in (31, 4, 9)]
    np.save(tmp_path / "uids.npy", np.array(halves, "u8,u8"))
    choose(shards, cache, tmp_path / "s", Choice(keep=str(tmp_path / "uids.npy"), by="uid"))
    assert all_kept(shards, cache, tmp_path / "s") == ["000000004", "000000009", "000000031"]


def test_a_subset_by_a_condition_on_the_samples_json(shards, tmp_path, cache):
    choose(shards, cache, tmp_path / "s", Choice(where="concept IN ('c1', 'c3') AND length(txt) > 20"))
    assert all_kept(shards, cache, tmp_path / "s") == [f"{i:09d}" for i in range(10, 32) if i % 5 in (1, 3)]


def test_a_subset_by_a_condition_on_img2datasets_table(shards, tmp_path, cache):
    """It has a row for every download that was tried, in an order of its own."""
    first = 0
    for shard, count in zip(sorted(shards.glob("*.tar")), (9, 4, 12, 7), strict=True):
        numbers = [*reversed(range(first, first + count)), 1000 + first]
        rows = {"key": [f"{i:09d}" for i in numbers], "width": [100 + i for i in numbers]}
        pq.write_table(pa.table(rows), shard.with_suffix(".parquet"))
        first += count
    choose(shards, cache, tmp_path / "s", Choice(where="width BETWEEN 107 AND 110 OR width >= 131"))
    assert kept_keys(shards, cache, tmp_path / "s") == [
        ["000000007", "000000008"],
        ["000000009", "000000010"],
        [],
        ["000000031"],
    ]


def test_a_subset_without_what_is_in_quarantine_and_of_a_subset(shards, tmp_path, cache):
    choose(shards, cache, tmp_path / "even", Choice(where="concept IN ('c0', 'c2', 'c4')"))
    path = sorted(shards.glob("*.tar"))[2]
    before = kept_keys(shards, cache, tmp_path / "even")
    whole = [f"{i:09d}" for i in range(13, 25)]
    bad = [whole.index(key) for key in before[2][1:3]]
    causes = ["undecodable_image", "bad_json", "unreachable_shard"]
    rows = [
        {"source": "tiny", "shard": f"/elsewhere/{path.name}", "sample": sample, "cause": cause, "detail": ""}
        for sample, cause in zip([*bad, whole.index(before[2][3])], causes, strict=True)
    ]
    # the last line was cut off by a crash
    (tmp_path / "quarantine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"source": "ti')
    choice = Choice(drop=str(tmp_path / "quarantine.jsonl"))
    for manifest, kept in ((str(tmp_path / "even"), before), (None, [*kept_of_all(shards)])):
        choose(shards, cache, tmp_path / "clean", choice, manifest=manifest)
        after = kept_keys(shards, cache, tmp_path / "clean")
        assert after[2] == [key for key in kept[2] if key not in before[2][1:3]], "what did not come may come"
        assert after[:2] + after[3:] == kept[:2] + kept[3:]


def test_keys_in_folders_are_found_in_img2datasets_table(tmp_path, cache):
    (tmp_path / "shards").mkdir()
    for folder, number in (("part/", 0), ("", 1)):
        numbers = range(3 * number, 3 * number + 3)
        samples = [(folder + make_sample(i)[0], make_sample(i)[1]) for i in numbers]
        path = write_tar(tmp_path / "shards" / f"{number:05d}.tar", samples)
        keys = [f"{i:09d}" for i in (*numbers, numbers[0])]
        pq.write_table(pa.table({"key": keys, "width": [100, 200, 300, 100]}), path.with_suffix(".parquet"))
    choose(tmp_path / "shards", cache, tmp_path / "s", Choice(where="width < 250"))
    assert kept_keys(tmp_path / "shards", cache, tmp_path / "s") == [
        ["part/000000000", "part/000000001"],
        ["000000003", "000000004"],
    ]


def test_fields_of_several_types_are_texts(shards, tmp_path, cache):
    write_tar(shards / "00000.tar", [make_sample(i, json=json.dumps({"w": i if i else "none"}).encode()) for i in range(9)])
    found = choose(shards, cache, tmp_path / "s", Choice(where="TRY_CAST(w AS INT) >= 7"))
    assert ["w" in each.error for each in found] == [False, True, True, True], "no sample of these has it"
    assert all_kept(shards, cache, tmp_path / "s") == ["000000007", "000000008"]


def test_a_new_subset_in_an_old_folder_leaves_the_old_ordinals_to_runs_that_have_them_open(
    shards, tmp_path, cache, open_manifest
):
    choose(shards, cache, tmp_path / "s", Choice(keep=write_keys(tmp_path / "keys.txt", KEEP)))
    old = open_manifest(tmp_path / "s")
    assert old.ordinal(0, 1) == 3
    choose(shards, cache, tmp_path / "s", Choice(keep=write_keys(tmp_path / "keys.txt", ["000000001", "000000002"])))
    assert [old.ordinal(0, index) for index in range(2)] == [0, 3]
    assert [open_manifest(tmp_path / "s").ordinal(0, index) for index in range(2)] == [1, 2]


def test_a_mended_tar_is_indexed_again(shards, tmp_path, cache):
    path = shards / "00001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert index([f"{shards}/*.tar"], tmp_path / "m", cache)[1].samples == 2
    path.write_bytes(whole)
    assert index([f"{shards}/*.tar"], tmp_path / "m", cache)[1].samples == 4
    write_tar(path, [make_sample(i) for i in range(9, 20)])
    assert index([f"{shards}/*.tar"], tmp_path / "m", cache)[1].samples == 11


def test_keys_of_indexed_remote_shards_cost_no_download(shards, tmp_path, cache):
    for path in shards.iterdir():
        with fsspec.open(f"memory://keys/{path.name}", "wb") as file:
            file.write(path.read_bytes())
    index([f"{shards}/*.tar"], tmp_path / "m", cache)
    _, read = open_shards("k", ["memory://keys/{00000..00003}.tar"], str(tmp_path / "m"), cache)
    assert read.keys(1) == tuple(f"{i:09d}" for i in range(9, 13))
    assert cache.take_counts() == {}


def test_a_folder_stands_for_its_tars_or_its_mds_index(shards, tmp_path):
    assert names(expand_shards("SHARDS", [str(shards)])) == [f"{n:05d}.tar" for n in range(4)]
    (tmp_path / "mds").mkdir()
    (tmp_path / "mds" / "index.json").touch()
    assert names(expand_shards("SHARDS", [f"{tmp_path}/{{mds,shards}}"])) == ["index.json", *(f"{n:05d}.tar" for n in range(4))]


def test_a_store_that_cannot_be_listed_is_named():
    with pytest.raises(
        ConfigError, match=r"SHARDS: s4://bucket/\*\.tar cannot be listed \(ValueError.*endpoint and credentials"
    ):
        expand_shards("SHARDS", ["s4://bucket/*.tar"])


def test_mds_needs_no_manifest(tmp_path, cache):
    (tmp_path / "index.json").touch()
    with pytest.raises(ConfigError, match="an MDS folder needs no manifest"):
        index([f"{tmp_path}/index.json"], tmp_path / "m", cache)


def test_a_manifest_of_other_tars_is_a_fault_of_their_samples(shards, tmp_path, cache):
    index([f"{shards}/*.tar"], tmp_path / "m", cache)
    write_tar(shards / "00001.tar", [make_sample(i) for i in range(9)])
    _, read = open_shards("k", [f"{shards}/*.tar"], str(tmp_path / "m"), cache)
    with pytest.raises(SampleError, match=r"other_shard.*is not the tar that was indexed"):
        read(1, 0)


def test_samples_that_a_cut_tar_has_no_more_are_not_chosen(shards, tmp_path, cache):
    data = (shards / "00002.tar").read_bytes()
    (shards / "00002.tar").write_bytes(data[: len(data) // 2])
    for choice in (Choice(where="concept IS NOT NULL"), Choice(drop=write_keys(tmp_path / "keys.txt", KEEP))):
        chosen = choose(shards, cache, tmp_path / "s", choice)
        assert 4 <= len(chosen[2].kept) <= 6
        assert not chosen[2].error


def test_a_subset_of_a_subset_with_empty_shards(shards, tmp_path, cache):
    choose(shards, cache, tmp_path / "few", Choice(keep=write_keys(tmp_path / "keys.txt", ["000000003", "000000004"])))
    again = choose(shards, cache, tmp_path / "fewer", Choice(where="concept = 'c3'"), manifest=str(tmp_path / "few"))
    assert [each.error for each in again] == [""] * 4
    assert all_kept(shards, cache, tmp_path / "fewer") == ["000000003"]


def test_signed_urls_are_shards():
    signed = "https://host/laion/00000.tar?sig=a*b"
    assert expand_shards("SHARDS", [signed]) == [signed]
    assert file_name(signed) == "00000.tar"


def test_another_subset_of_as_many_is_another_data_set(shards, tmp_path, cache, open_manifest):
    prints = set()
    for number in (3, 4):
        choose(shards, cache, tmp_path / f"s{number}", Choice(keep=write_keys(tmp_path / "keys.txt", [f"{number:09d}"])))
        prints.add(open_manifest(tmp_path / f"s{number}").fingerprint)
    assert len(prints | {open_manifest().fingerprint}) == 3


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"where": "concept ="}, "--where 'concept ='"),
        ({"where": "colour = 1"}, "nothing is kept.*'colour = 1'.*\"colour\" not found"),
        ({"keep": "none.txt"}, "none.txt: cannot be read as keys"),
        ({"keep": "other.parquet", "by": "uid"}, "other.parquet: cannot be read as keys"),
        ({"keep": "nothing.txt"}, "nothing is kept: .* passes --keep"),
        ({"keep": "some.txt", "by": "uid"}, "--by uid: no sample has such a field"),
        ({"keep": "numbers.npy"}, "not DataComp's uids"),
        ({"keep": "objects.npy"}, "cannot be read as DataComp's uids: .*write the keys to a .txt"),
        ({"drop": "quarantine.jsonl"}, "is no quarantine"),
    ],
)
def test_wrong_choices_say_what_is_wrong(shards, tmp_path, cache, choice, message):
    write_keys(tmp_path / "other.parquet", ["1"])
    write_keys(tmp_path / "nothing.txt", ["1"])
    write_keys(tmp_path / "some.txt", KEEP)
    np.save(tmp_path / "numbers.npy", np.arange(3))
    np.save(tmp_path / "objects.npy", np.array(["a"], dtype=object))
    (tmp_path / "quarantine.jsonl").write_text("{}\n")
    choice = {name: str(tmp_path / value) if name in ("keep", "drop") else value for name, value in choice.items()}
    with pytest.raises(ConfigError, match=message):
        choose(shards, cache, tmp_path / "s", Choice(**choice))
    assert not (tmp_path / "s" / "manifest.parquet").exists()
