"""Scores of made texts are what a look at all of them finds, and whatever cannot be scored is counted or said."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from captioning_rank_jobs import rewriting, write
from captions_job import by_rule, replace_texts, write_job
from evaluation_models import tiny_encoder
from helpers import make_sample, write_tar
from scaleclip.captioning import reading
from scaleclip.captioning.made_texts import Origin, job_of, open_made_texts
from scaleclip.captioning.reading import Wanted
from scaleclip.captioning.score import score
from scaleclip.captioning.scored import Score, as_json, faults
from scaleclip.captioning.tables import join_tables, refuse_job
from scaleclip.captioning.words import distinct, jaccard, words
from scaleclip.data.cache import ShardCache
from scaleclip.data.convert import to_mds
from scaleclip.data.manifest import Manifest
from scaleclip.data.source import open_shards
from scaleclip.errors import ConfigError, RunError
from scaleclip.evaluation.encoder import Encoder
from scaleclip.evaluation.pixels import centre_square

NUM_SAMPLES = 32  # of the four shards
DISTINCT_OF = "scaleclip.captioning.score.DISTINCT_OF"


@pytest.fixture
def job(shards, tmp_path) -> Path:
    return write_job(tmp_path / "out", f"{shards}/*.tar", by_rule)


def wanted(shards: Path, cache: ShardCache, **changes) -> Wanted:
    manifest, reader = open_shards("--data", [f"{shards}/*.tar"], None, cache)
    return Wanted(manifest, reader, **{"against": "txt", "image_members": ("jpg", "png"), **changes})


def score_of(out: Path, wanted: Wanted, encoder: Encoder | None = None) -> Score:
    made = open_made_texts(out, wanted.manifest)
    return score(made, wanted, encoder, "tiny" if encoder else "", lambda *_: None)


def rows(job: Path) -> list[dict]:
    """Of all files of a job."""
    return pq.read_table(job / "texts").to_pylist()


def test_figures_are_those_of_the_texts(job, shards, cache, monkeypatch):
    monkeypatch.setattr(DISTINCT_OF, 100)
    told = []
    source = wanted(shards, cache)
    found = score(open_made_texts(job, source.manifest), source, None, "", lambda *each: told.append(each))
    assert (found.shards, found.samples, found.missing_shards, found.unknown_rows, found.bad_samples) == (4, 32, 0, 0, {})
    assert told[-1] == ("reading", NUM_SAMPLES, NUM_SAMPLES)
    original = {f"{number:09d}": f"a picture of thing {number}" for number in range(NUM_SAMPLES)}
    assert (found.original.rows, found.original.usable, found.original.words.median) == (NUM_SAMPLES, NUM_SAMPLES, 5)
    assert [each.name for each in found.sources] == ["human", "mscoco"]
    texts = {each.name: [row for row in rows(job) if row["source"] == each.name] for each in found.sources}
    fit = {name: [row for row in some if row["reason"] is None] for name, some in texts.items()}
    total = {name: sum(len(words(row["text"])) for row in some) for name, some in fit.items()}
    assert found.num_words == min(*total.values(), 5 * NUM_SAMPLES)
    for each in found.sources:
        some = fit[each.name]
        made, before = [words(row["text"]) for row in some], [words(original[row["key"]]) for row in some]
        assert (each.rows, each.missing, each.usable) == (NUM_SAMPLES, 0, len(some))
        assert each.words.mean == pytest.approx(np.mean([len(text) for text in made]))
        assert each.characters.mean == pytest.approx(np.mean([len(row["text"]) for row in some]))
        assert sum(each.word_counts.values()) == len(some)
        assert each.changed == np.mean([new != old for new, old in zip(made, before, strict=True)])
        shared = [jaccard(new, old) for new, old in zip(made, before, strict=True)]
        assert each.jaccard.mean == pytest.approx(np.mean(shared), abs=0.005)
        new_words = {word for text in made for word in text} - {word for text in original.values() for word in words(text)}
        assert each.vocabulary == len({word for text in made for word in text})
        assert each.growth == pytest.approx(len(new_words) / (4 + NUM_SAMPLES))
        assert all(0 < share <= 1 for share in each.distinct)
        assert each.nearness is None
    assert found.sources[0].reasons == {"empty": 3, "loop": 3}
    assert found.sources[1].changed == 0.75
    assert found.sources[0].distinct != distinct([words(row["text"]) for row in fit["human"]], 10**9), "of as many words"
    assert {(source, reason) for source, reason, _ in found.failed} == {("human", "empty"), ("human", "loop")}
    assert len(found.failed) == 6
    assert len(found.sheet) == 12
    assert json.loads(json.dumps(as_json(found), allow_nan=False))["sources"][0]["reasons"] == {"empty": 3, "loop": 3}


def test_cosines_are_the_encoders(job, shards, cache, tmp_path):
    encoder = tiny_encoder(tmp_path, batch=5)
    source = wanted(shards, cache, pairs=20)
    found = score_of(job, source, encoder)
    assert (found.model, found.model_samples, found.bad_images) == ("tiny", 20, {})
    by_key = {shown.key: shown for shown in found.sheet}
    for key, shown in by_key.items():
        number = int(key)
        pixels = centre_square(make_sample(number)[1]["jpg"], encoder.size)[None]
        texts = [f"a picture of thing {number}", *(made.text for made in shown.texts.values())]
        with encoder.evaluating():
            image_1E, text_NE = encoder.images(pixels), encoder.texts([text or "x" for text in texts])
        expected_N, of_texts_N = (image_1E @ text_NE.T)[0], text_NE @ text_NE[0]
        assert shown.cosines.original == pytest.approx(float(expected_N[0]), abs=1e-5)
        for place, (name, made) in enumerate(shown.texts.items(), start=1):
            assert (name in shown.cosines.new) == bool(made.text)
            if made.text:
                assert shown.cosines.new[name] == pytest.approx(float(expected_N[place]), abs=1e-5)
                assert shown.cosines.texts[name] == pytest.approx(float(of_texts_N[place]), abs=1e-5)
    human, mscoco = (each.nearness for each in found.sources)
    fit = {row["key"] for row in rows(job) if row["source"] == "human" and row["reason"] is None}
    assert human.pairs == len(fit & set(drawn(source))) < 20, "unfit texts are no pairs"
    assert mscoco.pairs == 20
    # a tokenizer without case: a text in capitals is the same one
    assert mscoco.equal == pytest.approx(sum(int(shown) % 4 == 0 for shown in drawn(source)) / 20)
    for near in (human, mscoco):
        original_N, new_N = torch.tensor(near.cosines, dtype=torch.float64).T
        assert near.difference.value == pytest.approx(float((new_N - original_N).mean()))
        assert near.difference.low < near.difference.value < near.difference.high
        assert near.nearer.value == pytest.approx(float((new_N - original_N > 1e-6).double().mean()))
        assert near.original.mean == pytest.approx(float(original_N.mean()))


def drawn(source: Wanted) -> list[str]:
    """Keys of the samples whose cosines were measured: all drawn alike, so a sheet of as many has them."""
    again = reading.Drawn[str](source.pairs, source.seed)
    for shard, name in enumerate(source.manifest.names):
        for ordinal, key in enumerate(source.reader.keys(shard)):
            again.offer(f"{name}/{ordinal}", key)
    return again.items()


def test_equal_seeds_draw_alike_and_a_limit_reads_no_more(job, shards, cache):
    first, again, other = (score_of(job, wanted(shards, cache, seed=seed)) for seed in (1, 1, 2))
    sheets = [[shown.key for shown in each.sheet] for each in (first, again, other)]
    assert sheets[0] == sheets[1] != sheets[2]
    found = score_of(job, wanted(shards, cache, limit=10))
    assert (found.samples, found.original.rows, found.sampled) == (10, 10, 10)
    assert found.shards < 4
    assert score_of(job, wanted(shards, cache, limit=1000)).samples == NUM_SAMPLES


def test_memory_holds_a_sample(job, shards, cache, monkeypatch):
    monkeypatch.setattr(reading, "WORDS_OF", 7)
    found = score_of(job, wanted(shards, cache))
    assert found.sampled == 7
    assert found.original.rows == NUM_SAMPLES
    assert found.original.vocabulary == 4 + 7


def test_a_source_of_a_few_words_does_not_decide_for_the_others(shards, cache, tmp_path, monkeypatch):
    def make(number, key, caption):
        return by_rule(number, key, caption) | ({"rare": ("one", None)} if number == 0 else {})

    job = write_job(tmp_path / "out", f"{shards}/*.tar", make)
    few = score_of(job, wanted(shards, cache))
    assert (few.num_words, {each.distinct for each in (few.original, *few.sources)}) == (0, {()})
    monkeypatch.setattr(DISTINCT_OF, 100)
    found = score_of(job, wanted(shards, cache))
    human, mscoco, rare = found.sources
    assert found.num_words == min(each.words.mean * each.usable for each in (found.original, human, mscoco))
    assert len(found.original.distinct) == len(human.distinct) == len(mscoco.distinct) == 3
    assert (rare.distinct, rare.vocabulary) == ((), 1)


def test_faults_of_samples_are_counted(shards, cache, tmp_path):
    samples = [
        make_sample(9, jpg=b"no image"),
        make_sample(10, txt=b" "),
        make_sample(11, jpg=None),
        make_sample(12, txt=b"\xff"),
    ]
    write_tar(shards / "00001.tar", samples)
    job = write_job(tmp_path / "out", f"{shards}/*.tar", by_rule)
    found = score_of(job, wanted(shards, cache), tiny_encoder(tmp_path))
    assert found.original.reasons == {"empty_caption": 1, "undecodable_text": 1}
    assert found.original.usable == NUM_SAMPLES - 2
    assert found.bad_images == {"undecodable_image": 1, "no_image": 1}
    assert faults(found) == [
        "1 sample without an original at txt: empty_caption",
        "1 sample without an original at txt: undecodable_text",
        "1 image that cannot be used, of those encoded: undecodable_image",
        "1 image that cannot be used, of those encoded: no_image",
    ]
    assert "2 of 32 samples have no original that can be used: there the other texts get its draws." in found.advice.said
    human = found.sources[0]
    assert human.rows == NUM_SAMPLES
    fit = [int(row["key"]) for row in rows(job) if row["source"] == "human" and row["reason"] is None]
    assert human.nearness.pairs == len(set(fit) - {9, 10, 11, 12})
    # two samples without an original are no pairs; a fourth of the others has the words of its own
    assert found.sources[1].changed == 23 / 30
    assert found.sources[1].jaccard.p5 > 0


def test_what_a_model_made_is_scored_as_its_job_counted_it(llama, shards, tmp_path, cache):
    out = tmp_path / "out"
    write(rewriting(llama, max_tokens=24), shards, out)
    found = score_of(out, wanted(shards, cache))
    manifest = json.loads((out / "manifest.json").read_text())
    counted = {each.name: (each.rows, each.usable, dict(each.reasons)) for each in found.sources}
    assert counted == {name: (NUM_SAMPLES, each["fit"], each["reasons"]) for name, each in manifest["by_source"].items()}
    assert (found.samples, found.missing_shards, found.unknown_rows, found.bad_samples) == (NUM_SAMPLES, 0, 0, {})
    assert found.origin == Origin("rewrite", "tiny", True, str(out / "sidecar"), "txt")
    in_sidecar = score_of(out / "sidecar", wanted(shards, cache))
    assert [each.usable for each in in_sidecar.sources] == [each.usable for each in found.sources]


def test_a_job_that_goes_on_is_scored_as_far_as_it_is(shards, tmp_path, cache):
    job = write_job(tmp_path / "out", f"{shards}/*.tar", by_rule, complete=False, skip=(1, 3))
    (job / "texts" / ".00001.parquet.77").write_bytes(b"cut short")
    found = score_of(job, wanted(shards, cache))
    assert (found.shards, found.missing_shards, found.samples) == (2, 2, 21)
    assert found.origin == Origin("rewrite", "a rule of the tests", False, str(job / "sidecar"), "txt")
    assert faults(found) == ["2 of 4 shards have no texts: the job is not complete"]


def test_rows_of_unknown_keys_and_samples_without_rows_are_counted(job, shards, cache):
    file = job / "texts" / "00000.parquet"
    kept = [tuple(row.values())[:4] for row in pq.read_table(file).to_pylist() if row["key"] != f"{2:09d}"]
    replace_texts(file, [*kept, ("strange", "human", "a text", None), ("strange", "mscoco", "a text", None)])
    found = score_of(job, wanted(shards, cache))
    assert found.unknown_rows == 2
    assert faults(found) == ["2 rows with a key that no sample has"]
    assert [(each.rows, each.missing) for each in found.sources] == [(NUM_SAMPLES - 1, 1)] * 2


def test_a_key_need_not_be_utf8(shards, tmp_path, cache):
    key = "image-\udcff"  # as a tar's names are read
    write_tar(shards / "00000.tar", [(key, make_sample(0)[1])])
    found = score_of(write_job(tmp_path / "out", f"{shards}/*.tar", by_rule), wanted(shards, cache))
    assert (found.unknown_rows, [each.missing for each in found.sources]) == (0, [0, 0])
    assert set(next(shown.texts for shown in found.sheet if shown.key == key)) == {"human", "mscoco"}


def test_recaptions_are_one_source(shards, tmp_path, cache):
    make = lambda number, key, caption: {"recaption": ("", "bad_image") if number == 5 else (f"There is {caption}.", None)}  # noqa: E731
    job = write_job(tmp_path / "out", f"{shards}/*.tar", make, task="recaption")
    found = score_of(job, wanted(shards, cache))
    assert found.advice.weights == pytest.approx({"original": 0.8, "recaption": 0.2})
    assert found.advice.effective["recaption"] == pytest.approx(0.2 * 31 / 32)


def test_mds_has_the_figures_of_the_tars_that_it_was_made_of(job, shards, cache, tmp_path):
    list(to_mds(sorted(map(str, shards.glob("*.tar"))), tmp_path / "mds", cache, workers=1))
    other = write_job(tmp_path / "of-mds", f"{tmp_path}/mds/index.json", by_rule)
    manifest, reader = open_shards("--data", [f"{tmp_path}/mds/index.json"], None, cache)
    found = score_of(other, wanted(shards, cache)._replace(manifest=manifest, reader=reader))
    expected = score_of(job, wanted(shards, cache))
    for ours, theirs in zip((found.original, *found.sources), (expected.original, *expected.sources), strict=True):
        # which texts come first, by the shard's name, decides where distinct-n stops
        assert ours._replace(distinct=()) == theirs._replace(distinct=())


def test_originals_may_lie_in_a_field(job, shards, cache):
    found = score_of(job, wanted(shards, cache, against="json:captions.name"))
    assert found.original.words.median == 2
    with pytest.raises(ConfigError, match="--against-text='json:'"):
        score_of(job, wanted(shards, cache, against="json:"))


def test_a_name_that_no_sample_has_is_an_error_that_tells_those_there_are(job, shards, cache, tmp_path, monkeypatch):
    said = r"--against-text=nope: none of the 32 samples read has such a text \(empty_caption: 32\), their texts are txt, "
    with pytest.raises(ConfigError, match=rf"{said}json:captions.name, json:concept: name the one"):
        score_of(job, wanted(shards, cache, against="nope"))
    encoder = tiny_encoder(tmp_path)
    said = "--image=gif, bmp: none of the 32 samples read has an image of such a name, they have jpg, txt, json: name it"
    with pytest.raises(ConfigError, match=said):
        score_of(job, wanted(shards, cache, image_members=("gif", "bmp")), encoder)
    assert score_of(job, wanted(shards, cache, image_members=("gif",))).samples == NUM_SAMPLES, "no model looks at images"
    with pytest.raises(
        ConfigError, match=r"--image=txt: none of the 26 samples .* can be used \(undecodable_image: 26\): name"
    ):
        score_of(rewritten(job, "human"), wanted(shards, cache, image_members=("txt",)), encoder)
    monkeypatch.setattr(reading, "WORDS_OF", 5)
    with pytest.raises(ConfigError, match="none of the 9 samples"):
        score_of(job, wanted(shards, cache, against="nope"))


def rewritten(job: Path, source: str) -> Path:
    """A job whose files have the texts of one source alone."""
    for path in (job / "texts").iterdir():
        some = [row for row in pq.read_table(path).to_pylist() if row["source"] == source]
        replace_texts(path, [tuple(row[name] for name in ("key", "source", "text", "reason")) for row in some])
    return job


def test_recaptions_may_be_of_images_without_captions(shards, cache, tmp_path):
    write_tar(shards / "00000.tar", [make_sample(number, txt=None) for number in range(9)])
    job = write_job(
        tmp_path / "out", f"{shards}/*.tar", lambda *_: {"recaption": ("There is a thing.", None)}, task="recaption"
    )
    source = wanted(shards, cache)
    source = source._replace(manifest=replace(source.manifest, **first_of(source.manifest)), needs_original=False)
    found = score_of(job, source)
    assert faults(found) == ["9 samples without an original at txt: empty_caption"]
    assert found.advice.effective == {"original": 0, "recaption": 1}
    with pytest.raises(ConfigError, match="--against-text=txt"):
        score_of(job, source._replace(needs_original=True))


def first_of(manifest: Manifest) -> dict:
    """The first shard of a manifest."""
    return {"shards": manifest.shards[:1], "names": manifest.names[:1], "counts": manifest.counts[:1]}


def test_a_jobs_sidecar_has_its_jobs_task(shards, cache, tmp_path):
    job = write_job(tmp_path / "out", f"{shards}/*.tar", by_rule, task="recaption")
    found = score_of(job / "sidecar", wanted(shards, cache))
    assert found.origin == Origin("recaption", "a rule of the tests", True, str(job / "sidecar"), "txt")
    assert not any("Nothing says what task" in sentence for sentence in found.advice.said)
    assert [job_of(job / name) for name in ("sidecar", "texts", "partial")] == [job, job, None]
    other = (job / "sidecar").rename(tmp_path / "sidecar")
    assert score_of(other, wanted(shards, cache)).origin == Origin(sidecar=str(other))


def test_a_sidecar_is_scored(job, shards, cache):
    found = score_of(job / "sidecar", wanted(shards, cache))
    assert [(each.name, each.rows, each.usable, each.missing) for each in found.sources] == [
        ("human", 26, 26, 6),
        ("mscoco", 32, 32, 0),
    ]
    assert found.origin.sidecar == str(job / "sidecar")
    (job / "sidecar" / "00002.tar.arrow").write_bytes(b"cut")
    assert score_of(job / "sidecar", wanted(shards, cache)).bad_samples == {"bad_sidecar": 12}


def test_tables_are_joined(shards, cache, tmp_path):
    numbers = [*range(30, -1, -1), 99]
    table = {"uid": [f"{n:09d}" for n in numbers], "new": [f"thing {n} anew" for n in numbers], "other": ["x"] * len(numbers)}
    pq.write_table(pa.table(table), tmp_path / "release-0.parquet")
    source, scratch = wanted(shards, cache), tmp_path / "scratch"
    made = join_tables(
        source.manifest, source.reader, f"{tmp_path}/release-*.parquet", ["new"], scratch, key_column="uid", sample_key="key"
    )
    found = score(made, source, None, "", lambda *_: None)
    [new] = found.sources
    assert (new.name, new.rows, new.missing, new.changed, found.unknown_rows) == ("new", 31, 1, 1, 1)
    assert faults(found) == ["1 row with a key that no sample has"]
    with pytest.raises(ConfigError, match=r"none of its 32 rows names a sample .* --table-key=new"):
        join_tables(
            source.manifest,
            source.reader,
            f"{tmp_path}/release-0.parquet",
            ["other"],
            scratch,
            key_column="new",
            sample_key="key",
        )


def test_keys_that_do_not_name_one_row_and_one_sample_are_counted(shards, cache, tmp_path):
    keys = [f"{number:09d}" for number in (*range(32), 5, 5, 6)]
    pq.write_table(pa.table({"key": keys, "new": [f"text {row}" for row in range(35)]}), tmp_path / "release.parquet")

    def joined() -> Score:
        source = wanted(shards, cache)
        made = join_tables(
            source.manifest, source.reader, str(tmp_path / "release.parquet"), ["new"], tmp_path / "scratch",
            key_column="key", sample_key="key",
        )  # fmt: skip
        return score(made, source, None, "", lambda *_: None)

    found = joined()
    assert faults(found) == ["3 rows with a key seen before, left out: the first row of a key counts"]
    assert next(shown.texts["new"].text for shown in found.sheet if shown.key == f"{6:09d}") == "text 6"
    table = pq.read_table(tmp_path / "release.parquet").slice(0, 32)
    pq.write_table(table, tmp_path / "release.parquet")
    write_tar(shards / "00001.tar", [make_sample(0), make_sample(10), make_sample(11), make_sample(12)])
    [fault, *_] = [fault for fault in faults(joined()) if "and its text" in fault]
    assert fault.startswith("1 sample with the key of another")


def test_files_of_a_job_are_no_tables(job, tmp_path):
    for tables in (f"{job}/texts/*.parquet", f"{job}/texts/00000.parquet"):
        with pytest.raises(ConfigError, match=rf"files of a captions job.*OUT={job}, without --text"):
            refuse_job(tables)
    (job / "texts" / "00000.parquet").rename(tmp_path / "release.parquet")
    refuse_job(str(tmp_path / "release.parquet"))


def test_texts_of_another_data_set_with_the_same_names_and_keys_are_refused(job, shards, cache, tmp_path):
    """img2dataset calls every data set's first shard 00000.tar, and its first sample 000000000."""
    other = shards.rename(tmp_path / "other")
    assert score_of(job, wanted(other, cache)).samples == NUM_SAMPLES, "it may have moved"
    (other / "00000_stats.json").write_text('{"successes": 8}')
    refusal = r"00000.parquet has texts of another shard .* made of .*shards/00000.tar, --data now has .*other/00000.tar"
    with pytest.raises(ConfigError, match=rf"{refusal} \(samples: 9 there, 8 now\)"):
        score_of(job, wanted(other, cache))
    write_tar(other / "00000.tar", [make_sample(number, txt=b"another " * 2000) for number in range(9)])
    with pytest.raises(ConfigError, match=rf"{refusal} \(num_bytes: [\d,]+ there, [\d,]+ now\)"):
        score_of(job, wanted(other, cache))


