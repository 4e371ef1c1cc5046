"""Files that a crash leaves whole, and where a configuration's paths lie."""

import contextlib
import importlib.resources
import os
import shutil
import socket
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from scaleclip.errors import ConfigError, RunError

PACKAGE_SCHEME = "package:"
_REPLACED = ".partial-replaced-"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a start after a crash, sees the old content or the new one, whole."""
    # processes of two nodes may have one number
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def writes_into(folder: Path) -> Iterator[None]:
    """Of files each of which is whole or not there. Raises RunError where the disk is full, or cannot be written."""
    try:
        yield
    except OSError as fault:
        raise RunError(
            f"{folder} cannot be written: {fault.strerror}; what is written is safe: free the disk and start the same command "
            f"again"
        ) from fault


def sweep(paths: Iterable[Path]) -> None:
    """Remove what writes of these files left that were killed. Of files that nobody writes any more."""
    beginnings = defaultdict[Path, list[str]](list)
    for path in paths:
        beginnings[path.parent].append(f".{path.name}.")
    for folder, some in beginnings.items():
        for partial in folder.glob(".*"):
            if partial.name.startswith(tuple(some)):
                partial.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Bring a file or a folder's entries down to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def publish_folder(written: Path, path: Path) -> None:
    """Give a folder that is whole its final name, in place of what has it, down to the disk.

    No system call swaps two folders everywhere, so the old one lies beside for a moment: it comes back where the new one cannot
    be renamed, and by `restore_folder` where a crash fell into that moment.

    Args:
        written: beside `path`, with all its files.
        path: the final name.

    Raises:
        OSError: it cannot be written or renamed; at `path` is what was there before.
    """
    for each in [*written.rglob("*"), written]:
        flush(each)
    old = _replaced(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    try:
        os.rename(written, path)
    except BaseException:  # a signal too
        restore_folder(path)
        raise
    flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(path: Path) -> None:
    """Bring back the folder that `publish_folder` was replacing when it was cut short; without effect where `path` is there."""
    if not path.exists() and _replaced(path).exists():
        os.rename(_replaced(path), path)


def _replaced(path: Path) -> Path:
    return path.with_name(f"{_REPLACED}{path.name}")


def resolve_path(path: str) -> str:
    """A path or pattern of a configuration on this machine: `package:x/y` lies in the installed package x. URLs stay."""
    if "://" in path:
        return path
    if not path.startswith(PACKAGE_SCHEME):
        return str(Path(path).expanduser())
    package, _, rest = path.removeprefix(PACKAGE_SCHEME).partition("/")
    try:
        return str(importlib.resources.files(package).joinpath(rest))
    except ModuleNotFoundError:
        raise ConfigError(f"{path}: there is no installed package {package!r}") from None
