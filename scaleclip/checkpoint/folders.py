"""The folders of a run's checkpoints: written under a temporary name, checksummed, renamed, found again.

checkpoints/step_00010000/ holds a file a rank (rank_file.py), `scalars.safetensors`, `state.json` (TrainState) and, written
last, `checksums.json` (SHA-256 of the others); `latest` beside it names the newest, for people. A folder under its final name
is whole, and one that is damaged later is noticed and passed over.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from scaleclip.checkpoint.state import STATE
from scaleclip.errors import ConfigError
from scaleclip.files import flush, write_atomic

CHECKSUMS = "checksums.json"
_PARTIAL = ".partial-"

log = logging.getLogger("scaleclip")


def checkpoints(folder: Path) -> Path:
    """Where a run's checkpoints lie."""
    return folder / "checkpoints"


def saved(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first, damaged ones included."""
    return sorted(checkpoints(folder).glob("step_*"))


def newest(folder: Path) -> Path | None:
    """The newest of a run's checkpoints whose checksums hold."""
    return next((path for path in reversed(saved(folder)) if damage(path) is None), None)


def newest_whole(run: Path) -> Path:
    """A run's newest whole checkpoint. Raises ConfigError where there is none."""
    path = newest(run)
    if path is None and (found := saved(run)):
        raise ConfigError(f"{run}: all checkpoints are damaged, the newest one by this: {damage(found[-1])}")
    if path is None:
        raise ConfigError(f"{run} has no checkpoint to evaluate: train first")
    return path


def step_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def partial(path: Path) -> Path:
    """Where a checkpoint lies until it is whole."""
    return path.with_name(f"{_PARTIAL}{path.name}")


def write_durable(path: Path, blocks: Iterable[bytes | memoryview]) -> str:
    """Write a file, down to the disk; the SHA-256 of its content."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for block in blocks:
            file.write(block)
            digest.update(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def publish(path: Path, digests: Mapping[str, str]) -> None:
    """Give a checkpoint whose files lie in `partial(path)` its checksums and its final name.

    Raises:
        OSError: it cannot be written.
    """
    write_durable(partial(path) / CHECKSUMS, [json.dumps(dict(digests), indent=2).encode()])
    flush(partial(path))
    if path.exists():  # one that was damaged, or that a roll-back left behind
        remove(path)
    os.rename(partial(path), path)
    flush(path.parent)
    write_atomic(path.parent / "latest", path.name)


def retain(path: Path, keep: int, spared: Path | None) -> None:
    """Delete checkpoints older than `path` but the newest `keep` - 1 of them, and but `spared`."""
    older = sorted(other for other in path.parent.glob("step_*") if other.name < path.name)
    for old in older[: max(len(older) - keep + 1, 0)]:
        if old != spared:
            remove(old)


def remove(path: Path) -> None:
    """Delete a checkpoint; under its final name it is whole up to the last moment. What stays behind is a warning."""
    doomed = path.with_name(f"{_PARTIAL}removed-{path.name}")
    try:
        os.rename(path, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        log.warning("%s cannot be deleted: %s", path, error)


def remove_partial(folder: Path) -> None:
    """Delete what saves, fetches and deletions that were cut short left behind."""
    for path in checkpoints(folder).glob(f"{_PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)


def identity(path: Path) -> str:
    """A digest of a checkpoint's checksums: another one of the same step has another. Raises OSError where it is not there."""
    return hashlib.sha256((path / CHECKSUMS).read_bytes()).hexdigest()[:16]


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if their checksums hold."""
    try:
        return first_fault(path, read_checksums(path))
    except (OSError, ValueError) as error:
        return str(error)


def first_fault(path: Path, digests: Mapping[str, str]) -> str | None:
    """What is wrong with these files of a checkpoint."""
    for name, expected in digests.items():
        try:
            with (path / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return str(error)
        if found != expected:
            return f"{name} has changed"
    return None


def read_checksums(path: Path) -> dict[str, str]:
    """The SHA-256 of a checkpoint's files by name.

    Raises:
        OSError, ValueError: there are none, or they are damaged.
    """
    return parse_checksums((path / CHECKSUMS).read_bytes())


def parse_checksums(content: bytes) -> dict[str, str]:
    """The content of a checksums.json.

    Raises:
        ValueError: it is damaged.
    """
    digests = json.loads(content)
    if not isinstance(digests, dict) or STATE not in digests or any(Path(name).name != name for name in digests):
        raise ValueError(f"{CHECKSUMS} is none")
    return {name: str(digest) for name, digest in digests.items()}
