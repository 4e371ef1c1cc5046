"""Which text of a sample a view takes."""

from collections import Counter

import numpy as np
import pytest

from scaleclip.config import ViewConfig
from scaleclip.data.captions import Caption, CaptionPolicy
from scaleclip.data.sample import SampleError

DRAWS = 10_000
TEXTS = {
    "caption": "an original caption",
    "recap": "A cat sits. It is red! Is it? Yes",
    "one": "word",
    "blank": " \n",
    "empty": "",
}


def draw(texts, /, draws=DRAWS, seed=0, **view):
    policy = CaptionPolicy(ViewConfig(**view))
    return [policy.choose(texts, np.random.Generator(np.random.PCG64([seed, i]))) for i in range(draws)]


def assert_shares(found, expected):
    """Counts within five standard deviations of a binomial distribution: one run in a million fails by chance."""
    counts = Counter(found)
    assert counts.keys() == {name for name, share in expected.items() if share}
    for name, share in expected.items():
        assert abs(counts[name] - DRAWS * share) <= 5 * (DRAWS * share * (1 - share)) ** 0.5, name


@pytest.mark.parametrize(
    ("view", "shares"),
    [
        ({}, {"caption": 1}),
        ({"texts": "recap"}, {"recap": 1}),
        ({"texts": ["caption", "recap", "one"]}, {"caption": 1 / 3, "recap": 1 / 3, "one": 1 / 3}),
        ({"texts": {"caption": 0.8, "recap": 0.2}}, {"caption": 0.8, "recap": 0.2}),
        ({"texts": {"caption": 6, "recap": 4, "one": 0}}, {"caption": 0.6, "recap": 0.4}),
        ({"texts": ["caption", "blank", "empty", "missing", "recap"]}, {"caption": 1 / 2, "recap": 1 / 2}),
        # LaCLIP: the rewrite of one word gives its share to the original
        ({"texts": ["caption", "recap", "one"], "min_words": 2, "fallback": "caption"}, {"caption": 2 / 3, "recap": 1 / 3}),
        ({"texts": ["recap", "one"], "min_words": 2, "fallback": "one"}, {"recap": 1 / 2, "one": 1 / 2}),
        ({"texts": ["missing", "blank"], "fallback": "caption"}, {"caption": 1}),
    ],
)
def test_texts_are_drawn_by_their_weights(view, shares):
    found = draw(TEXTS, **view)
    assert all(caption.text == TEXTS[caption.name] for caption in found)
    assert_shares((caption.name for caption in found), shares)


def test_a_sentence_is_drawn_uniformly():
    found = draw(TEXTS, texts="recap", part="sentence")
    assert {caption.name for caption in found} == {"recap"}
    assert_shares((caption.text for caption in found), dict.fromkeys(["A cat sits.", "It is red!", "Is it?", "Yes"], 1 / 4))


def test_the_draw_of_a_sentence_does_not_depend_on_that_of_the_text():
    found = draw(TEXTS, texts={"caption": 0.5, "recap": 0.5}, part="sentence")
    shares = {"an original caption": 0.5} | dict.fromkeys(["A cat sits.", "It is red!", "Is it?", "Yes"], 1 / 8)
    assert_shares((caption.text for caption in found), shares)


def test_the_fallback_is_used_whole():
    texts = {"web": "St. Peter's. Rome", "recap": " "}
    assert set(draw(texts, 50, texts="recap", part="sentence", fallback="web")) == {Caption("web", "St. Peter's. Rome")}


def test_equal_seeds_choose_alike_and_others_do_not():
    view = {"texts": ["caption", "recap"], "part": "sentence"}
    assert draw(TEXTS, 50, seed=1, **view) == draw(TEXTS, 50, seed=1, **view) != draw(TEXTS, 50, seed=2, **view)


@pytest.mark.parametrize("part", ["whole", "sentence"])
@pytest.mark.parametrize("texts", [TEXTS, {"caption": "a"}, {"recap": "b. c. d. e"}, {"one": "w", "caption": " "}])
def test_what_is_drawn_next_does_not_depend_on_the_texts(part, texts):
    random, reference = np.random.default_rng(5), np.random.default_rng(5)
    policy = CaptionPolicy(ViewConfig(texts=["caption", "recap"], part=part, min_words=1, fallback="one"))
    policy.choose(texts, random)
    reference.random(2)
    assert random.random() == reference.random()


@pytest.mark.parametrize(
    ("texts", "view", "said"),
    [
        ({}, {}, "there is no text among caption"),
        ({"caption": "\t \n"}, {}, "there is no text among caption"),
        ({"caption": "word"}, {"min_words": 2}, "there is no text of at least 2 words among caption"),
        ({"caption": "word", "web": " "}, {"min_words": 2, "fallback": "web"}, "of at least 2 words among caption, web"),
        ({"web": "a b"}, {"texts": {"caption": 1, "web": 0}}, "there is no text among caption"),
    ],
)
def test_a_sample_without_a_usable_text_is_a_fault(texts, view, said):
    with pytest.raises(SampleError) as caught:
        CaptionPolicy(ViewConfig(**view)).choose(texts, np.random.default_rng(0))
    assert caught.value.cause == "empty_caption"
    assert said in caught.value.detail
