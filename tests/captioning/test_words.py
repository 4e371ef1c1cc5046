"""Words, and what is counted of them."""

from collections import Counter

import numpy as np
import pytest

from scaleclip.captioning.drawing import Drawn
from scaleclip.captioning.words import distinct, jaccard, spread, vocabulary, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A cat, a DOG.", ["a", "cat", "a", "dog"]),
        ("  \n\t", []),
        ("... - !", []),
        ("It's 3.5 mm (e.g. U.S.A.)", ["it's", "3.5", "mm", "e.g", "u.s.a"]),
        ("\u201cquoted\u201d \u2014 twice\u2026", ["quoted", "twice"]),
        ("\u732b\u3068\u72ac\u3002 cat", ["\u732b", "\u3068", "\u72ac", "cat"]),
        # vowel signs are no letters to Python's \w
        ("\u092f\u0939 \u092c\u093f\u0932\u094d\u0932\u0940\u0964", ["\u092f\u0939", "\u092c\u093f\u0932\u094d\u0932\u0940"]),
        ("STRASSE stra\u00dfe", ["strasse", "strasse"]),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


def test_words_in_common():
    assert jaccard(["a", "b", "c"], ["b", "c", "d"]) == 0.5
    assert jaccard(["a", "a", "a"], ["a"]) == 1
    assert jaccard(["a"], []) == 0
    assert jaccard([], []) == 1


def test_a_spread_is_that_of_the_values():
    values = np.random.default_rng(0).integers(0, 30, 1001)
    found = spread(Counter(values.tolist()), 0.5)
    expected = np.quantile(values * 0.5, [0.05, 0.5, 0.95], method="lower")
    assert found[1:] == tuple(expected)
    assert found.mean == pytest.approx(values.mean() * 0.5)
    assert spread(Counter()) is None
    assert spread(Counter({7: 1})) == (7, 7, 7, 7)


def test_distinct_runs_of_words():
    texts = [["a", "b", "a"], ["a", "b"], ["c"]]
    assert distinct(texts, 6) == (3 / 6, 2 / 3, 1)
    assert distinct(texts, 4) == (2 / 4, 2 / 2, 1), "the second text is cut"
    assert distinct([], 6) == (0, 0, 0)
    assert vocabulary(texts) == {"a", "b", "c"}


def test_a_draw_does_not_depend_on_the_order_and_grows_by_more():
    names = [str(number) for number in range(500)]
    draws = {}
    for most in (5, 50):
        for order in (names, names[::-1], sorted(names)):
            drawn = Drawn[str](most, seed=3)
            for name in order:
                drawn.offer(name, name)
            assert drawn.items() == draws.setdefault(most, drawn.items())
    assert draws[50][:5] == draws[5]
    other = Drawn[str](50, seed=4)
    for name in names:
        other.offer(name, name)
    assert set(other.items()) != set(draws[50])


def test_every_item_is_as_likely_to_be_drawn():
    counts = Counter()
    for seed in range(400):
        drawn = Drawn[int](5, seed)
        for number in range(20):
            drawn.offer(f"00000.tar/{number}", number)
        counts.update(drawn.items())
    # binomial with mean 100 and standard deviation 8.7
    assert min(counts.values()) > 100 - 5 * 8.7
    assert max(counts.values()) < 100 + 5 * 8.7
    assert len(counts) == 20
