"""From patterns to shards: paths, globs, brace ranges, remote ones through fsspec."""

import glob
import os
from collections.abc import Sequence

import fsspec
from braceexpand import braceexpand

from scaleclip.errors import ConfigError
from scaleclip.files import resolve_path

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
        patterns: paths, globs, brace ranges, URLs, `package:`; a local folder stands for its tars, or for its MDS index.
        must_exist: look whether every local path is there; a manifest makes that unnecessary, and 600,000 looks take long.

    Raises:
        ConfigError: a pattern names no existing file.
    """
    shards: dict[str, None] = {}
    for pattern in patterns:
        paths = list(braceexpand(pattern if is_remote(pattern) else resolve_path(pattern)))
        if _has_magic(pattern):
            paths = [path for part in paths for path in _matches(key, part)]
        paths = [path for part in paths for path in _inside(part)] if must_exist else paths
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


def _inside(path: str) -> list[str]:
    """The shards of a local folder."""
    if is_remote(path) or not os.path.isdir(path):
        return [path]
    index = os.path.join(path, MDS_INDEX)
    return [index] if os.path.exists(index) else sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))


def _matches(key: str, path: str) -> list[str]:
    if not _has_magic(path):
        return [path]
    if not is_remote(path):
        return glob.glob(path)
    try:
        system, inside = fsspec.core.url_to_fs(path)
        return [system.unstrip_protocol(found) for found in system.glob(inside)]
    # what the file systems behind fsspec raise has no common base
    except Exception as error:
        raise ConfigError(
            f"{key}: {path} cannot be listed ({type(error).__name__}: {error}): check the URL, the store's package, its "
            f"endpoint and credentials (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID ...)"
        ) from error
