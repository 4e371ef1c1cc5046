"""Where each sample's bytes lie in a tar, so that any sample can be read without what stands before it."""

import os
import tarfile
from typing import NamedTuple


class Member(NamedTuple):
    """One file of a sample: bytes `offset` to `offset + size` of the tar."""

    offset: int
    size: int


class SampleEntry(NamedTuple):
    """A sample: its key (name up to the first dot of the base name) and its files by extension."""

    key: str
    members: dict[str, Member]


class TarIndex(NamedTuple):
    """The complete samples of a tar, in its order."""

    samples: list[SampleEntry]
    truncated: bool
    """The tar ends inside a member or a header; what stood before is in `samples`."""


def index_tar(path: str) -> TarIndex:
    """Read the headers of a tar in webdataset's layout: files of one sample follow each other and share their key.

    Raises:
        OSError: the file cannot be opened.
    """
    samples: list[SampleEntry] = []
    length = os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not samples or samples[-1].key != key:
                    samples.append(SampleEntry(key, {}))
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError("the last member is cut off")
                samples[-1].members[extension.lower()] = Member(member.offset_data, member.size)
    except tarfile.ReadError:
        # the last sample may lack the files that would have followed
        return TarIndex(samples[:-1], truncated=True)
    return TarIndex(samples, truncated=False)
