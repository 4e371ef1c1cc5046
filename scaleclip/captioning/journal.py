"""What is made of a shard that is not done yet: a file of whole batches, a line each; a kill costs one batch at most."""

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from scaleclip.errors import RunError
from scaleclip.files import writes_into


class Made(NamedTuple):
    """A text that was made of a sample, or why there is none."""

    ordinal: int
    """The sample's number in its shard, of all that it holds."""
    key: str
    """The sample's."""
    source: str
    """Of the text."""
    text: str
    """As it was made; empty where there is none."""
    reason: str | None
    """Why it is not fit for training."""
    tokens: int
    """That the model made."""


class Journal:
    """The journal of a shard.

    Args:
        path: of its file.
        made_by: everything that a batch depends on; a file of something else is begun anew.

    Raises:
        RunError: another process writes it, or the disk is full.
    """

    def __init__(self, path: Path, made_by: Mapping[str, Any]) -> None:
        self._path = path
        with writes_into(path.parent):
            path.parent.mkdir(exist_ok=True)  # which a job that has finished may have removed
            self._file: IO[bytes] = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise RunError(
                f"{path} is being written by another process: of two jobs that write into one folder, each needs shards of its "
                f"own; end one of them"
            ) from None
        except OSError:
            pass  # a file system without locks
        head = _line(made_by)
        self._file.seek(0)
        content = self._file.read()
        self.batches, size = _whole(content, head)
        """Rows of each batch that was made, in the order of the batches."""
        self._file.truncate(size)
        if not size:
            self._append(head)

    def append(self, rows: Sequence[Made]) -> None:
        """Keep a batch."""
        self._append(_line(rows))
        self.batches.append(list(rows))

    def close(self) -> None:
        """Let others have it."""
        self._file.close()

    def remove(self) -> None:
        """The shard is done."""
        self._path.unlink(missing_ok=True)
        self.close()

    def _append(self, line: bytes) -> None:
        with writes_into(self._path.parent):
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())


def num_batches(path: Path, made_by: Mapping[str, Any]) -> int:
    """Batches in a journal, which need not be there."""
    with contextlib.suppress(FileNotFoundError):
        return len(_whole(path.read_bytes(), _line(made_by))[0])
    return 0


def _whole(content: bytes, head: bytes) -> tuple[list[list[Made]], int]:
    """Whole batches, and where they end; nothing of a journal of something else."""
    if not content.startswith(head):
        return [], 0
    batches, size = [], len(head)
    for line in content[size:].splitlines(keepends=True):
        try:
            rows = [Made(*row) for row in json.loads(line)]
        except (ValueError, TypeError):
            break
        if not line.endswith(b"\n"):
            break
        batches.append(rows)
        size += len(line)
    return batches, size


def _line(value: Any) -> bytes:
    # ASCII: a text's own line ends are escaped
    return json.dumps(value).encode() + b"\n"
