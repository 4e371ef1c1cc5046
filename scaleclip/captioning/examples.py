"""Examples of rewriting: pairs of a caption and its rewrite, which a language model sees before the caption that it rewrites.

LaCLIP (arXiv:2305.20088) draws three from one of four sources: pairs of ChatGPT's, of Bard's, of two captions of one image of
MSCOCO, and of people. The shipped files of these names were written for this project in the style of each, and hold nothing of
those systems or data sets.
"""

import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from scaleclip.errors import ConfigError
from scaleclip.files import resolve_path

SHIPPED = ("chatgpt", "bard", "mscoco", "human")
"""Names of the sources that come with the package."""
NUM_SHOWN = 3
"""Examples in a prompt."""

_FOLDER = "package:scaleclip/captioning/examples"
# a column of the sidecar, and what `texts:` of a configuration names after a colon
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SUFFIXES = (".yaml", ".yml", ".jsonl")
_RESERVED = ("key", "recaption", "original", "caption")


class Pair(NamedTuple):
    """An example."""

    input: str
    output: str


class ExampleSource(NamedTuple):
    """A named set of examples."""

    name: str
    file: str
    """As the user named it."""
    pairs: tuple[Pair, ...]

    @property
    def digest(self) -> str:
        """Of the pairs, wherever they lie."""
        return hashlib.sha256(json.dumps(self.pairs).encode()).hexdigest()[:16]

    def draw(self, seed: int) -> list[Pair]:
        """`NUM_SHOWN` different ones, in the order drawn."""
        return random.Random(seed).sample(self.pairs, NUM_SHOWN)


def load_sources(named: Sequence[str]) -> list[ExampleSource]:
    """Sources of examples, by name: their order in a command decides nothing.

    Args:
        named: a shipped name, or NAME=FILE: YAML, a list of {input, output}, or JSON lines of such objects.

    Raises:
        ConfigError: an unknown or unfit name, a name twice, a file that cannot be read or is no list of pairs.
    """
    found: dict[str, ExampleSource] = {}
    for each in named:
        name, is_own, file = each.partition("=")
        if not is_own and name not in SHIPPED:
            raise ConfigError(
                f"--source={each}: there are no such examples, shipped are {', '.join(SHIPPED)}: name your own as NAME=FILE"
            )
        if not _NAME.fullmatch(name) or name in _RESERVED:
            raise ConfigError(
                f"--source={each}: {name!r} cannot be a column's name: take letters, digits, _ and -, and not "
                f"{', '.join(_RESERVED)}"
            )
        if name in found:
            raise ConfigError(f"--source={each}: {name} is there twice: give each source a name of its own")
        path = Path(file).expanduser() if is_own else Path(resolve_path(f"{_FOLDER}/{name}.yaml"))
        found[name] = ExampleSource(name, file or name, _read(f"--source={each}", path))
    return [found[name] for name in sorted(found)]


def one_line(text: str) -> str:
    """White space and control characters, line ends among them, as single spaces."""
    return " ".join("".join(" " if unicodedata.category(each) == "Cc" else each for each in text).split())


def _read(key: str, path: Path) -> tuple[Pair, ...]:
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"{key}: examples are {', '.join(_SUFFIXES)} files")
    try:
        text = path.read_text(encoding="utf-8")
        rows = _lines(key, text) if path.suffix == ".jsonl" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{key}: {path} is not {path.suffix.removeprefix('.')}: {error}") from None
    if not isinstance(rows, list):
        raise ConfigError(f"{key}: {path} holds no list: write a list of pairs, each with input and output")
    pairs = tuple(_pair(f"{key}: {path}, example {number}", row) for number, row in enumerate(rows, 1))
    if len(set(pairs)) < NUM_SHOWN:
        raise ConfigError(f"{key}: {path} has {len(set(pairs))} different pairs, a prompt shows {NUM_SHOWN}: add some")
    return tuple(dict.fromkeys(pairs))


def _lines(key: str, text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    return rows


def _pair(key: str, row: Any) -> Pair:
    if not isinstance(row, dict) or set(row) != {"input", "output"}:
        has = f"has {', '.join(map(str, row))}" if isinstance(row, dict) else f"is a {type(row).__name__}"
        raise ConfigError(f"{key} {has}: it needs input and output, and nothing else")
    for name, value in row.items():
        if not isinstance(value, str) or not one_line(value):
            raise ConfigError(f"{key}: {name}={value!r} is no text: put it into quotation marks")
    return Pair(one_line(row["input"]), one_line(row["output"]))
