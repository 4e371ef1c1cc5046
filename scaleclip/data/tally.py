"""What the batches between two log steps said: samples that could not be used, where texts came from, what the loader did."""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaleclip.data.loader import Batch
from scaleclip.data.sample import Fault

QUARANTINE = "quarantine.jsonl"
"""In a run's folder: samples that could not be used."""
_MOST_QUARANTINED = 100_000
_WORST = 3


@dataclass
class Tally:
    """Of one rank, or of all since it was merged."""

    faults: list[Fault] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """Valid samples by source and texts by view, as in Batch."""
    cache: Counter[str] = field(default_factory=Counter)
    """What the processes did in the cache of remote shards, as ShardCache.take_counts has it."""
    stage_s: dict[str, float] = field(default_factory=dict)
    """Seconds of the loader processes by stage; `hand-over` is the training process's, from ready to received."""
    lost_workers: int = 0
    """Times that loader processes died and were replaced."""
    wait_s: float = 0.0
    """Seconds that training waited for batches, the sum over ranks."""

    def add(self, batch: Batch, asked_s: float, received_s: float) -> None:
        """A batch that the training process asked for and received at these times of time.monotonic()."""
        self.faults += batch.faults
        self.counts.update(batch.counts)
        self.cache.update(batch.cache)
        self.wait_s += received_s - asked_s
        handing_s = received_s - max(asked_s, min(batch.ready_s, received_s))
        _add(self.stage_s, {**batch.stage_s, "hand-over": handing_s})

    def shares(self) -> dict[str, float]:
        """Share of the loader's time by stage."""
        total = sum(self.stage_s.values())
        return {stage: seconds / total for stage, seconds in self.stage_s.items()} if total else {}

    def mix(self) -> dict[str, float]:
        """Realised share of each source, and of each text in its view."""
        totals = Counter[str]()
        for name, count in self.counts.items():
            totals[name.rpartition("/")[0]] += count
        return {name: count / totals[name.rpartition("/")[0]] for name, count in sorted(self.counts.items())}


class Intake(Iterator[Batch]):
    """What the training loop takes from the loader, and what it was told with it."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self._tally, self._keys = Tally(), list[str]()

    def __next__(self) -> Batch:
        asked_s = time.monotonic()
        batch = next(self._batches)
        self._tally.add(batch, asked_s, time.monotonic())
        self._keys += batch.keys + batch.pairs_keys
        return batch

    def take_tally(self) -> Tally:
        """Of the batches since this was asked."""
        tally, self._tally = self._tally, Tally()
        return tally

    def take_keys(self) -> list[str]:
        """Of the samples since this was asked."""
        keys, self._keys = self._keys, []
        return keys


def merge(tallies: Iterable[Tally]) -> Tally:
    """The tally of all ranks."""
    whole = Tally()
    for tally in tallies:
        whole.faults += tally.faults
        whole.counts.update(tally.counts)
        whole.cache.update(tally.cache)
        _add(whole.stage_s, tally.stage_s)
        whole.lost_workers += tally.lost_workers
        whole.wait_s += tally.wait_s
    return whole


def read_quarantine(path: Path) -> list[dict[str, Any]]:
    """Rows of a quarantine.jsonl, without one that a crash cut off."""
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def _add(sums: dict[str, float], values: Mapping[str, float]) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value


class Quarantine:
    """Samples that could not be used since this start: quarantine.jsonl in the run's folder, and the worst shards.

    Every rank keeps the counts, so that all stop alike; rank 0 gives a folder and writes.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = folder / QUARANTINE if folder else None
        self.last = ""
        """What was wrong with the sample that was added last."""
        self._by_shard: Counter[tuple[str, str]] = Counter()
        self._seen: set[tuple[str, str, int]] = set()
        if self._path and self._path.exists():
            rows = read_quarantine(self._path)
            self._seen = {(row["source"], row["shard"], row["sample"]) for row in rows}
            if not self._path.read_bytes().endswith(b"\n"):
                with self._path.open("a") as file:
                    file.write("\n")  # a line that a crash cut off

    def add(self, faults: Iterable[Fault]) -> None:
        """Count faults and write those of samples that are new, up to 100,000 of them."""
        lines = []
        for fault in faults:
            self.last = f"{fault.cause}: {fault.detail}"
            self._by_shard[fault.source, fault.shard] += 1
            place = (fault.source, fault.shard, fault.sample)
            if self._path and place not in self._seen and len(self._seen) < _MOST_QUARANTINED:
                self._seen.add(place)
                lines.append(json.dumps(fault._asdict()) + "\n")
        if lines and self._path:
            with self._path.open("a") as file:
                file.writelines(lines)

    def worst(self) -> str:
        """The shards with the most bad samples, for people."""
        return ", ".join(f"{shard} ({source}): {count:,}" for (source, shard), count in self._by_shard.most_common(_WORST))
