"""The manifest: which shards a data set has and how many samples lie in each. Sample order needs nothing else."""

import glob
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray

from scaleclip.config import resolve_path
from scaleclip.data.index import index_tar
from scaleclip.errors import ConfigError
from scaleclip.files import write_atomic


@dataclass(frozen=True)
class Manifest:
    """Shards and their sample counts, in the order that makes a shard's number."""

    shards: tuple[str, ...]
    """Paths of the tars."""
    counts: tuple[int, ...]
    """Samples of each."""

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(self.counts)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of shard names and counts: equal ones give the same order, wherever the shards lie."""
        rows = "\n".join(f"{Path(shard).name}\t{count}" for shard, count in zip(self.shards, self.counts, strict=True))
        return hashlib.sha256(rows.encode()).hexdigest()[:16]

    @cached_property
    def first_sample(self) -> NDArray[np.int64]:
        """int64 [shards]: number of each shard's first sample when all are counted through in manifest order."""
        return np.cumsum([0, *self.counts[:-1]], dtype=np.int64)


def expand_shards(patterns: Sequence[str]) -> list[str]:
    """Files that patterns (paths, globs, brace ranges, `package:`) name, sorted within a pattern, each once.

    Raises:
        ConfigError: a pattern names no existing file.
    """
    shards: dict[str, None] = {}
    for pattern in patterns:
        paths = [path for part in braceexpand(resolve_path(pattern)) for path in _matches(part)]
        missing = [path for path in paths if not os.path.exists(path)]
        if not paths or missing:
            named = f"; {len(missing)} of {len(paths)} files do not exist, the first is {missing[0]}" if missing else ""
            raise ConfigError(f"data.shards: no shards match {pattern!r}{named}: check the path, and that this machine sees it")
        shards |= dict.fromkeys(sorted(paths))
    return list(shards)


def load_manifest(patterns: Sequence[str], manifest: str | None) -> Manifest:
    """The manifest of `data.shards`, with counts from the file `data.manifest` or the `*_stats.json` beside each shard.

    Raises:
        ConfigError: no shard matches, a count is missing or is no number.
    """
    shards = expand_shards(patterns)
    if manifest is None:
        return Manifest(tuple(shards), tuple(_stats_count(shard) for shard in shards))
    path = Path(resolve_path(manifest))
    try:
        counts = json.loads(path.read_text())["counts"]
        return Manifest(tuple(shards), tuple(int(counts[Path(shard).name]) for shard in shards))
    except OSError as error:
        raise ConfigError(f"data.manifest={manifest}: cannot be read: {error.strerror}") from None
    except KeyError as error:
        raise ConfigError(f"data.manifest={manifest}: has no count for {error}: run `scaleclip data index` again") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"data.manifest={manifest}: is no manifest of `scaleclip data index`: {error}") from None


def write_manifest(shards: Iterable[str], path: Path) -> list[str]:
    """Count the samples of every shard by reading its headers and write the result to `path` in one step.

    Returns the shards that are cut off; their whole samples are counted.
    """
    counts: dict[str, int] = {}
    truncated = []
    for shard in shards:
        name = Path(shard).name
        if name in counts:
            raise ConfigError(f"two shards are called {name}: a manifest names shards by their file name, so rename one")
        index = index_tar(shard)
        counts[name] = len(index)
        if index.truncated:
            truncated.append(shard)
    write_atomic(path, json.dumps({"counts": counts}, indent=0))
    return truncated


def _matches(path: str) -> list[str]:
    return glob.glob(path) if glob.has_magic(path) else [path]


def _stats_count(shard: str) -> int:
    stats = Path(shard.removesuffix(".tar") + "_stats.json")
    try:
        return int(json.loads(stats.read_text())["successes"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"the number of samples in {shard} is unknown: {stats.name} beside it (img2dataset) is missing or has no "
            f"`successes`; run `scaleclip data index` on the shards and set data.manifest"
        ) from None
