"""How far all ranks of all tasks of a job are: each leaves a small file in its folder, and one sums them up."""

import contextlib
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scaleclip.captioning.folder import PROGRESS, CaptionFolder, count
from scaleclip.captioning.journal import Made
from scaleclip.files import write_atomic

_LOOK_S = 10.0  # between words to the others, and looks at theirs
_FIRST_LOOK_S, _FIRST_S = 1.0, 60.0  # between them while a start is young, when somebody looks at the bar
_SILENT_S = 120.0  # after which a rank is taken for one that has ended


class News(NamedTuple):
    """Of all ranks."""

    done: int
    """Texts, fit or not."""
    total: int
    texts_per_s: float
    """Of the ranks that work now."""
    tokens_per_s: float
    failures: dict[str, int]
    """Texts that are not fit, by reason, of the starts that last said something."""

    def said(self) -> str:
        """In a few words, without the number of texts."""
        causes = ", ".join(f"{reason} {number:,}" for reason, number in self.failures.items())
        return f"{self.tokens_per_s:,.0f} tokens/s" + f", not fit: {causes}" * bool(causes)


Show = Callable[[News], None]


class Progress:
    """What this rank has done in this start, and what it knows of the others.

    Args:
        folder: of the job.
        share: (number, count) of this rank among those of all tasks.
        texts: of each shard, by the name of its file.
        show: is told how far all are; None: this rank only says how far it is itself.
    """

    def __init__(self, folder: CaptionFolder, share: tuple[int, int], texts: Mapping[str, int], show: Show | None) -> None:
        self._folder, self._texts, self._show = folder, texts, show
        number, count = share
        self._files = folder.path / PROGRESS
        # another job may fill the folder with the texts of other shards
        self._job = hashlib.sha256("\n".join(texts).encode(errors="surrogatepass")).hexdigest()[:8]
        self._count = f"of-{count:05d}.json"
        self._own = self._files / f"{self._job}-{number:05d}-{self._count}"
        self._begun_s = time.monotonic()
        self._looked_s = float("-inf")
        self._made = self._tokens = self._open = 0
        self._failures = Counter[str]()

    def begin_shard(self, already: Sequence[Made]) -> None:
        """A shard is taken up, of which some texts are there from an earlier start."""
        self._open = len(already)

    def add(self, rows: Sequence[Made]) -> None:
        """A batch is kept."""
        counted = count(rows)
        self._made += counted.texts
        self._open += counted.texts
        self._tokens += counted.tokens
        self._failures.update(counted.reasons)
        now_s = time.monotonic()
        if now_s - self._looked_s > (_FIRST_LOOK_S if now_s - self._begun_s < _FIRST_S else _LOOK_S):
            self.tell()

    def end_shard(self) -> None:
        """It is written, and will be seen by its file, or cannot be had."""
        self._open = 0

    def tell(self) -> None:
        """Say how far this rank is, and look how far all are."""
        self._looked_s = time.monotonic()
        passed_s = max(self._looked_s - self._begun_s, 1e-9)
        own = {
            "open": self._open, "texts_per_s": self._made / passed_s, "tokens_per_s": self._tokens / passed_s,
            "failures": self._failures, "time": time.time(),
        }  # fmt: skip
        # a full disk, and another task that saw that all is done, are no reason to stop for
        with contextlib.suppress(OSError):
            self._files.mkdir(exist_ok=True)
            write_atomic(self._own, json.dumps(own))
        if self._show is not None:
            self._show(self._look())

    def end(self) -> None:
        """All tasks of the job are done: leave nothing of what they said."""
        for file in (*self._files.glob(f"{self._job}-*"), *self._files.glob(f".{self._job}-*")):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another job's
            self._files.rmdir()

    def _look(self) -> News:
        done = sum(self._texts.get(name, 0) for name in self._folder.finished())
        texts_per_s = tokens_per_s = 0.0
        failures = Counter[str]()
        for said in map(_read, self._files.glob(f"{self._job}-*-{self._count}")):
            if said is None:
                continue
            failures.update(said["failures"])
            if time.time() - said["time"] < _SILENT_S:
                done += said["open"]
                texts_per_s += said["texts_per_s"]
                tokens_per_s += said["tokens_per_s"]
        total = sum(self._texts.values())
        return News(min(done, total), total, texts_per_s, tokens_per_s, dict(sorted(failures.items())))


def _read(file: Path) -> dict[str, Any] | None:
    """None where it has just been removed."""
    with contextlib.suppress(FileNotFoundError):
        said: dict[str, Any] = json.loads(file.read_text())
        return said
    return None
