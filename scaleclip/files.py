"""Files that a crash leaves whole, and where a configuration's paths lie."""

import importlib.resources
import os
from pathlib import Path

from scaleclip.errors import ConfigError

PACKAGE_SCHEME = "package:"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a start after a crash, sees the old content or the new one, whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
