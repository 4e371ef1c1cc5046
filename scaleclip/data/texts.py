"""Where the texts of a sample lie: in members, in fields of its JSON, in sidecars."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from scaleclip.config import SourceConfig
from scaleclip.data.sample import Sample, SampleError
from scaleclip.data.sidecar import Sidecar
from scaleclip.errors import ConfigError

MAX_CHARACTERS = 20_000
"""Characters of a text that are used, some 4,000 tokens; what follows is cut, so that one text cannot hold up a batch."""

_JSON = "json"

Find = Callable[[Sample, int, int], str | None]
"""(sample, shard, ordinal) -> the text at a location, or None where there is none."""


class TextFinder:
    """The named texts of a source's samples.

    Args:
        name: the source's key in `data.sources`.
        config: its section.
        shards: name of every shard, as in the manifest; its number is its place here.

    Raises:
        ConfigError: a location is malformed, or its sidecar or column does not exist.
    """

    def __init__(self, name: str, config: SourceConfig, shards: Sequence[str]) -> None:
        key = f"data.sources.{name}"
        if _JSON in config.sidecars:
            raise ConfigError(f"{key}.sidecars.{_JSON}: {_JSON}: stands for the JSON member of a sample; take another name")
        sidecars = {called: Sidecar(f"{key}.sidecars.{called}", at, shards) for called, at in config.sidecars.items()}
        self.warnings = [sidecar.warning for sidecar in sidecars.values() if sidecar.warning]
        """Of sidecars that lack some shards."""
        self._texts = {text: parse_location(f"{key}.texts.{text}", at, sidecars) for text, at in config.texts.items()}
        if config.concept is not None and config.concept.partition(":")[0] in sidecars:
            raise ConfigError(f"{key}.concept={config.concept}: a concept lies in a member or in the JSON, not in a sidecar")
        self._concept = parse_location(f"{key}.concept", config.concept, {}) if config.concept is not None else None

    def __call__(self, sample: Sample, shard: int, ordinal: int) -> dict[str, str]:
        """Texts by name, without those that the sample lacks, each cut to `MAX_CHARACTERS`.

        Raises:
            SampleError: one of them cannot be read: `bad_json`, `undecodable_text`, or a fault of a sidecar.
        """
        found = {name: find(sample, shard, ordinal) for name, find in self._texts.items()}
        return {name: _cut(text) for name, text in found.items() if text is not None}

    def concept(self, sample: Sample) -> str | None:
        """What the sample shows, or None where nothing says so. Raises SampleError as for texts."""
        concept = self._concept(sample, 0, 0) if self._concept else None
        return concept if concept and not concept.isspace() else None


def parse_location(key: str, location: str, sidecars: Mapping[str, Sidecar]) -> Find:
    """What reads a location: `txt`, `json:a.b` (a number picks from a list: `json:rewrites.0`) or `recap:re_caption`.

    Args:
        key: the configuration's key of the location, for errors.
        location: as the configuration has it.
        sidecars: those that it may name.

    Raises:
        ConfigError: a part of it is empty, or no sidecar or column has the name.
    """
    place, colon, rest = location.partition(":")
    if not place or (colon and not all(rest.split("."))):
        raise ConfigError(f"{key}={location!r} names no text: write txt, json:field.of.it or sidecar:column")
    if not colon:
        return partial(_member, location)
    if place == _JSON:
        return partial(_json_field, rest)
    if place not in sidecars:
        known = f"those of the source are {', '.join(sidecars)}" if sidecars else "the source has none"
        raise ConfigError(f"{key}={location}: there is no sidecar {place!r}, {known}: name its folder in sidecars.{place}")
    if rest not in sidecars[place].columns:
        raise ConfigError(f"{key}={location}: the sidecar has no column {rest!r}, only {', '.join(sidecars[place].columns)}")
    return partial(_column, sidecars[place], rest)


def json_text(value: Any) -> str | None:
    """A value of JSON as a text: a string, a number as it is written, None for null and NaN.

    Raises:
        SampleError: it is neither.
    """
    if isinstance(value, str):
        # JSON can escape half a surrogate pair, which no tokenizer takes
        return value if value.isascii() else value.encode(errors="replace").decode()
    # pandas writes NaN where a caption is missing
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, int | float):
        return str(value)
    raise SampleError("bad_json", f"a text is a {type(value).__name__}, not a string")


def _member(name: str, sample: Sample, shard: int, ordinal: int) -> str | None:
    data = sample.members.get(name)
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError as error:
        raise SampleError("undecodable_text", f"{name} of {sample.key} is not UTF-8: {error.reason}") from None


def _json_field(path: str, sample: Sample, shard: int, ordinal: int) -> str | None:
    data = sample.members.get(_JSON)
    value = None if data is None else _json_object(data)
    for step in path.split("."):
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and step.isdecimal():
            value = value[int(step)] if int(step) < len(value) else None
        elif value is not None:
            raise SampleError("bad_json", f"{path} of {sample.key}: there is no {step} in a {type(value).__name__}")
    return json_text(value)


def _column(sidecar: Sidecar, column: str, sample: Sample, shard: int, ordinal: int) -> str | None:
    return sidecar.text(shard, ordinal, column, sample.key)


# texts and concept of a sample come one after the other, so one entry parses a member once
@lru_cache(maxsize=1)
def _json_object(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        raise SampleError("bad_json", "the .json member is not JSON") from None
    if not isinstance(fields, dict):
        raise SampleError("bad_json", "the .json member is no object")
    return fields


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text.lstrip()[:MAX_CHARACTERS]
