"""Where the texts of a sample lie."""

import json

import pyarrow as pa
import pytest

from scaleclip.config import SourceConfig
from scaleclip.data import texts
from scaleclip.data.sample import Sample, SampleError
from scaleclip.data.sidecar import write_rows
from scaleclip.data.texts import MAX_CHARACTERS, TextFinder
from scaleclip.errors import ConfigError

FIELDS = {
    "caption": "from json",
    "captions": {"name": "grinning face", "empty": None},
    "rewrites": ["one", "two"],
    "year": 1984,
    "nan": float("nan"),
    "half": "a \ud800 b \u00e9",
    "object": {"a": 1},
}


def find(locations, members, **config):
    return TextFinder("mine", SourceConfig(texts=locations, **config), ["0.tar"])(Sample("key", members), 0, 0)


def concept(location, members):
    return TextFinder("mine", SourceConfig(concept=location), []).concept(Sample("key", members))


def sample_json(fields=FIELDS):
    return {"json": json.dumps(fields).encode()}


def test_a_member_is_a_text():
    members = {"txt": "caf\u00e9".encode(), "alt.txt": b"other", "jpg": b"\xff"}
    assert find({"caption": "txt", "alt": "alt.txt", "none": "md"}, members) == {"caption": "caf\u00e9", "alt": "other"}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("caption", "from json"),
        ("captions.name", "grinning face"),
        ("captions.empty", None),
        ("captions.empty.deeper", None),
        ("captions.other", None),
        ("rewrites.1", "two"),
        ("rewrites.2", None),
        ("year", "1984"),
        ("nan", None),
        ("half", "a ? b \u00e9"),
    ],
)
def test_a_path_leads_to_a_text_in_json(path, expected):
    assert find({"caption": f"json:{path}"}, sample_json()) == ({} if expected is None else {"caption": expected})


@pytest.mark.parametrize("path", ["object", "rewrites", "rewrites.name", "caption.name", "year.0"])
def test_a_path_to_no_text_is_a_fault(path):
    with pytest.raises(SampleError, match="bad_json"):
        find({"caption": f"json:{path}"}, sample_json())


@pytest.mark.parametrize("member", [b"", b"{", b"[1]", b'"text"', b"\xff\xfe\xff", b"[" * 100_000])
def test_broken_json_is_a_fault_only_where_it_is_needed(member):
    with pytest.raises(SampleError, match="bad_json"):
        find({"caption": "txt", "name": "json:name"}, {"txt": b"a", "json": member})
    assert find({"caption": "txt"}, {"txt": b"a", "json": member}) == {"caption": "a"}


def test_a_sample_without_json_lacks_its_texts():
    assert find({"caption": "txt", "name": "json:name"}, {"txt": b"a"}) == {"caption": "a"}


def test_json_is_parsed_once_a_sample(monkeypatch):
    parsed = []
    monkeypatch.setattr(texts.json, "loads", lambda data: parsed.append(data) or {"a": "A", "b": "B", "c": "C"})
    finder = TextFinder("mine", SourceConfig(texts={"a": "json:a", "b": "json:b"}, concept="json:c"), [])
    for number in range(3):
        sample = Sample("key", {"json": b'{"number": %d}' % number})
        assert finder(sample, 0, number) == {"a": "A", "b": "B"}
        assert finder.concept(sample) == "C"
    assert len(parsed) == 3


def test_a_text_that_is_not_utf8_is_a_fault():
    with pytest.raises(SampleError, match="undecodable_text: txt of key is not UTF-8") as caught:
        find({"caption": "txt"}, {"txt": b"caf\xe9"})
    assert caught.value.cause == "undecodable_text"
    assert find({"name": "json:caption"}, {"txt": b"caf\xe9", **sample_json()}) == {"name": "from json"}


def test_an_overlong_text_is_cut():
    long = b" " * 50_000 + "\u00e9".encode() * 100_000
    assert find({"caption": "txt"}, {"txt": long}) == {"caption": "\u00e9" * MAX_CHARACTERS}
    assert find({"caption": "json:c"}, sample_json({"c": "x" * 30_000})) == {"caption": "x" * MAX_CHARACTERS}
    assert find({"caption": "txt"}, {"txt": b"x" * MAX_CHARACTERS}) == {"caption": "x" * MAX_CHARACTERS}


@pytest.mark.parametrize(
    ("location", "expected"),
    [("json:year", "1984"), ("json:caption", "from json"), ("json:other", None), ("cls", "7"), ("txt", None), (None, None)],
)
def test_a_concept_is_a_string_or_nothing(location, expected):
    assert concept(location, {"cls": b"7", "txt": b" \n", **sample_json()}) == expected


def test_a_column_of_a_sidecar_is_a_text(tmp_path):
    rows = pa.record_batch({"re": pa.array(["long \u00e9", None]), "n": ["a", "b"]})
    write_rows(tmp_path / "0.tar.arrow", ["a", "b"], rows)
    finder = TextFinder(
        "mine", SourceConfig(texts={"recap": "more:re", "caption": "txt"}, sidecars={"more": str(tmp_path)}), ["0.tar"]
    )
    assert finder(Sample("a", {"txt": b"t"}), 0, 0) == {"recap": "long \u00e9", "caption": "t"}
    assert finder(Sample("b", {"txt": b"t"}), 0, 1) == {"caption": "t"}
    with pytest.raises(SampleError, match="short_sidecar"):
        finder(Sample("c", {"txt": b"t"}), 0, 2)
    with pytest.raises(SampleError, match="wrong_sidecar"):
        finder(Sample("of another set", {"txt": b"t"}), 0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": {"a": ""}}, "data.sources.mine.texts.a='' names no text: write txt, json:field"),
        ({"texts": {"a": ":b"}}, "texts.a=':b' names no text"),
        ({"texts": {"a": "json:"}}, "texts.a='json:' names no text"),
        ({"texts": {"a": "json:b..c"}}, "texts.a='json:b..c' names no text"),
        (
            {"texts": {"a": "recap:b"}},
            "texts.a=recap:b: there is no sidecar 'recap', those of the source are more: name its folder",
        ),
        ({"texts": {"a": "recap:b"}, "sidecars": {}}, "there is no sidecar 'recap', the source has none"),
        ({"texts": {"a": "more:b"}}, "texts.a=more:b: the sidecar has no column 'b', only re"),
        ({"concept": "more:re"}, "concept=more:re: a concept lies in a member or in the JSON"),
        ({"concept": "json:"}, "data.sources.mine.concept='json:' names no text"),
        ({"sidecars": {"json": "x"}}, "data.sources.mine.sidecars.json: json: stands for"),
        ({"sidecars": {"more": "/nowhere"}}, "data.sources.mine.sidecars.more=/nowhere: there is no such folder"),
    ],
)
def test_faults_of_the_user_are_named_at_the_start(tmp_path, change, message):
    write_rows(tmp_path / "0.tar.arrow", ["key"], pa.record_batch({"re": ["a"]}))
    with pytest.raises(ConfigError) as caught:
        TextFinder("mine", SourceConfig(**({"sidecars": {"more": str(tmp_path)}} | change)), ["0.tar"])
    assert message in str(caught.value)
