"""Finding shards and their counts."""

import json
from pathlib import Path

import pytest

from helpers import make_sample, write_tar
from scaleclip.data.manifest import expand_shards, load_manifest, write_manifest
from scaleclip.errors import ConfigError


def names(paths):
    return [Path(path).name for path in paths]


def test_globs_braces_and_paths(shards):
    assert names(expand_shards([f"{shards}/*.tar"])) == ["00000.tar", "00001.tar", "00002.tar", "00003.tar"]
    assert names(expand_shards([f"{shards}/{{00001..00003}}.tar"])) == ["00001.tar", "00002.tar", "00003.tar"]
    assert names(expand_shards([f"{shards}/00003.tar", f"{shards}/0000{{0,3}}.tar"])) == ["00003.tar", "00000.tar"]


@pytest.mark.parametrize("pattern", ["none-*.tar", "none.tar", "{00002..00005}.tar"])
def test_what_matches_nothing_is_an_error(shards, pattern):
    with pytest.raises(ConfigError, match="no shards match"):
        expand_shards([f"{shards}/{pattern}"])


def test_counts_come_from_img2datasets_stats(shards):
    manifest = load_manifest([f"{shards}/*.tar"], None)
    assert manifest.counts == (9, 4, 12, 7)
    assert manifest.num_samples == 32
    assert manifest.first_sample.tolist() == [0, 9, 13, 25]


@pytest.mark.parametrize("stats", [None, "{", "{}", '{"successes": null}'])
def test_a_missing_count_says_what_to_do(shards, stats):
    path = shards / "00002_stats.json"
    path.unlink() if stats is None else path.write_text(stats)
    with pytest.raises(ConfigError, match=r"00002\.tar is unknown.*scaleclip data index"):
        load_manifest([f"{shards}/*.tar"], None)


def test_a_manifest_counts_without_stats(shards, tmp_path):
    for stats in shards.glob("*_stats.json"):
        stats.unlink()
    write_manifest(expand_shards([f"{shards}/*.tar"]), tmp_path / "m.json")
    assert load_manifest([f"{shards}/*.tar"], str(tmp_path / "m.json")).counts == (9, 4, 12, 7)
    write_tar(shards / "00004.tar", [make_sample(99)])
    with pytest.raises(ConfigError, match=r"no count for '00004\.tar'"):
        load_manifest([f"{shards}/*.tar"], str(tmp_path / "m.json"))


@pytest.mark.parametrize("text", ["[", "{}", '{"counts": 3}', '{"counts": {"00000.tar": "x"}}'])
def test_a_file_that_is_no_manifest(shards, tmp_path, text):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(ConfigError, match=r"data\.manifest="):
        load_manifest([f"{shards}/*.tar"], str(tmp_path / "m.json"))


def test_two_shards_of_one_name_are_refused(shards, tmp_path):
    (tmp_path / "other").mkdir()
    write_tar(tmp_path / "other" / "00000.tar", [make_sample(1)])
    with pytest.raises(ConfigError, match=r"two shards are called 00000\.tar"):
        write_manifest([f"{shards}/00000.tar", str(tmp_path / "other" / "00000.tar")], tmp_path / "m.json")


def test_the_fingerprint_follows_names_and_counts_not_places(shards, tmp_path):
    before = load_manifest([f"{shards}/*.tar"], None).fingerprint
    moved = tmp_path / "moved"
    shards.rename(moved)
    assert load_manifest([f"{moved}/*.tar"], None).fingerprint == before
    (moved / "00001_stats.json").write_text(json.dumps({"successes": 5}))
    assert load_manifest([f"{moved}/*.tar"], None).fingerprint != before
