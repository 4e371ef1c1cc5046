"""Copies of a run's checkpoints at another place (any that fsspec knows), for the case that the run's folder is lost.

A checkpoint there has the files that it has here. `checksums.json` is the last to come and the first to go, so it marks a whole
one. A fetched file must have the checksum that it says.
"""

import contextlib
import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.callbacks import Callback

from scaleclip.checkpoint.background import begin
from scaleclip.checkpoint.folders import CHECKSUMS, first_fault, parse_checksums, partial, publish
from scaleclip.checkpoint.state import STATE, differing
from scaleclip.errors import ConfigError
from scaleclip.files import flush

T = TypeVar("T")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_FETCH_TRIES = 4
STANDSTILL_S = 120.0
"""After which a place that does not move is not waited for."""

log = logging.getLogger("scaleclip")


class Mirror:
    """Sends checkpoints to a folder or URL in a thread of its own, and fetches them from there. Rank 0 only.

    Args:
        url: the place.
        keep: newest checkpoints kept there.
        origin: the run's own, see TrainState.

    Raises:
        ConfigError: fsspec does not know such a place.
    """

    def __init__(self, url: str, keep: int, origin: Mapping[str, Any]) -> None:
        try:
            self._system, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"checkpoint.mirror={url}: {error}; name a folder, or a URL such as s3://bucket/run") from None
        self._url, self._keep, self._origin = url, keep, origin
        self.failures = 0
        """Tries to send a checkpoint that failed."""
        self.sending: Path | None = None
        """The checkpoint that must not be deleted now."""
        self._lock = threading.Lock()
        self._is_serving = False
        self._wanted: Path | None = None
        self._sent: set[tuple[str, str]] = set()
        self._moved_at = time.monotonic()

    def offer(self, path: Path) -> None:
        """Send a checkpoint as soon as the one before is sent; of several that wait, the last one offered."""
        with self._lock:
            self._wanted = path
            if not self._is_serving:
                self._is_serving = True
                self._moved_at = time.monotonic()
                begin(self._serve)

    def drain(self) -> Callable[[], bool]:
        """A function that says whether waiting for what was offered makes sense: False when it is sent, or nothing moves."""
        asked_at = time.monotonic()
        return lambda: self._is_serving and time.monotonic() - max(asked_at, self._moved_at) < STANDSTILL_S

    @property
    def missing(self) -> Path | None:
        """The newest checkpoint that was offered and is not sent."""
        return self._wanted or self.sending

    def fetch_newer(self, root: Path, than: Path | None) -> Path | None:
        """Fetch the newest checkpoint there that is whole and newer than `than`, under its name in `root`; None if none is.

        Raises:
            ConfigError: the checkpoints there are another run's.
            Exception: what fsspec raises where the place cannot be read, OSError where `root` cannot be written.
        """
        names = self._saved()
        self._check_is_this_run(names)
        for name in reversed(names):
            if than is not None and name <= than.name:
                break
            fault = self._fetch(root / name)
            if fault is None:
                log.info("%s fetched from %s", name, self._url)
                return root / name
            log.warning("%s/%s is damaged (%s): passed over", self._url, name, fault)
        return None

    def _check_is_this_run(self, names: Sequence[str]) -> None:
        for name in reversed(names):
            with contextlib.suppress(FileNotFoundError):  # a damaged one
                theirs = json.loads(self._system.cat_file(f"{self._at(name)}/{STATE}"))
                keys = differing(self._origin, theirs.get("origin", {}))
                if keys:
                    raise ConfigError(
                        f"checkpoint.mirror={self._url} holds another run's checkpoints (differing: {', '.join(keys)}): name "
                        f"another place"
                    )
                return

    def _serve(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while (path := self._next()) is not None:
            try:
                self._send(path)
                pause_s = _FIRST_PAUSE_S
            except Exception as error:
                self.failures += 1
                log.warning("%s cannot be sent to %s (%s: %s)", path, self._url, type(error).__name__, error)
                with self._lock:
                    self._wanted = self._wanted or (path if path.exists() else None)
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _next(self) -> Path | None:
        with self._lock:
            self.sending, self._wanted = self._wanted, None
            self._is_serving = self.sending is not None
            return self.sending

    def _send(self, path: Path) -> None:
        content, there = (path / CHECKSUMS).read_bytes(), self._at(path.name)
        known = self._checksums(path.name)
        if known == content:
            return
        if known is not None:  # another checkpoint of the same step
            self._system.rm_file(f"{there}/{CHECKSUMS}")
        if not self._system.async_impl:  # stores, which fsspec reads asynchronously, have no folders
            self._system.makedirs(there, exist_ok=True)
        for name, digest in parse_checksums(content).items():
            # not again after a failure in the middle
            if (f"{there}/{name}", digest) not in self._sent:
                self._system.put_file(str(path / name), f"{there}/{name}", callback=_Watch(self._moved))
                self._sent.add((f"{there}/{name}", digest))
                self._moved()
        self._system.pipe_file(f"{there}/{CHECKSUMS}", content)
        self._sent.clear()
        log.info("%s sent to %s", path.name, self._url)
        self._retain(path.name)

    def _retain(self, newest: str) -> None:
        older = [name for name in self._saved() if name < newest]
        whole = [name for name in older if self._checksums(name) is not None]
        kept = whole[max(len(whole) - self._keep + 1, 0) :]
        for name in older:
            if name not in kept:
                if name in whole:
                    self._system.rm_file(f"{self._at(name)}/{CHECKSUMS}")
                self._system.rm(self._at(name), recursive=True)
                self._moved()

    def _fetch(self, path: Path) -> str | None:
        """What is wrong with a checkpoint there; None if it is here now."""
        content = self._checksums(path.name)
        if content is None:
            return f"it has no {CHECKSUMS}"
        folder = partial(path)
        folder.mkdir(parents=True)
        try:
            digests = parse_checksums(content)
            for name in digests:
                self._get(f"{self._at(path.name)}/{name}", folder / name)
            fault = first_fault(folder, digests)
            if fault is None:
                publish(path, digests)
            return fault
        except (FileNotFoundError, ValueError) as error:
            return str(error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _get(self, there: str, here: Path) -> None:
        _persist(lambda: self._system.get_file(there, str(here)))
        flush(here)

    def _saved(self) -> list[str]:
        """Names of the checkpoints there, oldest first, those that are not whole included."""
        self._system.invalidate_cache()
        try:
            entries = _persist(lambda: self._system.ls(self._root, detail=False))
        except FileNotFoundError:
            return []
        names = [entry.rstrip("/").rpartition("/")[2] for entry in entries]
        return sorted(name for name in names if re.fullmatch(r"step_\d+", name))

    def _checksums(self, name: str) -> bytes | None:
        try:
            content: bytes = _persist(lambda: self._system.cat_file(f"{self._at(name)}/{CHECKSUMS}"))
        except FileNotFoundError:
            return None
        return content

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _moved(self) -> None:
        self._moved_at = time.monotonic()


class _Watch(Callback):  # type: ignore[misc]
    """Says that a transfer moves."""

    def __init__(self, moved: Callable[[], None]) -> None:
        super().__init__()
        self._moved = moved

    def call(self, hook_name: str | None = None, **kwargs: Any) -> None:
        self._moved()


def _persist(read: Callable[[], T]) -> T:
    """Try some times to read; what is not there is not waited for."""
    pause_s = _FIRST_PAUSE_S
    for _ in range(_FETCH_TRIES - 1):
        try:
            return read()
        except FileNotFoundError:
            raise
        except Exception as error:
            log.warning("trying again in %g s: %s: %s", pause_s, type(error).__name__, error)
        time.sleep(pause_s)
        pause_s *= 2
    return read()
