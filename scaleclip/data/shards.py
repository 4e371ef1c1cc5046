"""From patterns to shards: paths, globs, brace ranges, remote ones through fsspec."""

import glob
import os
from collections.abc import Sequence

import fsspec
from braceexpand import braceexpand

from scaleclip.config import resolve_path
from scaleclip.errors import ConfigError

MDS_INDEX = "index.json"


def file_name(shard: str) -> str:
    """`00012.tar` of `s3://bucket/laion/00012.tar`, also where a signature follows a question mark."""
    path = shard.partition("?")[0] if is_remote(shard) else shard
    return path.rpartition("/")[2]


def is_remote(path: str) -> bool:
    """Whether a path is a URL that fsspec reads (`s3://`, `gs://`, `https://`)."""
    return "://" in path and not path.startswith("file://")


def stem(shard: str) -> str:
    """`00012` of `s3://bucket/laion/00012.tar`."""
    return file_name(shard).partition(".")[0]


def expand_shards(key: str, patterns: Sequence[str], *, must_exist: bool = True) -> list[str]:
    """Files that patterns name, sorted within a pattern, each once.

    Args:
        key: the configuration's key, for errors.
        patterns: paths, globs, brace ranges, URLs, `package:`.
        must_exist: look whether every local path is there; a manifest makes that unnecessary, and 600,000 looks take long.

    Raises:
        ConfigError: a pattern names no existing file.
    """
    shards: dict[str, None] = {}
    for pattern in patterns:
        paths = list(braceexpand(pattern if is_remote(pattern) else resolve_path(pattern)))
        if _has_magic(pattern):
            paths = [path for part in paths for path in _matches(part)]
        missing = [path for path in paths if not is_remote(path) and not os.path.exists(path)] if must_exist else []
        if not paths or missing:
            named = f"; {len(missing)} of {len(paths)} files do not exist, the first is {missing[0]}" if missing else ""
            raise ConfigError(f"{key}: no shards match {pattern!r}{named}: check the path, and that this machine sees it")
        shards |= dict.fromkeys(sorted(paths))
    return list(shards)


def read_remote(url: str) -> bytes:
    """A small file behind a URL."""
    with fsspec.open(url, "rb") as file:
        return bytes(file.read())


def _has_magic(path: str) -> bool:
    # what follows the question mark of a URL is a query
    return any(sign in path.partition("?")[0] for sign in "*[") if is_remote(path) else glob.has_magic(path)


def _matches(path: str) -> list[str]:
    if not _has_magic(path):
        return [path]
    if not is_remote(path):
        return glob.glob(path)
    system, inside = fsspec.core.url_to_fs(path)
    return [system.unstrip_protocol(found) for found in system.glob(inside)]
