"""What a language model reads before it rewrites a caption: a task sentence, examples, the caption, each in a line of its own.

The prompt is put together from token ids, not from one text: the words of a caption cannot become the tokens that end a turn or
stand for an image, and white space in it is single spaces, so that nothing in it ends its line.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

from scaleclip.captioning.examples import Pair, one_line
from scaleclip.errors import ConfigError

TASK = "Rewrite each image caption in other words, in one line, and keep what it says."
INPUT, OUTPUT = "Input:", "Output:"
LABELS = (INPUT, OUTPUT)
CAPTION_TOKENS = 256
"""Of a caption that are shown; what follows is left out."""


class Vocabulary(Protocol):
    """Texts to ids."""

    frame: tuple[Sequence[int], Sequence[int]]
    """What stands before and after all of a prompt: a start token, or the turns of a chat."""

    def plain(self, text: str) -> list[int]:
        """Ids of a text of which nothing is a special token."""

    def going_on(self, text: str) -> list[int]:
        """The same, where the text goes on in a line: it begins with a space or a line end."""

    def read(self, ids: Sequence[int]) -> str:
        """The text of some ids."""


class RewritePrompt:
    """The prompt.

    Args:
        task: the task sentence.
        vocabulary: of the model.

    Raises:
        ConfigError: ids of the vocabulary do not say where a line ends.
    """

    def __init__(self, task: str, vocabulary: Vocabulary) -> None:
        self.task, self._vocabulary = one_line(task), vocabulary
        before, after = vocabulary.frame
        self._before = list(before)
        # a caption is followed by this, whatever it says
        self._after = [*vocabulary.going_on(f"\n{OUTPUT}"), *after]
        lines = _text(self.task, [Pair("a", "b")])
        read = vocabulary.read(vocabulary.plain(lines))
        if read.count("\n") != lines.count("\n"):
            raise ConfigError(
                f"the model's tokenizer does not keep the lines of a text, {lines!r} reads {read!r}: take another model"
            )

    @property
    def text(self) -> str:
        """With `{...}` where examples and caption are."""
        return _text(self.task, [Pair("{input}", "{output}")]) + f"{INPUT} {{caption}}\n{OUTPUT}"

    @property
    def name(self) -> str:
        """An id of the text and of what stands around it."""
        content = repr((self.text, self._before, self._after))
        return f"rewrite-{hashlib.sha256(content.encode()).hexdigest()[:8]}"

    def prefix(self, examples: Sequence[Pair]) -> list[int]:
        """Ids up to the caption, the same for all captions that are shown the same examples."""
        return [*self._before, *self._vocabulary.plain(_text(self.task, examples) + INPUT)]

    def ending(self, caption: str) -> list[int]:
        """Ids from the caption on."""
        return [*self._vocabulary.going_on(f" {one_line(caption)}")[:CAPTION_TOKENS], *self._after]

    def longest(self, pairs: Sequence[Pair], shown: int) -> int:
        """Tokens that prefix and ending have, at most, with so many of these examples."""
        worst = sorted(pairs, key=lambda pair: len(self._vocabulary.plain(f"{pair.input}\n{pair.output}")))[-shown:]
        return len(self.prefix(worst)) + CAPTION_TOKENS + len(self._after)


def _text(task: str, examples: Sequence[Pair]) -> str:
    shown = (f"{INPUT} {pair.input}\n{OUTPUT} {pair.output}\n\n" for pair in examples)
    return f"{task}\n\n{''.join(shown)}"
