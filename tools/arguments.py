"""What the tools' command lines share: argparse types that say their rule."""

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def list_of(one: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Values separated by commas, each once."""

    def parse(text: str) -> list[T]:
        return list(dict.fromkeys(one(word.strip()) for word in text.split(",")))

    return parse


def checked(parse: Callable[[str], T], holds: Callable[[T], bool], rule: str) -> Callable[[str], T]:
    """A value for which `holds` is true; `rule` ends the sentence "... is not"."""

    def parse_checked(text: str) -> T:
        with contextlib.suppress(ValueError):
            value = parse(text)
            if holds(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {rule}")

    return parse_checked


positive = checked(int, lambda value: value > 0, "a whole number above 0")
natural = checked(int, lambda value: value >= 0, "a whole number")
seconds = checked(float, lambda value: value > 0, "a number of seconds above 0")


def one_of(*names: str) -> Callable[[str], str]:
    """One of some words."""
    return checked(str, lambda value: value in names, f"one of {', '.join(names)}")


def file_with(*suffixes: str) -> Callable[[str], Path]:
    """A path that ends in one of some suffixes."""
    return checked(Path, lambda path: path.suffix in suffixes, f"a path that ends in {' or '.join(suffixes)}")
