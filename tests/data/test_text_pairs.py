"""Rows of JSON lines and Parquet, and batches of text pairs and triplets."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from streaming import MDSWriter

from scaleclip.config import TextSourceConfig
from scaleclip.data.rows import RowReader
from scaleclip.data.sample import Sample, SampleError
from scaleclip.data.text_pairs import TextPairs
from scaleclip.data.tokenizer import load_tokenizer
from scaleclip.errors import ConfigError

TOKENIZER = load_tokenizer("demo", 16)
CYCLE = 1024


def row(name, number, **changes):
    negatives = [f"{name} wrong {number} {k}" for k in range(4)]
    return {"query": f"{name} what {number}", "positive": f"{name} that {number}", "negatives": negatives} | changes


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """40 rows of JSON lines in two files, 60 rows of Parquet."""
    for number in range(2):
        write_jsonl(tmp_path / f"nli-{number}.jsonl", [row("nli", 20 * number + i) for i in range(20)])
    pq.write_table(pa.Table.from_pylist([row("msmarco", i) for i in range(60)]), tmp_path / "msmarco.parquet", row_group_size=7)
    return tmp_path


def sources(files, **options):
    return {
        "nli": TextSourceConfig(files=(f"{files}/nli-{{0,1}}.jsonl",), negatives=("negatives",), **options),
        "msmarco": TextSourceConfig(files=(f"{files}/msmarco.parquet",), negatives=("negatives",), **options),
    }


def open_pairs(given, cache, *, num_negatives=0, seed=0):
    return TextPairs(
        given, cache, TOKENIZER, seed=seed, global_batch=8, canonical_streams=2, shuffle_shards=4, num_negatives=num_negatives
    )  # fmt: skip


def whole(pairs, number):
    return pairs.read(number, 0, 8)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_rows_are_read_in_any_order(tmp_path, cache, suffix):
    rows = [{"a": f"text {i}", "b": i, "c": [f"x{i}", "y"], "d": None if i % 2 else "ü"} for i in range(50)]
    path = tmp_path / f"part{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=9)
    else:
        import gzip

        text = "".join(json.dumps(each) + "\n" for each in rows).encode()
        path.write_bytes(gzip.compress(text) if suffix.endswith(".gz") else text)
    read = RowReader([str(path)], cache)
    assert read.counts("files").tolist() == [50]
    assert read(0, 49) == Sample("part/49", {"a": b"text 49", "b": b"49", "c": b'["x49", "y"]'})
    assert read(0, 4).members["d"] == "ü".encode()
    with pytest.raises(SampleError, match=r"missing_sample.*holds 50 rows, row 50 was asked for"):
        read(0, 50)


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", b'{"a": 1}\n{"a": '), ("a.parquet", b"PAR1nothing")])
def test_a_damaged_table_is_named(tmp_path, cache, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"files: corrupt_shard: .*{name}"):
        RowReader([str(tmp_path / name)], cache).counts("files")


def test_a_batch_comes_from_one_source_and_every_row_once_an_epoch(files, cache):
    pairs = open_pairs(sources(files), cache)
    seen = {"nli": Counter(), "msmarco": Counter()}
    for number in range(25):  # two and a half epochs: 100 rows in batches of 8
        batch = whole(pairs, number)
        assert batch.valid_B.all()
        assert not batch.faults
        seen[batch.source].update(batch.keys)
        for slot, key in enumerate(batch.keys):
            part, ordinal = key.split("/")
            name = int(ordinal) + (20 if part == "nli-1" else 0)
            query_BT, positive_BT = batch.texts_BT
            assert torch.equal(query_BT[slot], TOKENIZER([f"{batch.source} what {name}"])[0])
            assert torch.equal(positive_BT[slot], TOKENIZER([f"{batch.source} that {name}"])[0])
    for counts in seen.values():
        assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize(("weights", "shares"), [((None, None), (0.4, 0.6)), ((3.0, 1.0), (0.75, 0.25))])
def test_sources_take_turns_by_weight(files, cache, weights, shares):
    given = {
        name: config.model_copy(update={"weight": weight})
        for (name, config), weight in zip(sources(files).items(), weights, strict=True)
    }
    pairs = open_pairs(given, cache)
    turns = [pairs.turn(batch) for batch in range(2 * CYCLE)]
    counts = Counter(source for source, _ in turns)
    assert [counts[0] / len(turns), counts[1] / len(turns)] == pytest.approx(shares, abs=1 / CYCLE)
    for number in range(2):
        assert [turn for source, turn in turns if source == number] == list(range(counts[number])), "none is left out"
    assert turns[:CYCLE] != [(source, turn - counts[source] // 2) for source, turn in turns[CYCLE:]], "cycles differ"


def test_slots_share_a_batch_and_a_later_start_changes_nothing(files, cache):
    at_once = open_pairs(sources(files), cache, num_negatives=3)
    for batch in (0, 7, 1000):
        pairs = open_pairs(sources(files), cache, num_negatives=3)
        parts = [pairs.read(batch, first, first + 3) for first in (0, 3, 6)]
        expected = whole(at_once, batch)
        assert {part.source for part in parts} == {expected.source}
        assert sum((part.keys for part in parts), ())[:8] == expected.keys
        assert not parts[-1].valid_B[2], "a slot past the end"
        assert len(expected.texts_BT) == 5
        for pieces, texts_BT in zip(zip(*(part.texts_BT for part in parts), strict=True), expected.texts_BT, strict=True):
            assert torch.equal(torch.cat(pieces)[:8], texts_BT)


def test_negatives_are_drawn_anew_in_every_epoch(files, cache):
    pairs = open_pairs(sources(files), cache, num_negatives=2)
    drawn = {}
    for number in range(60):
        batch = whole(pairs, number)
        for slot, key in enumerate(batch.keys):
            texts = {tuple(negative_BT[slot].tolist()) for negative_BT in batch.texts_BT[2:]}
            assert len(texts) == 2
            drawn.setdefault((batch.source, key), []).append(texts)
    assert np.mean([each[0] != each[1] for each in drawn.values() if len(each) > 1]) > 0.5


def test_rows_that_cannot_be_used_are_invalid_in_their_place(tmp_path, cache):
    bad = [row("x", 1, query=" "), row("x", 2, positive=None), row("x", 3, negatives=["one"])]
    write_jsonl(tmp_path / "x.jsonl", [row("x", 0), *bad, *(row("x", i) for i in range(4, 8))])
    given = {"x": TextSourceConfig(files=(f"{tmp_path}/x.jsonl",), negatives=("negatives",))}
    batch = whole(open_pairs(given, cache, num_negatives=2), 0)
    assert {(fault.sample, fault.cause) for fault in batch.faults} == {
        (1, "empty_caption"),
        (2, "no_text"),
        (3, "few_negatives"),
    }
    assert batch.valid_B.sum() == 5
    assert sorted(key for key in batch.keys if key) == [f"x/{i}" for i in (0, 4, 5, 6, 7)]


def test_pairs_of_mds(tmp_path, cache):
    with MDSWriter(out=str(tmp_path / "mds"), columns={"__key__": "str", "query": "str", "positive": "str"}) as writer:
        for i in range(16):
            writer.write({"__key__": str(i), "query": f"q {i}", "positive": f"p {i}"})
    batch = whole(open_pairs({"m": TextSourceConfig(files=(f"{tmp_path}/mds/index.json",))}, cache), 0)
    for slot, key in enumerate(batch.keys):
        assert torch.equal(batch.texts_BT[0][slot], TOKENIZER([f"q {key}"])[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": {"files": "{files}/none.jsonl"}}, r"data\.text_pairs\.sources\.x\.files: no shards match"),
        ({"x": {"files": "{files}/*.*"}}, r"data\.text_pairs\.sources\.x\.files mixes tables of rows"),
        ({"x": {"files": "{files}/msmarco.parquet"}}, r"text_pairs\.sources\.x\.negatives is empty, and 2 negatives a row"),
    ],
)
def test_wrong_sources_are_named(files, cache, given, message):
    (files / "a.tar").touch()
    given = {name: TextSourceConfig(files=(fields["files"].format(files=files),)) for name, fields in given.items()}
    with pytest.raises(ConfigError, match=message):
        open_pairs(given, cache, num_negatives=2)


def test_a_source_that_never_has_a_turn_is_refused(files, cache):
    given = sources(files)
    weights = {"nli": 1e-6, "msmarco": 1.0}
    given = {name: config.model_copy(update={"weight": weights[name]}) for name, config in given.items()}
    with pytest.raises(ConfigError, match=r"text source nli gets none of 1024 text batches"):
        open_pairs(given, cache)
