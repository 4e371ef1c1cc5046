"""The folder of a captioning job.

OUT/manifest.json says what was asked of which model, and once all is done what was counted. OUT/texts/SHARD.parquet has a row a
sample and source, OUT/sidecar/SHARD.arrow the texts that are fit for training, as `sidecars:` of a source takes them, and
OUT/partial/SHARD.jsonl what is made of a shard so far.
"""

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from scaleclip.captioning.journal import Made
from scaleclip.data.sidecar import sidecar_path, write_rows
from scaleclip.errors import RunError
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
        self.path, self._sources, self._made_by, self._batch = path, list(sources), dict(made_by), batch
        self._folder = ShardFolder(path, TEXTS, [SIDECAR, PARTIAL, PROGRESS], "texts", identity)

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

    def is_finished(self, name: str) -> bool:
        """Whether a shard is there."""
        return self._folder.file(name).exists()

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
        places = {source: place for place, source in enumerate(self._sources)}
        rows = sorted(made, key=lambda row: (row.ordinal, places[row.source]))
        fit: dict[str, list[str | None]] = {source: [None] * len(keys) for source in self._sources}
        for row in rows:
            if row.reason is None:
                fit[row.source][row.ordinal] = row.text
        texts = [pa.array(fit[source], pa.large_string()) for source in self._sources]
        columns = {
            "key": [parquet_key(row.key) for row in rows],
            "source": [row.source for row in rows],
            "text": [row.text for row in rows],
            "reason": [row.reason for row in rows],
            **{name: [value] * len(rows) for name, value in self._made_by.items()},
            "tokens": [row.tokens for row in rows],
        }
        counts = {source: count([row for row in rows if row.source == source])._asdict() for source in self._sources}
        try:
            write_rows(sidecar_path(self.path / SIDECAR, shard), keys, pa.RecordBatch.from_arrays(texts, names=self._sources))
            self._folder.write(name, pa.table(columns, _COLUMNS), origin, {"counts": counts, "batch": self._batch})
        except OSError as fault:
            raise RunError(
                f"{self.path} cannot be written: {fault.strerror}; what is written is safe: free the disk and start the same "
                f"command again"
            ) from fault

    def summary(self, names: Sequence[str]) -> Summary:
        """Of the shards that are there among all."""
        there = [name for name in names if self.is_finished(name)]
        samples, found = 0, {source: list[Counts]() for source in self._sources}
        for name in there:
            rows, notes = self._folder.notes(name)
            samples += rows // len(self._sources)
            for source, counted in notes["counts"].items():
                found[source].append(Counts(**counted))
        by_source = {source: _total(counted) for source, counted in found.items()}
        return Summary(len(there), samples, by_source, len(names) - len(there))

    def complete(self, summary: Summary) -> None:
        """All shards are there, and nobody writes any more."""
        for folder in (PARTIAL, PROGRESS):
            shutil.rmtree(self.path / folder, ignore_errors=True)
        by_source = {source: counts._asdict() for source, counts in summary.by_source.items()}
        counted = {"shards": summary.shards, "samples": summary.samples, **summary.whole._asdict(), "by_source": by_source}
        self._folder.complete({"model": self._made_by["model"], **counted})


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
