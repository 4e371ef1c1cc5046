"""Which texts of a model are fit for training: pure functions of a text, each names a reason why it is not."""

import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from scaleclip.captioning.chat import THINK

Reason = Literal["empty", "copy_of_prompt", "copy_of_example", "loop", "too_long", "wrong_script"]

_CJK = "CJK"
# written together, so that either may answer the other
_ALIKE = {"HIRAGANA": _CJK, "KATAKANA": _CJK, "BOPOMOFO": _CJK}
# of a letter's name, where it does not begin with a script
_NO_SCRIPT = {"MODIFIER", "FEMININE", "MASCULINE", "MICRO", "MATHEMATICAL"}


# tokens that a tokenizer does not hold to be special
_MARKUP = re.compile(r"<[^<>\s]*>")


@dataclass(frozen=True)
class Limits:
    """When a text is not fit."""

    max_words: int = 150
    """Words of a text, at most."""
    max_characters: int = 2000
    """Characters of a text, at most: scripts without spaces have long words."""
    must_end: bool = True
    """Whether a text that was still being written at the last token is too long."""
    copied_words: int = 5
    """As many words in a row of the prompt's sentence, or an example of as many in the text, are a copy."""
    loop_times: int = 4
    """Times in a row that the same words make a loop."""
    loop_words: int = 8
    """Words that are looked for in a row, at most."""
    loop_characters: int = 16
    """Characters that a loop within words has, at least, all its turns together."""
    min_distinct: float = 0.4
    """Share of different pairs of words in a text of 20 words or more; below, it goes round."""
    foreign_letters: float = 0.2
    """Share of letters of scripts that the original does not have; above, the text is of another script."""


def fault(
    text: str,
    original: str,
    *,
    task: str,
    labels: Sequence[str],
    examples: Callable[[str], bool],
    ended: bool,
    limits: Limits,
) -> Reason | None:
    """Why a text is not fit for training, the gravest reason; None if it is fit.

    Args:
        text: of the model.
        original: the caption, whose scripts the text may have; of an image the prompt.
        task: the sentence that asks.
        labels: what lines of the prompt begin with.
        examples: whether a text has one of the examples; see `example_finder`.
        ended: the model ended the text itself, and was not cut off.
        limits: when.
    """
    if is_empty(text):
        return "empty"
    # a caption of a loudspeaker may have one of the labels itself
    if has_prompt(text, task, [label for label in labels if label not in original], limits):
        return "copy_of_prompt"
    if plain_words(text) != plain_words(original) and examples(text):
        return "copy_of_example"
    if has_loop(text, limits):
        return "loop"
    if is_too_long(text, limits) or (limits.must_end and not ended):
        return "too_long"
    if foreign_share(text, original) > limits.foreign_letters:
        return "wrong_script"
    return None


def is_empty(text: str) -> bool:
    """Without a letter or a digit, but for markup and what follows the start of reasoning."""
    return not any(character.isalnum() for character in _MARKUP.sub("", text.partition(THINK)[0]))


def is_too_long(text: str, limits: Limits) -> bool:
    """By words or by characters."""
    return len(text) > limits.max_characters or len(text.split()) > limits.max_words


def has_prompt(text: str, task: str, labels: Sequence[str], limits: Limits) -> bool:
    """It goes on with the prompt's form, or repeats some words of its sentence."""
    if any(label in text for label in labels):
        return True
    words, asked = plain_words(text), plain_words(task)
    size = limits.copied_words
    runs = {tuple(asked[start : start + size]) for start in range(len(asked) - size + 1)}
    return words == asked or any(tuple(words[start : start + size]) in runs for start in range(len(words) - size + 1))


def example_finder(examples: Sequence[tuple[str, str]], limits: Limits) -> Callable[[str], bool]:
    """Whether a text is one of the examples, input or output, or has one of `copied_words` words or more within."""
    known = {tuple(plain_words(text)) for pair in examples for text in pair}
    long = [" ".join(words) for words in known if len(words) >= limits.copied_words]

    def find(text: str) -> bool:
        words = plain_words(text)
        joined = f" {' '.join(words)} "
        return tuple(words) in known or any(f" {each} " in joined for each in long)

    return find


def has_loop(text: str, limits: Limits) -> bool:
    """It says the same words, or the same characters, again and again."""
    words = plain_words(text)
    for period in range(1, min(limits.loop_words, len(words) // limits.loop_times) + 1):
        same = 0
        for place in range(period, len(words)):
            same = same + 1 if words[place] == words[place - period] else 0
            if same >= period * (limits.loop_times - 1):
                return True
    pairs = list(itertools.pairwise(words))
    if len(words) >= 20 and len(set(pairs)) < limits.min_distinct * len(pairs):
        return True
    # of scripts without spaces, and of a word that does not end
    turns = re.finditer(rf"(\S{{1,12}}?)\1{{{limits.loop_times - 1},}}", text[: limits.max_characters])
    return any(len(turn.group()) >= limits.loop_characters for turn in turns)


def foreign_share(text: str, original: str) -> float:
    """Share of a text's letters whose script the original does not have; 0 where either has no letters."""
    allowed = set(_scripts(original))
    found = _scripts(text)
    return sum(script not in allowed for script in found) / len(found) if allowed and found else 0.0


def plain_words(text: str) -> list[str]:
    """Words without case and punctuation; signs that combine with letters, as Indic vowels, belong to theirs."""
    return _words().findall(text.casefold())


@functools.cache
def _words() -> re.Pattern[str]:
    # of the scripts that are written with them; \w leaves them out
    marks = "".join(chr(code) for code in (*range(0x300, 0x3100), *range(0xA000, 0xAC00)) if is_mark(chr(code)))
    return re.compile(rf"[\w{marks}]+")


def is_mark(character: str) -> bool:
    """Whether it combines with the character before it."""
    return unicodedata.category(character).startswith("M")


def _scripts(text: str) -> list[str]:
    """Of every letter; full-width and mathematical forms are letters of their script."""
    names = [
        unicodedata.name(letter, "").partition(" ")[0] for letter in unicodedata.normalize("NFKC", text) if letter.isalpha()
    ]
    return [_ALIKE.get(name, name) for name in names if name and name not in _NO_SCRIPT]
