"""Where each sample's bytes lie in a tar, so that any sample can be read without what stands before it."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Member(NamedTuple):
    """One file of a sample: bytes `offset` to `offset + size` of the tar."""

    offset: int
    size: int


@dataclass(frozen=True)
class TarIndex:
    """The complete samples of a tar, in its order, in about 50 bytes each."""

    keys: NDArray[np.bytes_]
    """[S] key of each sample: the path up to the first dot of the base name."""
    first_S1: NDArray[np.int32]
    """[S + 1] number of each sample's first file, and the number of files."""
    extension_F: NDArray[np.uint8]
    """[F] number of each file's extension."""
    offset_F: NDArray[np.int64]
    """[F] where each file's bytes begin."""
    size_F: NDArray[np.int64]
    """[F] how many they are."""
    extensions: tuple[str, ...]
    """Extensions by number."""
    truncated: bool
    """The tar ends without its end mark; what stood whole before is here."""

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, sample: int) -> str:
        """Key of a sample."""
        return str(self.keys[sample].decode())

    def members(self, sample: int) -> dict[str, Member]:
        """A sample's files by extension, lower case without the leading dot."""
        files = range(self.first_S1[sample], self.first_S1[sample + 1])
        return {self.extensions[self.extension_F[f]]: Member(int(self.offset_F[f]), int(self.size_F[f])) for f in files}


def index_tar(path: str) -> TarIndex:
    """Read the headers of a tar in webdataset's layout: files of one sample follow each other and share their key.

    Raises:
        OSError: the file cannot be read.
    """
    keys: list[str] = []
    first: list[int] = []
    files: list[tuple[int, int, int]] = []
    extensions: dict[str, int] = {}
    whole = False
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for key, extension, member in _files(tar):
                if not keys or keys[-1] != key:
                    keys.append(key)
                    first.append(len(files))
                files.append((extensions.setdefault(extension, len(extensions)), member.offset, member.size))
            # tarfile takes a cut or broken header for the end; the real end is marked by zeros
            file.seek(tar.offset)
            whole = file.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE
    except tarfile.ReadError:
        whole = False
    if not whole and keys:
        # the last sample is cut off, or may lack files that would have followed
        keys.pop()
        del files[first.pop() :]
    columns = np.array(files, dtype=np.int64).reshape(-1, 3)
    return TarIndex(
        keys=np.array([key.encode() for key in keys], dtype=np.bytes_),
        first_S1=np.array([*first, len(files)], dtype=np.int32),
        extension_F=columns[:, 0].astype(np.uint8),
        offset_F=columns[:, 1].copy(),
        size_F=columns[:, 2].copy(),
        extensions=tuple(extensions),
        truncated=not whole,
    )


def _files(tar: tarfile.TarFile) -> Iterator[tuple[str, str, Member]]:
    """(key, extension, where) of every regular file."""
    for member in tar:
        if member.isreg():
            folder, slash, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            yield folder + slash + stem, extension.lower(), Member(member.offset_data, member.size)
