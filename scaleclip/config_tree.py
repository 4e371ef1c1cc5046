"""Nested mappings, as YAML gives them: laid over one another, flattened, reached by dotted keys."""

from collections.abc import Mapping, Sequence
from typing import Any

from scaleclip.errors import ConfigError


def deep_update(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `top` laid over it, in place: mappings key by key, while anything else takes the place of what was there."""
    for key, value in top.items():
        base[key] = _laid_over(base.get(key), value)
    return base


def override(tree: Any, path: Sequence[str], value: Any, key: str) -> Any:
    """`tree`, changed in place, with `value` laid over what lies at `path`, where a list's entries go by their numbers.

    Raises:
        ConfigError: a list has no such entry; `key`, which ends with `path`, is for the message.
    """
    if not path:
        return _laid_over(tree, value)
    head, *rest = path
    if isinstance(tree, list):
        if not head.isdecimal() or int(head) >= len(tree):
            parent = ".".join(key.split(".")[: -len(path)])
            numbers = f"its entries are 0 to {len(tree) - 1}" if tree else "it has no entries"
            raise ConfigError(f"override {key}: {parent} is a list, and {head!r} is none of its numbers: {numbers}")
        tree[int(head)] = override(tree[int(head)], rest, value, key)
        return tree
    tree = tree if isinstance(tree, dict) else {}
    tree[head] = override(tree.get(head), rest, value, key)
    return tree


def has(tree: Any, path: Sequence[str]) -> bool:
    """Whether something lies at `path`."""
    return not path or (isinstance(tree, Mapping) and path[0] in tree and has(tree[path[0]], path[1:]))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; lists are values, and empty mappings vanish."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def with_numbers(tree: Any) -> Any:
    """A copy with strings such as 1e-3 as numbers: YAML 1.1 takes those without a dot for strings."""
    if isinstance(tree, dict):
        return {key: with_numbers(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [with_numbers(value) for value in tree]
    if isinstance(tree, str) and tree[:1] in "+-.0123456789" and "e" in tree.lower():
        try:
            return float(tree)
        except ValueError:
            return tree
    return tree


def _laid_over(below: Any, value: Any) -> Any:
    return deep_update(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
