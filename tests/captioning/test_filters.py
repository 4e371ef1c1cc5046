"""What is not fit for training, and what looks like it and is."""

import pytest

from scaleclip.captioning.filters import (
    Limits,
    example_finder,
    fault,
    foreign_share,
    has_loop,
    has_prompt,
    is_empty,
    is_too_long,
    plain_words,
)
from scaleclip.captioning.prompt import LABELS, TASK

LIMITS = Limits()
PAIRS = [("a cat", "A cat sits on a red mat in the sun."), ("blue bus at night", "A bus.")]


def why(text: str, original: str = "a dog on a lawn", *, ended: bool = True) -> str | None:
    return fault(text, original, task=TASK, labels=LABELS, examples=example_finder(PAIRS, LIMITS), ended=ended, limits=LIMITS)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("A dog lies on the green lawn.", None),
        ("", "empty"),
        (" ... -- !", "empty"),
        ("A dog. Input: a cat", "copy_of_prompt"),
        ("Rewrite each image caption in other words", "copy_of_prompt"),
        ("a CAT", "copy_of_example"),
        ("Look: a cat sits on a red mat in the sun", "copy_of_example"),
        ("dog dog dog dog", "loop"),
        ("dog " * 200, "loop"),
        (" ".join(f"dog{number}" for number in range(151)), "too_long"),
        ("\u0421\u043e\u0431\u0430\u043a\u0430 \u043d\u0430 lawn", "wrong_script"),
    ],
)
def test_the_gravest_reason_is_named(text, reason):
    assert why(text) == reason


def test_a_text_that_did_not_end_is_too_long_where_it_must_end():
    assert why("A dog lies on the", ended=False) == "too_long"
    unended = Limits(must_end=False)
    assert fault("A dog lies on the", "", task="", labels=(), examples=lambda text: False, ended=False, limits=unended) is None


def test_a_caption_that_is_an_example_itself_may_stay_as_it_is():
    assert why("a cat") == "copy_of_example"
    assert why("A cat!", original="a cat") is None


def test_a_label_that_the_caption_has_may_come_back():
    assert why("Audio Output: 20 W", original="speaker, Output: 20 W") is None
    assert why("Audio Output: 20 W") == "copy_of_prompt"


@pytest.mark.parametrize(
    ("text", "empty"),
    [
        ("7", False),
        ("\u72ac", False),
        ("\u00e9", False),
        ("-", True),
        ("\U0001f415", True),
        ("<think>", True),
        ("<|im_start|>", True),
        ("<think>The user wants", True),
        ("a<b and b>c", False),
    ],
)
def test_empty_is_without_letters_and_digits_but_for_markup_and_reasoning(text, empty):
    assert is_empty(text) == empty


def test_long_is_by_words_or_characters():
    assert not is_too_long("word " * 150, LIMITS)
    assert is_too_long("word " * 151, LIMITS)
    assert not is_too_long("\u72ac" * 2000, LIMITS)
    assert is_too_long("\u72ac" * 2001, LIMITS)


def test_five_words_of_the_sentence_in_a_row_are_a_copy():
    task = "say it in other words please"
    assert has_prompt("Say it in other words", task, (), LIMITS)
    assert not has_prompt("say it in other terms", task, (), LIMITS)
    # a sentence of fewer words is copied as a whole: a caption may begin with "A photo of"
    assert has_prompt("rewrite this!", "Rewrite this.", (), LIMITS)
    assert not has_prompt("A photo of a dog on a beach.", "A photo of", (), LIMITS)
    assert not has_prompt("anything", "", (), LIMITS)


def test_signs_that_combine_with_letters_are_theirs():
    assert plain_words("सुंदर बगीचे में, Été") == ["सुंदर", "बगीचे", "में", "été"]


def test_short_examples_count_as_wholes_and_long_ones_within():
    has = example_finder(PAIRS, LIMITS)
    assert has("Blue bus, at night")
    assert not has("a blue bus at night in town")  # of four words
    assert has("and a cat sits on a red mat in the sun too")
    assert not has("and a cat sits on a red mattress in the sun too")


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("very very very red", False),
        ("very very very very red", True),
        ("a dog and a dog and a dog and a cat", False),
        ("the dog ran to the dog ran to the dog ran to the dog ran to", True),
        ("ha" * 7, False),
        ("ha" * 8, True),
        ("\u72ac\u304c\u3044\u308b" * 4, True),
        ("1000000000", False),
        (" ".join(["a red dog", "a red cat", "a dog red"] * 6), True),
        (
            "Rain falls while a musician plays the cello on the street, and people in coats walk by a shop with red lamps",
            False,
        ),
    ],
)
def test_loops(text, loops):
    assert has_loop(text, LIMITS) == loops


def test_scripts():
    assert foreign_share("a dog", "ein Hund") == 0
    assert foreign_share("\u72ac", "a dog") == 1
    assert foreign_share("ab\u72ac\u72ac", "a dog") == 0.5
    # Japanese is written in three, and full-width letters are Latin
    assert foreign_share("\u3044\u306c\u30a4\u30cc", "\u72ac") == 0
    assert foreign_share("\uff41\uff42", "a dog") == 0
    # without letters there is nothing to go by
    assert foreign_share("\u72ac", "2024") == 0
    assert foreign_share("2024", "a dog") == 0
