"""The members of a tar from its bytes, at a few microseconds each; tarfile, at 20 or more, reads the headers that are rare.

webdataset's and img2dataset's writers give every file a pax header with its fractional time of modification, which says
nothing about names or sizes and is skipped.
"""

import io
import mmap
import re
import struct
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
_END = bytes(BLOCK)
# name, size, checksum, type, magic, prefix (POSIX.1-1988 ustar)
_HEADER = struct.Struct("100s24x12s12x8s1s100x6s82x155s12x")
_NUL, _FILL = b"\0", b" \0"
_USTAR = (b"ustar\0", b"ustar ")
_USUAL = (b"0", b"x", b"\0", b"5")  # files, pax headers, folders
_REGULAR = (b"0", b"\0")
_PAX = b"x"
_NAMES_OR_SIZES = re.compile(rb"path=|size=|GNU\.sparse")


class Member(NamedTuple):
    """A regular file."""

    name: str
    offset: int
    """Where its bytes begin."""
    size: int
    end: int
    """Where the next header begins."""


class TarDamage(ValueError):
    """A header that is none, or that is cut off."""


def walk(data: memoryview | mmap.mmap | bytes, start: int = 0, *, whole: bool = False) -> Iterator[Member]:
    """The regular files from the header at `start` to the end mark or the end of `data`.

    Args:
        data: some entries of a tar.
        start: where a header begins.
        whole: `data` is the rest of the tar: every header's checksum is checked and the end mark must be there. Otherwise
            only headers without ustar's magic are checked.

    Raises:
        TarDamage: a header is broken or cut off, or the end mark is missing.
    """
    at, last, unpack = start, len(data) - BLOCK, _HEADER.unpack_from
    while at <= last:
        name, size, checksum, kind, magic, prefix = unpack(data, at)
        if not name[0] and data[at : at + BLOCK] == _END:
            return
        if whole or magic not in _USTAR:
            _check(bytes(data[at : at + BLOCK]), checksum, at)
        begin = at + BLOCK
        if size[0] >= 0x80 or kind not in _USUAL:
            member, at = _by_library(data, at)
            if member:
                yield member
            continue
        try:
            num_bytes = int(size.rstrip(_FILL) or b"0", 8)
        except ValueError:
            raise TarDamage(f"no size in the header at byte {at}") from None
        after = begin + (num_bytes + BLOCK - 1 & -BLOCK)
        if kind == _PAX:
            if _NAMES_OR_SIZES.search(data, begin, begin + num_bytes):
                member, at = _by_library(data, at)
                if member:
                    yield member
                continue
        elif kind in _REGULAR:
            path = name[: name.find(_NUL)] if _NUL in name else name
            if prefix[0] and magic == b"ustar\0":
                path = prefix.partition(_NUL)[0] + b"/" + path
            yield Member(path.decode("utf-8", "surrogateescape"), begin, num_bytes, after)
        at = after
    if whole or at < len(data):
        raise TarDamage(f"the tar is cut off at byte {at}")


def split_name(name: str) -> tuple[str, str]:
    """(key, extension): webdataset's rule, the path up to the first dot of the base name, and what follows in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _check(header: bytes, checksum: bytes, at: int) -> None:
    try:
        said = int(checksum.strip(b" \0") or b"0", 8)
    except ValueError:
        said = -1
    # the checksum's own field counts as spaces
    if said != sum(header) - sum(checksum) + 8 * ord(" "):
        raise TarDamage(f"the bytes at {at} are no header")


def _by_library(data: memoryview | mmap.mmap | bytes, at: int) -> tuple[Member | None, int]:
    """The entry at `at`, which may take several headers (long names), and where the next begins."""
    file, base = (data, 0) if isinstance(data, mmap.mmap) else (io.BytesIO(data[at:]), at)
    file.seek(at - base)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            entry = tar.firstmember  # type: ignore[attr-defined]
    except (tarfile.TarError, OSError) as error:
        raise TarDamage(f"the bytes at {at} are no header: {error}") from None
    if entry is None:
        raise TarDamage(f"the bytes at {at} are no header")
    begin = base + entry.offset_data
    size = entry.size if entry.isreg() else 0
    after = begin + (size + BLOCK - 1) // BLOCK * BLOCK
    return Member(entry.name, begin, size, after) if entry.isreg() else None, after
