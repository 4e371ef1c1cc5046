"""Examples of rewriting: shipped, a user's, and what is no example."""

import itertools

import pytest

from scaleclip.captioning.examples import NUM_SHOWN, SHIPPED, Pair, load_sources, one_line
from scaleclip.captioning.filters import Limits, fault
from scaleclip.captioning.prompt import LABELS, TASK
from scaleclip.errors import ConfigError


def test_the_shipped_ones_are_fit_for_training_and_differ():
    sources = load_sources(SHIPPED)
    assert [source.name for source in sources] == sorted(SHIPPED)
    texts = [text for source in sources for pair in source.pairs for text in pair]
    assert len(set(texts)) == len(texts)
    for source in sources:
        assert len(source.pairs) >= 12
        for pair in source.pairs:
            assert (
                fault(pair.output, pair.input, task=TASK, labels=LABELS, examples=lambda _: False, ended=True, limits=Limits())
                is None
            )


def test_a_draw_is_by_seed_and_of_different_examples():
    (source,) = load_sources(["human"])
    assert source.draw(1) == source.draw(1)
    drawn = {tuple(source.draw(seed)) for seed in range(20)}
    assert len(drawn) > 15
    assert all(len(set(three)) == NUM_SHOWN for three in drawn)


def test_files_of_ones_own(tmp_path):
    (tmp_path / "a.yaml").write_text("- {input: 'a  b', output: A}\n- {input: c, output: C}\n- {input: d, output: D}\n")
    (tmp_path / "b.jsonl").write_text(
        '{"input": "a b", "output": "A"}\n\n{"input": "c", "output": "C"}\n{"input": "d", "output": "D"}\n'
    )
    mine, other = load_sources([f"mine={tmp_path}/a.yaml", f"other={tmp_path}/b.jsonl"])
    assert mine.name == "mine"
    assert mine.pairs == other.pairs == (Pair("a b", "A"), Pair("c", "C"), Pair("d", "D"))
    assert mine.digest == other.digest


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.txt", "", "files"),
        ("a.yaml", "a: [", "is not yaml"),
        ("a.yaml", "a: b", "holds no list"),
        ("a.yaml", "- a", "example 1 is a str: it needs input and output"),
        ("a.yaml", "- {input: a, outptu: b}", "example 1 has input, outptu"),
        ("a.yaml", "- {input: a, output: 3}", "output=3 is no text"),
        ("a.yaml", "- {input: ' ', output: b}", "input=' ' is no text"),
        ("a.yaml", "- {input: a, output: b}\n" * 3, "has 1 different pairs, a prompt shows 3"),
        ("a.jsonl", '{"input": "a", "output": "b"}\n{"input"', "line 2"),
    ],
)
def test_what_is_no_example_is_said(tmp_path, name, content, named):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=named):
        load_sources([f"mine={tmp_path}/{name}"])


@pytest.mark.parametrize(
    ("sources", "named"),
    [
        (["humna"], "shipped are chatgpt, bard, mscoco, human"),
        (["human", "human"], "twice"),
        (["a.b=x.yaml"], "cannot be a column's name"),
        (["recaption=x.yaml"], "cannot be a column's name"),
        (["original=x.yaml"], "cannot be a column's name"),
        (["caption=x.yaml"], "cannot be a column's name"),
        (["mine=missing.yaml"], "cannot be read: No such file"),
    ],
)
def test_unfit_names_are_refused(sources, named):
    with pytest.raises(ConfigError, match=named):
        load_sources(sources)


def test_a_line_has_no_line_ends():
    ends = ("\n", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\0", "\t", "\u00a0", "\x1b")
    for first, second in itertools.product(ends, ends):
        line = one_line(f" a{first}{second}b ")
        assert line == "a b"
        assert len(line.splitlines()) == 1
    # what joins letters of some scripts stays
    assert one_line("\u0915\u094d\u200d\u0937") == "\u0915\u094d\u200d\u0937"
