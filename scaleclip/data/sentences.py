"""A text cut into sentences by sentencex (Wikimedia): abbreviations, decimals, quotation marks, other scripts' full stops.

It is compiled: a caption of 100 words takes some ten microseconds. Its rules for English are taken for any text: they know
every script's stops and the abbreviations that languages share, and do not cut where they are in doubt.
"""

import re
from collections.abc import Iterator

from sentencex import segment

_LANGUAGE = "en"
_LINE_END = re.compile(r"[\r\n\v\f\x85\u2028\u2029]+")
_LETTER = re.compile(r"[^\W\d_]")
# brackets in front; what is in them is looked at apart, since an expression for all of it takes quadratic time
_BRACKETED = re.compile(r"([(\[]([^()\[\]]*+)[)\]])\s+(?=\S)")
_STOPS = (".", "!", "?", "\u2026")


def sentences(text: str) -> list[str]:
    """The sentences of a text, none blank; it is cut at line ends too, and what has no letter stays with its neighbour."""
    found: list[str] = []
    waiting = ""  # the number of a list's item, or a sign, which is no sentence by itself
    pieces = (piece.strip() for line in _LINE_END.split(text) if line for piece in segment(_LANGUAGE, line))
    for part in (part for piece in pieces for part in _unbracketed(piece)):
        waiting = f"{waiting} {part}" if waiting else part
        if _LETTER.search(part):
            found.append(waiting)
            waiting = ""
    if waiting and found:
        return [*found[:-1], f"{found[-1]} {waiting}"]
    return [waiting] if waiting else found


def _unbracketed(sentence: str) -> Iterator[str]:
    """A bracketed sentence in front, of two words or more, is one by itself: sentencex leaves it with the next one."""
    while (bracketed := _BRACKETED.match(sentence)) and _is_sentence(bracketed[2]):
        yield bracketed[1]
        sentence = sentence[bracketed.end() :]
    if sentence:
        yield sentence


def _is_sentence(content: str) -> bool:
    return content.endswith(_STOPS) and any(map(str.isspace, content))
