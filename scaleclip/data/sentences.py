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
# a bracketed sentence in front, of two words or more, which sentencex leaves with the next one
_BRACKETED = re.compile(r"([(\[][^()\[\]]*\s[^()\[\]]*[.!?\u2026][)\]])\s+(?=\S)")


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
    while bracketed := _BRACKETED.match(sentence):
        yield bracketed[1]
        sentence = sentence[bracketed.end() :]
    if sentence:
        yield sentence
