"""Tables of texts, joined by key to the samples that they were made of."""

from collections.abc import Sequence
from pathlib import Path

from scaleclip.captioning.made_texts import Origin, SidecarTexts
from scaleclip.data.join import JoinedShard, write_sidecar
from scaleclip.data.manifest import Manifest
from scaleclip.data.source import Reader
from scaleclip.errors import ConfigError


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
    num_unknown = num_matched = 0
    joining = write_sidecar(
        manifest, reader, [tables], folder, key_column=key_column, columns=columns, sample_key=sample_key
    )  # fmt: skip
    for done in joining:
        if isinstance(done, JoinedShard):
            num_matched += done.matched
        else:
            num_unknown += done.unmatched
    if not num_matched:
        raise ConfigError(
            f"OUT={tables}: none of its {num_unknown:,} rows names a sample of --data: --table-key={key_column} must hold what "
            f"--by={sample_key} names (uids want --by uid)"
        )
    return SidecarTexts(folder, manifest.names, Origin(unknown_rows=num_unknown))
