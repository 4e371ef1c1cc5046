"""Advice on mixing follows its rule."""

import contextlib
from collections import Counter

import numpy as np
import pytest

from scaleclip.captioning.advice import FEWEST_WORDS, RULES, Available, Judged, advise
from scaleclip.captioning.nearness import Mean, Nearness
from scaleclip.captioning.words import Spread
from scaleclip.config import ViewConfig
from scaleclip.data.captions import CaptionPolicy
from scaleclip.data.sample import SampleError

GOOD = Judged(0.9, 0.8, None)


def judged(low: float, high: float) -> Judged:
    """By a model that finds this share of texts nearer."""
    some = Spread(0, 0, 0, 0)
    return Judged(0.9, 0.8, Nearness(9, some, some, Mean(0, 0, 0), Mean((low + high) / 2, low, high), 0, some, ()))


@pytest.mark.parametrize(
    ("task", "sources", "weights"),
    [
        ("rewrite", {}, {"original": 1}),
        ("rewrite", {"a": GOOD, "b": GOOD, "c": GOOD}, dict.fromkeys(("original", "a", "b", "c"), 1 / 4)),
        ("rewrite", {"a": GOOD, "b": Judged(0.49, 0.8, None)}, {"original": 1 / 2, "a": 1 / 2}),
        ("rewrite", {"a": GOOD, "b": Judged(0.9, 0.09, None)}, {"original": 1 / 2, "a": 1 / 2}),
        ("rewrite", {"a": Judged(0.5, 0.1, None), "b": Judged(0.5, None, None)}, dict.fromkeys(("original", "a", "b"), 1 / 3)),
        ("rewrite", {"a": judged(0.1, 0.24), "b": judged(0.2, 0.26)}, {"original": 1 / 2, "b": 1 / 2}),
        ("recaption", {"a": GOOD}, {"original": 0.8, "a": 0.2}),
        ("recaption", {"a": judged(0.4, 0.6)}, {"original": 0.8, "a": 0.2}),
        ("recaption", {"a": judged(0.51, 0.6)}, {"original": 0.6, "a": 0.4}),
        ("recaption", {"a": judged(0.1, 0.2)}, {"original": 1}),
        ("recaption", {"a": GOOD, "b": GOOD}, {"original": 0.8, "a": 0.1, "b": 0.1}),
        ("", {"a": GOOD}, {"original": 1 / 2, "a": 1 / 2}),
    ],
)
def test_weights(task, sources, weights):
    found = advise(task, sources, "original", {})
    assert found.weights == pytest.approx(weights)
    assert [sentence.partition(":")[0] for sentence in found.said[: len(sources)]] == list(sources)
    assert any("No model" in sentence for sentence in found.said) == (not any(each.nearness for each in sources.values()))
    assert any("Nothing says" in sentence for sentence in found.said) == (not task)


def test_shares_are_those_that_training_draws():
    every, long, short = "original text here", "a long text", "word"
    texts = [
        ({"original": every, "a": long, "b": long}, 50),
        ({"original": every, "a": long}, 20),
        ({"original": short, "a": long, "b": short}, 10),
        ({"b": long}, 10),
        ({"a": short}, 5),
        ({}, 5),
    ]
    samples = {
        Available(frozenset(each), frozenset(name for name, text in each.items() if text == short)): count
        for each, count in texts
    }
    found = advise("rewrite", {"a": GOOD, "b": GOOD}, "original", samples)
    view = ViewConfig(texts=found.weights, min_words=FEWEST_WORDS, fallback="original")
    policy, random, drawn = CaptionPolicy(view), np.random.default_rng(0), Counter()
    for each, count in texts:
        for _ in range(100 * count):
            with contextlib.suppress(SampleError):
                drawn[policy.choose(each, random).name] += 1
    # binomial of 10,000: five standard deviations at most
    assert {name: drawn[name] / 10_000 for name in found.effective} == pytest.approx(found.effective, abs=0.025)
    assert sum(found.effective.values()) == pytest.approx(0.9)


def test_texts_that_share_no_words_are_taken_with_a_remark():
    remark = "half of its texts have less than 5 % of the words in common with their originals"
    for judgement, is_remarked in (
        (GOOD._replace(common=0.0), True),
        (GOOD._replace(common=0.05), False),
        (GOOD, False),
        (judged(0.4, 0.6)._replace(common=0.0), True),
        (judged(0.51, 0.6)._replace(common=0.0), False),
    ):
        [said, *_] = advise("rewrite", {"a": judgement}, "original", {}, had_model=bool(judgement.nearness)).said
        assert said.startswith("a: taken")
        assert (remark in said) == is_remarked
        assert ("or give --model" in said) == (is_remarked and not judgement.nearness)


def test_a_model_that_had_nothing_to_compare_is_not_asked_for():
    said = advise("rewrite", {"a": Judged(0.0, None, None)}, "original", {}, had_model=True).said
    assert "The model compared nothing" in said[-1]
    assert not any("Give --model" in sentence for sentence in said)


def test_the_rules_say_the_limits():
    assert all(
        any(limit in rule for rule in RULES) for limit in ("50 %", "10 %", "25 %", "5 %", "0.2", "0.4", "p = 0.8", "p = 0.6")
    )
