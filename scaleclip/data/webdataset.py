"""Random access to samples in tars of webdataset's layout, as img2dataset writes them (.jpg/.png/.webp, .txt, .json)."""

import json
import os
from functools import lru_cache
from typing import Any, NamedTuple

from scaleclip.data.index import Member, TarIndex, index_tar
from scaleclip.data.manifest import Manifest

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# A rank's batches go round all its streams' shards, so both must hold what a rank has open at once.
_INDEXED_SHARDS = 2048
_OPEN_FILES = 256


class SampleError(Exception):
    """A sample that cannot be used; `cause` is the name under which it is counted."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause = cause


class Sample(NamedTuple):
    """A sample as it lies in the shard."""

    key: str
    image: bytes
    """The encoded image."""
    texts: dict[str, str]
    """`caption` (the .txt member) and the named texts of the .json member's `captions`."""
    fields: dict[str, Any]
    """The .json member; empty without one."""


class TarReader:
    """Reads sample `index` of shard `shard`. Keeps offsets and files of the shards it touched last, and no other state."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._index = lru_cache(maxsize=_INDEXED_SHARDS)(_index)
        self._open = lru_cache(maxsize=_OPEN_FILES)(_File)

    def __call__(self, shard: int, index: int) -> Sample:
        """Raises SampleError when the sample cannot be had."""
        path = self._manifest.shards[shard]
        entries = self._index(path)
        if index >= len(entries):
            cause = "truncated_shard" if entries.truncated else "missing_sample"
            said = self._manifest.counts[shard]
            raise SampleError(cause, f"{path} holds {len(entries)} samples, the manifest says {said}")
        key = entries.key(index)
        files = self._open(path).read(entries.members(index))
        image = next((files[extension] for extension in IMAGE_EXTENSIONS if extension in files), None)
        if image is None:
            raise SampleError("no_image", f"{key} in {path} has {', '.join(files)}")
        fields = _json_object(files["json"]) if "json" in files else {}
        texts = {name: _text(text) for name, text in (fields.get("captions") or {}).items() if text is not None}
        if "txt" in files:
            texts["caption"] = files["txt"].decode("utf-8", errors="replace")
        return Sample(key, image, texts, fields)


def _index(path: str) -> TarIndex:
    try:
        return index_tar(path)
    except OSError as error:
        raise SampleError("unreadable_shard", f"{path}: {error.strerror}") from error


class _File:
    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise SampleError("unreadable_shard", f"{path}: {error.strerror}") from error

    def read(self, members: dict[str, Member]) -> dict[str, bytes]:
        """A sample's files by extension; they lie together, so one read fetches all."""
        start = min(member.offset for member in members.values())
        stop = max(member.offset + member.size for member in members.values())
        try:
            span = os.pread(self._file, stop - start, start)
        except OSError as error:
            raise SampleError("unreadable_shard", f"{self._path}: {error.strerror}") from error
        return {name: span[at - start : at - start + size] for name, (at, size) in members.items()}

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)


def _json_object(text: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise SampleError("bad_json", "the .json member is not JSON") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("captions") or {}, dict):
        raise SampleError("bad_json", "the .json member is no object, or its `captions` is none")
    return fields


def _text(text: Any) -> str:
    if not isinstance(text, str):
        raise SampleError("bad_json", f"a caption is a {type(text).__name__}, not a string")
    # JSON can escape half a surrogate pair, which no tokenizer takes
    return text.encode("utf-8", errors="replace").decode()
