"""The commands `scaleclip data ...`, which prepare data sets. Imports inside the commands, as in scaleclip/cli.py."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol, TypeVar

import typer

from scaleclip.errors import ConfigError, RunError

if TYPE_CHECKING:
    from scaleclip.data.cache import ShardCache

data_app = typer.Typer(no_args_is_help=True, help="Prepare data sets.")


def _local(out: Path) -> Path:
    # a Path has one slash where a URL has two
    if ":/" in str(out):
        raise ConfigError(f"--out={out}: must be a local folder: write there, then copy it to the store")
    return out


Shards = Annotated[
    list[str], typer.Argument(metavar="SHARDS...", help="Tars or index.json of MDS folders: files, globs, brace ranges, URLs.")
]
Tars = Annotated[list[str], typer.Argument(metavar="TARS...", help="Tars: files, globs, brace ranges, URLs.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes.")]
ManifestFolder = Annotated[str | None, typer.Option(help="Folder of the shards' manifest; none: their *_stats.json.")]
CacheFolder = Annotated[
    str | None, typer.Option(help="Local folder for copies of remote shards; none: data.cache.folder's default.")
]

_CPUS = os.cpu_count() or 1


class _Shard(Protocol):
    """What a command did with a shard."""

    @property
    def shard(self) -> str: ...

    @property
    def error(self) -> str: ...

    def warnings(self) -> list[str]: ...


S = TypeVar("S", bound=_Shard)


@data_app.command()
def index(
    tars: Tars,
    out: Annotated[Path, typer.Option(callback=_local, help="Local folder of the manifest.")] = Path("manifest"),
    workers: Workers = _CPUS,
    cache: CacheFolder = None,
) -> None:
    """Find every sample of tars, for data.sources.NAME.manifest. Shards that were indexed before are not read again."""
    from scaleclip.data.manifest import write_manifest
    from scaleclip.data.shards import expand_shards

    paths = expand_shards("TARS", tars)
    found = write_manifest(paths, out, _store(cache), workers)
    num_samples = sum(shard.samples for shard in _reported(found, "indexing", len(paths)))
    typer.echo(f"{out}: {num_samples:,} samples in {len(paths):,} shards; set data.sources.NAME.manifest={out}")


@data_app.command()
def subset(
    shards: Shards,
    out: Annotated[Path, typer.Option(callback=_local, help="Local folder of the subset's manifest.")],
    manifest: ManifestFolder = None,
    keep: Annotated[
        str | None, typer.Option(help="Keep these: .txt, .parquet, .jsonl or .csv of keys, or DataComp's .npy.")
    ] = None,
    drop: Annotated[str | None, typer.Option(help="Leave these out: a file of keys, or a run's quarantine.jsonl.")] = None,
    by: Annotated[str, typer.Option(help="What the files name: the key, or a field of a sample's metadata (uid).")] = "key",
    where: Annotated[
        str | None, typer.Option(help="Keep samples whose metadata meet this SQL condition: 'width >= 256'.")
    ] = None,
    workers: Workers = _CPUS,
    cache: CacheFolder = None,
) -> None:
    """Choose samples, for data.sources.NAME.manifest. No shard is rewritten.

    Metadata are img2dataset's Parquet file beside a tar where there is one, else the fields of a sample's JSON.
    """
    from scaleclip.data.subset import Choice, write_subset

    if not (keep or drop or where):
        raise ConfigError("data subset: say what to choose by: --keep, --drop or --where")
    choice = Choice(keep, drop, by, where)
    found = write_subset(shards, manifest, _store(cache), out, choice, workers)
    num_samples = num_kept = 0
    for shard in _reported(found, "choosing"):
        num_samples += shard.samples
        num_kept += len(shard.kept)
    typer.echo(f"{out}: {num_kept:,} of {num_samples:,} samples; set data.sources.NAME.manifest={out}")


@data_app.command()
def convert(
    shards: Shards,
    out: Annotated[Path, typer.Option(callback=_local, help="Local folder of the converted shards.")],
    compression: Annotated[str | None, typer.Option(help="Of MDS: zstd, zstd:7, gz ...")] = None,
    hashes: Annotated[list[str] | None, typer.Option(help="Of MDS, checked when a shard is read: sha1, xxh64 ...")] = None,
    workers: Workers = _CPUS,
    cache: CacheFolder = None,
) -> None:
    """Convert tars to an MDS folder, or MDS folders to tars. Started again, it goes on where it was."""
    from scaleclip.data.convert import to_mds, to_tar
    from scaleclip.data.shards import MDS_INDEX, expand_shards

    paths, store = expand_shards("SHARDS", shards), _store(cache)
    if all(path.endswith(MDS_INDEX) for path in paths):
        if compression or hashes:
            raise ConfigError("data convert: tars have neither --compression nor --hashes")
        found, what = to_tar(paths, out, store, workers=workers), f"{out}/*.tar"
    else:
        found = to_mds(paths, out, store, workers=workers, compression=compression, hashes=tuple(hashes or ()))
        what = f"{out}/{MDS_INDEX}"
    num_samples = sum(shard.samples for shard in _reported(found, "converting"))
    typer.echo(f"{out}: {num_samples:,} samples; set data.sources.NAME.shards='{what}'")


@data_app.command()
def sidecar(
    shards: Shards,
    table: Annotated[list[str], typer.Option(help="Files of the release: .parquet, .jsonl, .jsonl.gz.")],
    column: Annotated[list[str], typer.Option(help="Columns of texts to keep.")],
    out: Annotated[Path, typer.Option(callback=_local, help="Local folder of the sidecar.")],
    table_key: Annotated[str, typer.Option(help="Column of the release that names the sample.")] = "key",
    by: Annotated[str, typer.Option(help="What it names: the sample's key, or a field of its metadata (uid).")] = "key",
    manifest: ManifestFolder = None,
    memory_gib: Annotated[float, typer.Option(min=0.01, help="Memory to join in.")] = 8.0,
    cache: CacheFolder = None,
) -> None:
    """Join texts of a release (LaCLIP, Recap-DataComp) to samples by key, for data.sources.NAME.sidecars.

    No shard is rewritten.
    """
    from rich.progress import track

    from scaleclip.data.join import JoinedShard, write_sidecar
    from scaleclip.data.source import open_shards

    listed, reader = open_shards("SHARDS", shards, manifest, _store(cache))
    found = write_sidecar(
        listed, reader, table, out, key_column=table_key, columns=column, sample_key=by, memory_gib=memory_gib
    )  # fmt: skip
    num_samples = num_matched = num_duplicates = num_rows = num_unmatched = num_failed = 0
    for done in track(found, "joining"):
        if isinstance(done, JoinedShard):
            num_samples += done.samples
            num_matched += done.matched
            num_duplicates += done.duplicates
            num_failed += bool(done.error)
            if done.error:
                typer.echo(f"warning: {done.shard}: {done.error}", err=True)
        else:
            num_rows += done.rows
            num_unmatched += done.unmatched
    typer.echo(
        f"{out}: {num_matched:,} of {num_samples:,} samples have texts; {num_unmatched:,} of {num_rows:,} rows name no sample, "
        f"{num_duplicates:,} repeat a key; set data.sources.NAME.sidecars.{out.name}={out}"
    )
    if num_failed:
        raise RunError(f"{num_failed:,} shards could not be read and have no texts; run again once they can")
    if not num_matched:
        raise RunError(
            f"no row of the release names a sample: --table-key={table_key} must hold what --by={by} names (keys of samples "
            f"are like {reader.keys(0)[:1]}; uids want --by uid)"
        )


def _store(folder: str | None) -> "ShardCache":
    from scaleclip.config import CacheConfig
    from scaleclip.data.cache import ShardCache

    return ShardCache(CacheConfig(folder=folder) if folder else CacheConfig())


def _reported(found: Iterable[S], doing: str, total: int | None = None) -> Iterator[S]:
    """What was done, with a bar and the warnings; raises RunError at the end where a shard failed."""
    from rich.progress import track

    num_shards = num_failed = 0
    for done in track(found, doing, total=total):
        num_shards += 1
        num_failed += bool(done.error)
        for warning in done.warnings():
            typer.echo(f"warning: {done.shard}: {warning}", err=True)
        yield done
    if num_failed:
        raise RunError(
            f"{num_failed:,} of {num_shards:,} shards could not be read and count no samples; run again once they can"
        )
