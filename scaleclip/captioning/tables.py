"""Tables of texts, joined by key to the samples that they were made of."""

from collections.abc import Sequence
from pathlib import Path

from scaleclip.captioning.made_texts import Origin, SidecarTexts, job_of
from scaleclip.captioning.plural import number_of
from scaleclip.data.join import JoinedShard, write_sidecar
from scaleclip.data.manifest import Manifest
from scaleclip.data.shards import expand_shards, is_remote
from scaleclip.data.source import Reader
from scaleclip.errors import ConfigError


def refuse_job(tables: str) -> None:
    """Raise ConfigError where tables are those of a captions job, which have a row a sample and source, fit or not."""
    for folder in dict.fromkeys(Path(file).parent for file in expand_shards("OUT", [tables]) if not is_remote(file)):
        if job := job_of(folder):
            raise ConfigError(
                f"OUT={tables}: these are files of a captions job, with several rows of one key, and texts that are not fit: "
                f"give the job's folder, OUT={job}, without --text"
            )


def join_tables(
    manifest: Manifest,
    reader: Reader,
    tables: str,
    columns: Sequence[str],
    folder: Path,
    *,
    key_column: str,
    sample_key: str,
) -> SidecarTexts:
    """The columns as made texts, a source each.

    Args:
        manifest: the samples' shards.
        reader: reads them.
        tables: `.parquet`, `.jsonl`, also compressed; a glob, a brace range, a URL.
        columns: of texts.
        folder: for the texts in the samples' order, as long as they are read.
        key_column: column of the tables that names the sample.
        sample_key: what it names: `key`, or a field of the sample's metadata.

    Raises:
        ConfigError: there is no table, or none with these columns, or no row of one is of a sample.
        RunError: a table is damaged.
    """
    num_rows = num_unknown = num_matched = num_repeated = 0
    joining = write_sidecar(
        manifest, reader, [tables], folder, key_column=key_column, columns=columns, sample_key=sample_key
    )  # fmt: skip
    for done in joining:
        if isinstance(done, JoinedShard):
            num_matched += done.matched
            num_repeated += done.duplicates
        else:
            num_rows += done.rows
            num_unknown += done.unmatched
    if not num_matched:
        raise ConfigError(
            f"OUT={tables}: none of its {number_of(num_unknown, 'row')} names a sample of --data: --table-key={key_column} "
            f"must hold what --by={sample_key} names (uids want --by uid)"
        )
    # a row goes to every sample of its key
    num_shared = num_matched + num_repeated - (num_rows - num_unknown)
    origin = Origin(unknown_rows=num_unknown, repeated_rows=num_repeated, shared_rows=num_shared)
    return SidecarTexts(folder, manifest.names, origin)
