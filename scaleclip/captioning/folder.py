"""The folder of a captioning job.

OUT/manifest.json says what was asked of which model, and once all is done what was counted. OUT/texts/SHARD.parquet has a row a
sample and source, OUT/sidecar/SHARD.arrow the texts that are fit for training, as `sidecars:` of a source takes them, and
OUT/partial/SHARD.jsonl what is made of a shard so far.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from scaleclip.captioning.journal import Made
from scaleclip.data.sidecar import sidecar_path, write_rows
from scaleclip.files import sweep, writes_into
from scaleclip.shard_folder import ShardFolder, ShardOrigin, parquet_key

TEXTS, SIDECAR, PARTIAL, PROGRESS = "texts", "sidecar", "partial", "progress"
_COLUMNS = pa.schema(
    {
        "key": pa.string(), "source": pa.string(), "text": pa.string(), "reason": pa.string(), "prompt": pa.string(),
        "model": pa.string(), "seed": pa.int64(), "tokens": pa.int32(),
    }
)  # fmt: skip


class Counts(NamedTuple):
    """Of texts."""

    texts: int
    """All that were to be made."""
    fit: int
    """For training."""
    tokens: int
    reasons: dict[str, int]
    """Texts that are not fit, by reason."""


class Summary(NamedTuple):
    """What lies in a folder."""

    shards: int
    samples: int
    """Counted once no shard is left, as is what follows."""
    by_source: dict[str, Counts]
    left: int
    """Shards that other tasks of a job array have still to do."""

    @property
    def whole(self) -> Counts:
        """Of all sources."""
        return _total(self.by_source.values())


class CaptionFolder:
    """A folder of texts.

    Args:
        path: of the folder.
        sources: of texts, in order.
        identity: what all texts in it share, as JSON has it.
        made_by: what goes into every row: `prompt`, `model`, `seed`.
        batch: texts made at once, on which sampled ones depend.
    """

    def __init__(
        self, path: Path, sources: Sequence[str], identity: Mapping[str, Any], made_by: Mapping[str, Any], batch: int
    ) -> None:
        self.path, self.sources, self._made_by, self._batch = path, list(sources), dict(made_by), batch
        self._folder = ShardFolder(path, TEXTS, [SIDECAR], "texts", identity, notes_work=True)

    def begin(self, origins: Mapping[str, ShardOrigin]) -> set[str]:
        """Make the folder, or see that what it holds goes with what is asked now. Once, before anything is written.

        Returns:
            Names of the shards that are there.

        Raises:
            ConfigError: it has texts of another identity or of other shards, or other files.
        """
        return self._folder.begin(origins, {"model": self._made_by["model"]})

    def finished(self) -> set[str]:
        """Names of the shards that are there."""
        return self._folder.finished()

    def journal(self, name: str) -> Path:
        """File of what is made of a shard so far."""
        return self.path / PARTIAL / f"{name}.jsonl"

    def write(self, name: str, shard: str, keys: Sequence[str], made: Iterable[Made], origin: ShardOrigin) -> None:
        """Write a shard's files; the one that says that it is done comes last.

        Args:
            name: of its files.
            shard: its name in the manifest, by which training looks for its texts.
            keys: of all its samples.
            made: a text for each sample that the manifest counts, and source.
            origin: which shard it is.

        Raises:
            RunError: the disk is full, or cannot be written.
        """
        places = {source: place for place, source in enumerate(self.sources)}
        rows = sorted(made, key=lambda row: (row.ordinal, places[row.source]))
        fit: dict[str, list[str | None]] = {source: [None] * len(keys) for source in self.sources}
        for row in rows:
            if row.reason is None:
                fit[row.source][row.ordinal] = row.text
        texts = [pa.array(fit[source], pa.large_string()) for source in self.sources]
        columns = {
            # of a sample that could not be read the shard alone knows it
            "key": [parquet_key(row.key or _key(keys, row.ordinal)) for row in rows],
            "source": [row.source for row in rows],
            "text": [row.text for row in rows],
            "reason": [row.reason for row in rows],
            **{name: [value] * len(rows) for name, value in self._made_by.items()},
            "tokens": [row.tokens for row in rows],
        }
        counts = {source: count([row for row in rows if row.source == source])._asdict() for source in self.sources}
        with writes_into(self.path):
            write_rows(sidecar_path(self.path / SIDECAR, shard), keys, pa.RecordBatch.from_arrays(texts, names=self.sources))
            self._folder.write(name, pa.table(columns, _COLUMNS), origin, {"counts": counts, "batch": self._batch})

    def summary(self, names: Sequence[str]) -> Summary:
        """Of all shards that are there, once all of `names` are."""
        there = sorted(self.finished())
        left = len(set(names).difference(there))
        samples, found = 0, {source: list[Counts]() for source in self.sources}
        # of many tasks the last one alone reads all files
        for rows, notes in self._folder.notes([] if left else there):
            samples += rows // len(self.sources)
            for source, counted in notes["counts"].items():
                found[source].append(Counts(**counted))
        by_source = {source: _total(counted) for source, counted in found.items()}
        return Summary(len(there), samples, by_source, left)

    def complete(self, summary: Summary, shards: Mapping[str, str]) -> None:
        """A job's shards are there, and nobody writes them any more. Another job may still make others in this folder.

        Args:
            summary: of all that is there.
            shards: the job's, by name of their files, as the manifest of the data calls them.
        """
        others = 0
        for journal in (self.path / PARTIAL).glob("*.jsonl"):
            if journal.name.removesuffix(".jsonl") in shards:
                journal.unlink(missing_ok=True)
            else:
                others += 1
        with contextlib.suppress(OSError):  # not there, or another job's
            (self.path / PARTIAL).rmdir()
        sweep(sidecar_path(self.path / SIDECAR, shard) for shard in shards.values())
        by_source = {source: counts._asdict() for source, counts in summary.by_source.items()}
        counted = {"shards": summary.shards, "samples": summary.samples, **summary.whole._asdict(), "by_source": by_source}
        self._folder.complete(shards, {"model": self._made_by["model"], **counted}, is_all=not others)


def count(rows: Sequence[Made]) -> Counts:
    """Of some rows."""
    reasons = Counter(row.reason for row in rows if row.reason is not None)
    return Counts(len(rows), len(rows) - reasons.total(), sum(row.tokens for row in rows), dict(sorted(reasons.items())))


def _total(counts: Iterable[Counts]) -> Counts:
    texts = fit = tokens = 0
    reasons = Counter[str]()
    for each in counts:
        texts, fit, tokens = texts + each.texts, fit + each.fit, tokens + each.tokens
        reasons.update(each.reasons)
    return Counts(texts, fit, tokens, dict(sorted(reasons.items())))


def _key(keys: Sequence[str], ordinal: int) -> str:
    return keys[ordinal] if ordinal < len(keys) else ""