def test_what_cannot_be_scored_is_said(job, shards, cache, tmp_path):
    source = wanted(shards, cache)
    for folder, said in (
        (tmp_path / "nothing", "is no folder"),
        (shards, "holds neither texts"),
    ):
        with pytest.raises(ConfigError, match=said):
            open_made_texts(folder, source.manifest)
    with pytest.raises(ConfigError, match=r"has no texts of these shards: other-00000.parquet .*00000.parquet"):
        open_made_texts(job, replace(source.manifest, names=[f"other-{name}" for name in source.manifest.names]))
    for path in (job / "texts").iterdir():
        replace_texts(path, [("strange", "human", "a text", None)])
    with pytest.raises(
        ConfigError, match=r"none of the texts .* 4 rows have other keys than the 32 samples read .*'000000000'"
    ):
        score_of(job, source)
    (job / "texts" / "00002.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(RunError, match=r"00002.parquet cannot be read.*delete it"):
        score_of(job, source)
    replace_texts(job / "texts" / "00000.parquet", [(f"{0:09d}", "original", "a text", None)])
    (job / "texts" / "00002.parquet").unlink()
    (job / "texts" / "00003.parquet").write_bytes(b"PAR1 but no more")  # which is not read any more
    with pytest.raises(ConfigError, match="a source is called 'original'"):
        score_of(job, source)
    pq.write_table(pa.table({"key": ["a"], "text": ["b"]}), job / "texts" / "00000.parquet")
    with pytest.raises(ConfigError, match=r"00000.parquet has no column 'reason'"):
        score_of(job, source)
    (job / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"manifest.json cannot be read"):
        score_of(job, source)
