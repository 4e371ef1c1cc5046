"""Files that a crash leaves whole."""

import os
from pathlib import Path


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader, or a start after a crash, sees the old text or the new one, whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
