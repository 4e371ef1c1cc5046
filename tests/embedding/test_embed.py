"""Features of shards: right, whole, the same for any number of ranks and after any crash."""

import itertools
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embedding_rank_jobs import embed_and_tell, embed_shards, make_embedder
from helpers import encode_image, make_sample, write_tar
from runs import finish, run, signal_when, start
from scaleclip.config import CacheConfig
from scaleclip.data.cache import ShardCache
from scaleclip.data.convert import to_mds
from scaleclip.data.sample import SampleError
from scaleclip.data.transform import centre_crop, open_image, resize
from scaleclip.data.webdataset import TarReader
from scaleclip.embedding import embed
from scaleclip.embedding.chunks import Wanted
from scaleclip.errors import ConfigError, RunError
from scaleclip.evaluation.encoder import Encoder
from scaleclip.local_ranks import run_ranks

NUM_SAMPLES = 32  # of the four shards


def wanted(shards: Path, **changes) -> Wanted:
    return Wanted(**{"data": (f"{shards}/*.tar",), "text": "txt", "batch": 5, **changes})


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def features(out: Path, column: str) -> np.ndarray:
    table = pq.read_table(out / "features")
    return np.stack(table[column].to_numpy())


def test_features_are_the_encoders(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "_LOOK_S", 0.0)  # what is being written is not told as less
    # so large that training would not decode every pixel
    write_tar(shards / "00001.tar", [make_sample(n, jpg=encode_image(n, "JPEG", (400, 300))) for n in range(4)])
    shown = []
    summary = embed_shards(wanted(shards, workers=1), tmp_path / "out", shown=shown)
    assert summary == (4, NUM_SAMPLES, {})
    assert shown[-1][:2] == (NUM_SAMPLES, NUM_SAMPLES)
    assert [done for done, *_ in shown] == sorted(done for done, *_ in shown)

    embedder = make_embedder()
    encoder = Encoder(embedder.model, embedder.tokenizer, embedder.config.image.size, 5)
    paths = sorted(map(str, shards.glob("*.tar")))
    reader = TarReader(paths, ShardCache(CacheConfig(folder=str(tmp_path / "cache"))))
    samples = [reader(shard, number) for shard in range(4) for number in range(len(reader.keys(shard)))]
    pixels = []
    for sample in samples:
        picture = open_image(sample.members["jpg"], 10**6)
        crop = centre_crop(picture.height, picture.width)
        pixels.append(resize(picture.decode(crop, crop.height), embedder.config.image.size, flip=False))
    with encoder.evaluating():
        image_NE = encoder.images(torch.stack(pixels))
        text_NE = encoder.texts([sample.members["txt"].decode() for sample in samples])
    out = tmp_path / "out"
    assert pq.read_table(out / "features")["key"].to_pylist() == [sample.key for sample in samples]
    torch.testing.assert_close(torch.from_numpy(features(out, "image")), image_NE, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.from_numpy(features(out, "text")), text_NE, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_any_number_of_ranks_writes_the_same_files(shards, tmp_path):
    found = []
    for ranks in (1, 2, 3):
        out = tmp_path / str(ranks)
        summaries, written = zip(*run_ranks(embed_and_tell, ranks, wanted(shards), out), strict=True)
        assert list(summaries) == [(4, NUM_SAMPLES, {})] * ranks
        assert sorted(itertools.chain(*written)) == ["00000", "00001", "00002", "00003"]
        assert all(written)
        found.append(files(out))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 5  # four shards and the manifest


def test_what_is_there_is_not_made_again(shards, tmp_path):
    out = tmp_path / "out"
    embed_shards(wanted(shards), out)
    whole = files(out)
    (out / "features" / "00001.parquet").unlink()
    (out / "features" / ".00001.parquet.123").write_bytes(b"cut short")
    before = {path: path.stat().st_mtime_ns for path in (out / "features").glob("0*.parquet")}
    shown = []
    embed_shards(wanted(shards), out, shown=shown)
    assert files(out) == whole
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert shown[-1][:2] == (4, 4)


def test_bad_samples_have_a_row_of_their_own_and_no_features(shards, tmp_path):
    write_tar(
        shards / "00001.tar",
        [
            make_sample(0),
            make_sample(1, jpg=b"no image"),
            make_sample(2, jpg=None),
            make_sample(3, txt=b" "),
            make_sample(4),
        ],
    )
    out = tmp_path / "out"
    summary = embed_shards(wanted(shards), out)
    assert summary == (4, NUM_SAMPLES - 4 + 2, {"empty_caption": 1, "no_image": 1, "undecodable_image": 1})
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["complete"]
    assert (manifest["samples"], manifest["faults"]) == summary[1:]
    table = pq.read_table(out / "features" / "00001.parquet")
    assert table["key"].to_pylist() == [f"{0:09d}", f"{4:09d}"]
    assert [path.name for path in (out / "faults").iterdir()] == ["00001.jsonl"]
    rows = [json.loads(line) for line in (out / "faults" / "00001.jsonl").read_text().splitlines()]
    assert [(row["key"], row["shard"], row["sample"], row["cause"]) for row in rows] == [
        (f"{1:09d}", "00001.tar", 1, "undecodable_image"),
        (f"{2:09d}", "00001.tar", 2, "no_image"),
        (f"{3:09d}", "00001.tar", 3, "empty_caption"),
    ]
    # images alone need no text
    assert embed_shards(wanted(shards, text=None), tmp_path / "images").samples == NUM_SAMPLES - 4 + 3


def test_a_sample_that_was_mended_is_bad_no_more(shards, tmp_path):
    path, out = shards / "00001.tar", tmp_path / "out"
    samples = [make_sample(number) for number in range(4)]
    write_tar(path, [*samples[:3], make_sample(3, jpg=None)])
    assert embed_shards(wanted(shards), out).faults == {"no_image": 1}
    write_tar(path, samples)
    (out / "features" / "00001.parquet").unlink()
    assert embed_shards(wanted(shards), out) == (4, NUM_SAMPLES, {})
    assert list((out / "faults").iterdir()) == []


def test_texts_of_tables(tmp_path):
    pq.write_table(pa.table({"query": ["a cat", "", "a dog"], "other": ["x", "y", "z"]}), tmp_path / "rows.parquet")
    (tmp_path / "lines.jsonl").write_text('{"query": "a bird"}\n')
    data = (f"{tmp_path}/rows.parquet", f"{tmp_path}/lines.jsonl")
    out = tmp_path / "out"
    assert embed_shards(Wanted(data, images=False, text="query"), out) == (2, 3, {"empty_caption": 1})
    table = pq.read_table(out / "features" / "rows.parquet")
    assert table.column_names == ["key", "text"]
    assert table["key"].to_pylist() == ["rows/0", "rows/2"]
    embedder = make_embedder()
    with torch.no_grad():
        expected = embedder.model.encode_text(embedder.tokenizer(["a cat", "a dog"]))
    np.testing.assert_array_equal(np.stack(table["text"].to_numpy()), expected.numpy())


def test_mds_has_the_features_of_the_tars_that_it_was_made_of(shards, tmp_path):
    tars = sorted(map(str, shards.glob("*.tar")))
    list(to_mds(tars, tmp_path / "mds", ShardCache(CacheConfig(folder=str(tmp_path / "cache"))), workers=1))
    embed_shards(wanted(shards), tmp_path / "of-tars")
    embed_shards(Wanted((f"{tmp_path}/mds/index.json",), text="txt", batch=5), tmp_path / "of-mds")
    found = [pq.read_table(tmp_path / name / "features") for name in ("of-tars", "of-mds")]
    assert found[0] == found[1]


def test_half_precision_is_the_rounded_feature(shards, tmp_path):
    embed_shards(wanted(shards), tmp_path / "whole")
    embed_shards(wanted(shards), tmp_path / "half", dtype="float16")
    half = features(tmp_path / "half", "image")
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, features(tmp_path / "whole", "image").astype(np.float16))


