"""One source of image-text pairs: its manifest, its reader, its texts."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from scaleclip.config import SourceConfig
from scaleclip.data.cache import ShardCache
from scaleclip.data.manifest import INDEXES, Manifest, check_names, load_manifest, stats_counts
from scaleclip.data.open_shards import OpenShards
from scaleclip.data.rows import TABLES, RowReader
from scaleclip.data.sample import Sample
from scaleclip.data.shards import MDS_INDEX, expand_shards, file_name
from scaleclip.data.texts import TextFinder
from scaleclip.data.webdataset import TarReader
from scaleclip.errors import ConfigError


class Reader(Protocol):
    """Random access to the samples of shards."""

    @property
    def open(self) -> OpenShards[Any]:
        """What is open of them."""

    def fetch(self, shard: int) -> None:
        """Have a shard at hand. Raises SampleError when it cannot be had."""

    def __call__(self, shard: int, ordinal: int) -> Sample:
        """Raises SampleError when the sample cannot be had."""

    def keys(self, shard: int) -> Sequence[str]:
        """Of all its samples. Raises SampleError when the shard cannot be had."""


class Source:
    """A data set of `data.sources`.

    Args:
        name: its key.
        config: its section.
        cache: local copies of remote shards.

    Raises:
        ConfigError: no shard matches, a count or a sidecar is missing, tars and MDS are mixed.
    """

    def __init__(self, name: str, config: SourceConfig, cache: ShardCache) -> None:
        self.name = name
        self.image_members = config.image
        self.manifest, self.reader = open_shards(f"data.sources.{name}", config.shards, config.manifest, cache)
        if config.sidecars:
            check_names(self.manifest.names)
        self.texts = TextFinder(name, config, self.manifest.names)


def open_shards(key: str, patterns: Sequence[str], manifest: str | None, cache: ShardCache) -> tuple[Manifest, Reader]:
    """What patterns of tars, of the index files of MDS folders, or of tables name, and how it is read.

    Args:
        key: the configuration's key of the source, for errors.
        patterns: as in `data.sources.NAME.shards`.
        manifest: folder of a manifest, or none.
        cache: local copies of remote shards.

    Raises:
        ConfigError: no shard matches, a count is missing, tars and MDS are mixed.
    """
    files = expand_shards(key, patterns, must_exist=manifest is None)
    num_mds = sum(file.endswith(MDS_INDEX) for file in files)
    if 0 < num_mds < len(files):
        raise ConfigError(f"{key}.shards mixes tars and MDS ({MDS_INDEX}): make them two sources")
    if num_mds:
        # streaming takes seconds to import, and tars need none of it
        from scaleclip.data.mds import open_mds

        mds = open_mds(key, files, cache)
        check_names(mds.names)
        listed = (
            load_manifest(key, manifest, mds.shards, mds.names) if manifest else Manifest(mds.shards, mds.names, mds.counts)
        )
        return listed, mds.reader
    names = [file_name(shard) for shard in files]
    num_tables = sum(file.endswith(TABLES) for file in files)
    if num_tables == len(files):
        check_names(names)
        rows = RowReader(files, cache)
        return Manifest(files, names, rows.counts(key)), rows
    if num_tables:
        raise ConfigError(f"{key} mixes tables of rows ({', '.join(TABLES)}) and tars: make them two sources")
    if manifest:
        check_names(names)
    listed = load_manifest(key, manifest, files, names) if manifest else Manifest(files, names, stats_counts(key, files))
    return listed, TarReader(files, cache, listed.folder / INDEXES if listed.folder else None)


def open_sources(sources: Mapping[str, SourceConfig], cache: ShardCache) -> list[Source]:
    """The sources of a run, in the order of `data.sources`."""
    return [Source(name, config, cache) for name, config in sources.items()]


def fingerprint(sources: Sequence[Source]) -> str:
    """Digest of the samples that a run reads, wherever the shards lie."""
    rows = "\n".join(f"{source.name}\t{source.manifest.fingerprint}" for source in sources)
    return hashlib.sha256(rows.encode()).hexdigest()[:16]
