"""How a model's chat template is filled in: on every day alike, so that a job can go on the next day, and without reasoning."""

from datetime import datetime
from typing import Any

from jinja2 import TemplateError

from scaleclip.errors import ConfigError

THINK = "<think>"
"""What reasoning begins with."""
_DAY = datetime(2024, 7, 26)  # Llama 3's own, where nobody says which


def turn(speaker: Any, content: Any, way_out: str) -> str:
    """What a user says as a turn, up to where the assistant is to speak.

    Args:
        speaker: a tokenizer or processor with a chat template.
        content: what the user says, as its template takes it.
        way_out: what to do about a template that cannot be used.

    Raises:
        ConfigError: the template refuses what is said, or has the assistant reason before it speaks.
    """
    try:
        said: str = speaker.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, enable_thinking=False,
            date_string=_DAY.strftime("%d %b %Y"), strftime_now=_DAY.strftime,
        )  # fmt: skip
    except (TemplateError, TypeError) as error:  # a template adds what is said to a string
        raise ConfigError(f"the chat template cannot be filled in: {error}; {way_out}") from error
    if said.rfind(THINK) > said.rfind(THINK.replace("<", "</")):
        raise ConfigError(
            f"the chat template has the model reason first, and its reasoning would be taken for a text: it ends in "
            f"{said[-40:]!r}; {way_out}"
        )
    return said