@pytest.mark.parametrize(
    ("changes", "settings", "named"),
    [
        ({}, {"seed": 1}, "weights: '"),
        ({"text": None}, {}, "columns"),
        ({"members": ("png", "jpg")}, {}, "image: "),
        ({}, {"dtype": "float16"}, "dtype: 'float32' there"),
    ],
)
def test_other_features_need_another_folder(shards, tmp_path, changes, settings, named):
    out = tmp_path / "out"
    embed_shards(wanted(shards), out)
    whole = files(out)
    with pytest.raises(ConfigError, match=named):
        embed_shards(wanted(shards, **changes), out, **settings)
    assert files(out) == whole


def test_other_shards_of_the_same_names_are_not_taken_for_done(shards, tmp_path):
    out = tmp_path / "out"
    embed_shards(wanted(shards), out)
    whole = files(out)
    elsewhere = shutil.copytree(shards, tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"of another shard called 00000: made of .*/shards/00000.tar .*/elsewhere/00000.tar"):
        embed_shards(wanted(elsewhere), out)
    write_tar(shards / "00001.tar", [make_sample(number) for number in range(5)])
    with pytest.raises(ConfigError, match=r"called 00001: .*4 samples and .*now has .*5 samples and .*delete .*00001.parquet"):
        embed_shards(wanted(shards), out)
    assert files(out) == whole
    (out / "features" / "00001.parquet").unlink()
    assert embed_shards(wanted(shards), out) == (4, NUM_SAMPLES + 1, {})


def test_an_architecture_that_weights_do_not_tell_is_told_apart(shards, tmp_path):
    out = tmp_path / "out"
    embed_shards(wanted(shards), out)
    with pytest.raises(ConfigError, match="architecture: '"):
        embed_shards(wanted(shards), out, activation="quick_gelu")


def test_a_folder_of_something_else_is_left_alone(shards, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="holds files that are no features"):
        embed_shards(wanted(shards), tmp_path / "out")


def test_shards_of_one_name_are_refused(shards, tmp_path):
    write_tar(tmp_path / "00001.tar", [make_sample(0)])
    with pytest.raises(ConfigError, match="two shards called 00001"):
        embed_shards(wanted(shards, data=(f"{shards}/*.tar", f"{tmp_path}/00001.tar")), tmp_path / "out")


@pytest.mark.parametrize("place", ["fetch", "__call__"])
def test_a_shard_that_cannot_be_read_is_left_for_another_start(shards, tmp_path, monkeypatch, place):
    read = getattr(TarReader, place)

    def unreachable(reader, shard, *ordinal):
        if shard == 1 and ordinal in ((), (2,)):
            raise SampleError("unreachable_shard", "00001.tar: the store does not answer")
        return read(reader, shard, *ordinal)

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(TarReader, place, unreachable)
        with pytest.raises(RunError, match=r"1 of 4 shards could not be read.*the store does not answer"):
            embed_shards(wanted(shards), out)
    assert not json.loads((out / "manifest.json").read_text())["complete"]
    assert sorted(path.name for path in (out / "features").iterdir()) == ["00000.parquet", "00002.parquet", "00003.parquet"]
    assert embed_shards(wanted(shards), out) == (4, NUM_SAMPLES, {})


def test_an_empty_shard_has_an_empty_file(tmp_path):
    write_tar(tmp_path / "none.tar", [])
    write_tar(tmp_path / "some.tar", [make_sample(0)])
    assert embed_shards(Wanted((f"{tmp_path}/*.tar",)), tmp_path / "out") == (2, 1, {})
    assert pq.read_table(tmp_path / "out" / "features" / "none.parquet").num_rows == 0


@pytest.mark.slow
def test_a_killed_command_loses_no_shard_that_it_finished(undisturbed, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(24):
        write_tar(shards / f"{number:05d}.tar", [make_sample(12 * number + place) for place in range(12)])
    arguments = ("embed", undisturbed, "--data", f"{shards}/*.tar", "--what", "both", "--batch", "4", "--workers", "1")
    whole = tmp_path / "whole"
    output = run(*arguments, "--out", whole)
    assert "288 of 288 samples" in output
    assert "288 samples of 24 shards have features" in output

    out = tmp_path / "out"
    killed = start(*arguments, "--out", out, "--ranks", "2")
    code, _ = signal_when(killed, lambda: len(list(out.glob("features/0*.parquet"))) >= 3, signal.SIGKILL)
    assert code == -signal.SIGKILL
    there = {path: path.stat().st_mtime_ns for path in out.glob("features/0*.parquet")}
    assert 3 <= len(there) < 24
    run(*arguments, "--out", out)
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert files(out) == files(whole)


@pytest.mark.slow
def test_the_command_is_told_what_bare_weights_are(shards, tmp_path):
    weights = tmp_path / "weights.pt"
    torch.save({"visual.proj": torch.zeros(2)}, weights)
    arguments = ("embed", weights, "--data", f"{shards}/*.tar", "--out", tmp_path / "out", "--architecture")
    for name, said in (("ViT-Q", "'ViT-Q' is unknown"), ("ViT-B-32-quickgelu", f"{weights} holds no CLIP")):
        code, output = finish(start(*arguments, name))
        assert (code, said in output) == (2, True), output
