"""Random access to samples in MosaicML's MDS shards; mosaicml-streaming supplies encodings, decompression, hashes, the writer.

Its StreamingDataset is not used: the order is ours (data/order.py), and nothing lies in shared memory, so a killed run leaves
none behind. Its reader opens the shard anew at every sample, at four times the cost of reading from one kept open.

A member is a column: text, encoded images and JSON as they are stored, numbers as digits, arrays as JSON, raw images as PNG.
The images of a list column `frames` are `frames.0`, `frames.1` ...; a pickle is never opened. Two columns are special:
`__key__` holds the samples' keys, `__absent__` a JSON list of the columns that a sample lacks, for shards whose samples
differ; MDS itself knows no missing value.
"""

import io
import json
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from streaming.base.compression import decompress, get_compressions, is_compression
from streaming.base.format.mds.encodings import is_mds_encoding, mds_decode
from streaming.base.format.mds.writer import MDSWriter
from streaming.base.hashing import get_hash, get_hashes, is_hash

from scaleclip.data.cache import ShardCache
from scaleclip.data.open_shards import OpenShards
from scaleclip.data.sample import Sample, SampleError
from scaleclip.data.shards import is_remote, read_remote
from scaleclip.errors import ConfigError

KEY, ABSENT = "__key__", "__absent__"
_AS_STORED = ("bytes", "str", "jpeg", "png", "json", "str_int", "str_float", "str_decimal", "pkl")
_PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")
_MOST_BYTES = 2**32  # offsets are uint32
_FIRST_SHARD = "shard.00000"  # as the library's writer names it
_DAMAGE = ("corrupt_shard", "truncated_shard", "wrong_checksum")


class StoredFile(NamedTuple):
    """A file as the index describes it."""

    num_bytes: int
    hashes: tuple[tuple[str, str], ...]
    """(algorithm, hexadecimal digest) of each hash."""


class MdsShard(NamedTuple):
    """A shard as its folder's index describes it."""

    url: str
    """Path or URL of the file as it is stored: the compressed one where there is one."""
    name: str
    """Its uncompressed file, from the folder that all index files have in common."""
    samples: int
    columns: "Columns"
    compression: str | None
    raw: StoredFile
    zip: StoredFile | None


class MdsSource(NamedTuple):
    """The shards of MDS folders."""

    shards: list[str]
    """Path or URL of each."""
    names: list[str]
    """What each is called wherever it lies."""
    counts: NDArray[np.int64]
    """[shards] samples of each."""
    reader: "MdsReader"


class Columns:
    """Cuts a sample's bytes into members; every shard with the same columns shares one.

    Args:
        names: of the columns.
        encodings: MDS encoding of each.
        sizes: bytes of each, or None where they vary.

    Raises:
        ValueError: mosaicml-streaming knows no such encoding.
    """

    def __init__(self, names: Sequence[str], encodings: Sequence[str], sizes: Sequence[int | None]) -> None:
        self._arguments = (names, encodings, sizes)
        self._plan = [
            (name, size or 0, _renderer(name, encoding)) for name, encoding, size in zip(names, encodings, sizes, strict=True)
        ]
        self._sizes = struct.Struct(f"<{sum(not size for size in sizes)}I")
        self._has_absent = ABSENT in names

    def __reduce__(self) -> tuple[type["Columns"], tuple[Sequence[str], Sequence[str], Sequence[int | None]]]:
        return Columns, self._arguments

    def members(self, data: bytes) -> dict[str, bytes]:
        """The members of a sample, `__key__` among them.

        Raises:
            ValueError: the bytes are no sample of these columns.
        """
        if len(data) < self._sizes.size:
            raise ValueError(f"{len(data)} bytes")
        at = self._sizes.size
        sizes = iter(self._sizes.unpack_from(data))
        members: dict[str, bytes] = {}
        for name, fixed, render in self._plan:
            begin, at = at, at + (fixed or next(sizes))
            if render is None:
                members[name] = data[begin:at]
            else:
                members |= render(data[begin:at])
        if at != len(data):
            raise ValueError(f"{len(data)} bytes where its columns say {at}")
        if self._has_absent:
            for name in json.loads(members.pop(ABSENT) or b"[]"):
                del members[name]
        return members


class MdsReader:
    """Reads a sample by its shard's number and its own number in the shard, its ordinal.

    Keeps the offsets and files of the shards that it touched last, and which of them are damaged. A node checks a shard's
    hashes, where the index has them, and decompresses it once; both results lie in the cache.

    Args:
        shards: what `read_index` said.
        cache: local copies of remote and of decompressed shards.
    """

    def __init__(self, shards: Sequence[MdsShard], cache: ShardCache) -> None:
        self._shards, self._cache = shards, cache
        self.open = OpenShards([shard.url for shard in shards], cache, self._open_shard)

    def fetch(self, shard: int) -> None:
        """Have the shard at hand, decompressed. Raises SampleError when it cannot be had."""
        _whole(self.open(shard))

    def __call__(self, shard: int, ordinal: int) -> Sample:
        """Raises SampleError when the sample cannot be had."""
        return self.open.read(shard, lambda opened: _whole(opened).read(ordinal))

    def keys(self, shard: int) -> list[str]:
        """Of all its samples, which are read whole. Raises SampleError when the shard or one of them cannot be had."""
        opened = _whole(self.open(shard))
        return [opened.read(ordinal).key for ordinal in range(len(opened))]

    def _open_shard(self, number: int) -> "_Shard | SampleError":
        shard = self._shards[number]
        opened = self._open_once(shard)
        if isinstance(opened, SampleError) and is_remote(shard.url):
            # the store's copy may be good
            self._cache.drop(shard.url)
            opened = self._open_once(shard)
        return opened

    def _open_once(self, shard: MdsShard) -> "_Shard | SampleError":
        stored = self._cache.path(shard.url)
        try:
            return _Shard(self._checked(stored, shard), shard)
        except SampleError as error:
            if error.cause not in _DAMAGE:
                raise
            # found by reading the whole shard: not again for each of its samples
            return error

    def _checked(self, stored: str, shard: MdsShard) -> str:
        """The shard's uncompressed file."""
        if shard.zip is not None:
            _check_size(stored, shard.zip)
            return self._cache.derived_path(stored, "mds", lambda path: _decompressed(path, shard))
        _check_size(stored, shard.raw)
        if shard.raw.hashes:
            self._cache.derived(stored, "checked", lambda path: _check_file(path, shard.raw))
        return stored


def open_mds(key: str, index_files: Sequence[str], cache: ShardCache) -> MdsSource:
    """The shards of MDS folders and how they are read; arguments and errors are those of `read_index`."""
    shards = read_index(key, index_files)
    counts = np.array([shard.samples for shard in shards], np.int64)
    return MdsSource([shard.url for shard in shards], [shard.name for shard in shards], counts, MdsReader(shards, cache))


def read_index(key: str, index_files: Sequence[str]) -> list[MdsShard]:
    """The shards of MDS folders, in order.

    Args:
        key: the configuration's key of the source, for errors.
        index_files: path or URL of every folder's `index.json`; one merged from several folders' names shards in sub-folders.

    Raises:
        ConfigError: an index cannot be read, is not one of MDS version 2, or names a shard that another names too.
    """
    shards: dict[str, MdsShard] = {}
    seen_columns: dict[str, Columns] = {}
    folders = [index.split("/")[:-1] for index in index_files]
    depths = zip(*folders, strict=False)
    num_common = next((depth for depth, parts in enumerate(depths) if len(set(parts)) > 1), min(map(len, folders)))
    for index, folder in zip(index_files, folders, strict=True):
        for entry in _entries(key, index):
            try:
                shard = _shard(folder, num_common, entry, seen_columns)
            except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
                raise ConfigError(
                    f"{key}: a shard in {index} is described as mosaicml-streaming 0.13 would not: {type(error).__name__}: "
                    f"{error}; write the index again, or convert the folder with a release that reads it"
                ) from None
            if shard.url in shards:
                raise ConfigError(
                    f"{key}: {index} names the shard {shard.url}, which was named before: give either a merged index.json or "
                    f"those of its sub-folders"
                )
            shards[shard.url] = shard
    if not any(shard.samples for shard in shards.values()):
        raise ConfigError(f"{key}: no samples in {', '.join(index_files)}: was the data written to the end?")
    return list(shards.values())


def check_writer_options(compression: str | None, hashes: Sequence[str]) -> None:
    """Raises ConfigError for a compression or hash that mosaicml-streaming does not know."""
    if compression is not None and not is_compression(compression):
        known = sorted(name for name in get_compressions() if ":" not in name)
        raise ConfigError(f"compression={compression} is none of {', '.join(known)}, with :LEVEL where it has levels")
    for name in hashes:
        if not is_hash(name):
            raise ConfigError(f"hash {name!r} is none of {', '.join(sorted(get_hashes()))}")


def write_shard(
    samples: Iterable[Sample],
    columns: Set[str],
    differ: bool,
    folder: Path,
    name: str,
    *,
    compression: str | None,
    hashes: Sequence[str],
) -> tuple[Path, dict[str, Any]]:
    """Write samples as one MDS shard; gives its file in `folder` and its entry for an index, where it is called `name`.mds.

    Args:
        samples: at least one; the library's writer keeps their bytes in memory until the end.
        columns: members that they have together.
        differ: some sample lacks some of them.
        folder: an empty one.
        name: of the shard.
        compression: as `streaming.MDSWriter` takes it, none for none.
        hashes: algorithms.

    Raises:
        ValueError: the samples take 4 GiB or more, which MDS cannot hold.
    """
    encodings = dict.fromkeys(columns, "bytes") | {KEY: "str"} | ({ABSENT: "json"} if differ else {})
    writer = MDSWriter(columns=encodings, out=str(folder), compression=compression, hashes=sorted(set(hashes)), size_limit=None)
    for sample in samples:
        row: dict[str, Any] = {column: sample.members.get(column, b"") for column in columns}
        # the writer takes bytes for any encoding: a key that is no UTF-8 keeps its bytes
        row[KEY] = sample.key.encode("utf-8", "surrogateescape")
        if differ:
            row[ABSENT] = sorted(columns - sample.members.keys())
        writer.write(row)
        if writer.new_shard_size >= _MOST_BYTES:
            raise ValueError("its samples take 4 GiB or more, which an MDS shard cannot hold: cut it into smaller ones")
    writer.finish()
    (entry,) = writer.shards
    stored = entry["zip_data"] or entry["raw_data"]
    written = folder / stored["basename"]
    for file in (entry["raw_data"], entry["zip_data"]):
        if file:
            file["basename"] = name + file["basename"].removeprefix(_FIRST_SHARD)
    return written, entry


def _whole(opened: "_Shard | SampleError") -> "_Shard":
    if isinstance(opened, SampleError):
        raise SampleError(opened.cause, opened.detail)
    return opened


class _Shard:
    def __init__(self, path: str, shard: MdsShard) -> None:
        self._path, self._name, self._columns = path, shard.name.removesuffix(".mds"), shard.columns
        self._file = os.open(path, os.O_RDONLY)
        size = os.fstat(self._file).st_size
        head = np.frombuffer(os.pread(self._file, 4 * (shard.samples + 2), 0), "<u4")
        if len(head) < shard.samples + 2 or size < head[-1]:
            raise SampleError("truncated_shard", f"{path} ends at {size:,} bytes")
        self._begins: NDArray[np.uint32] = head[1:]
        if head[0] != shard.samples or head[-1] != size or (self._begins[1:] < self._begins[:-1]).any():
            raise SampleError("corrupt_shard", f"{path}: no offsets of {shard.samples} samples in {size:,} bytes")

    def __len__(self) -> int:
        return len(self._begins) - 1

    def read(self, ordinal: int) -> Sample:
        if ordinal >= len(self):
            raise SampleError("missing_sample", f"{self._path} holds {len(self)} samples, sample {ordinal} was asked for")
        begin, end = int(self._begins[ordinal]), int(self._begins[ordinal + 1])
        data = os.pread(self._file, end - begin, begin)
        if len(data) < end - begin:
            raise SampleError("truncated_shard", f"{self._path} ends within sample {ordinal}")
        try:
            members = self._columns.members(data)
            key = members.pop(KEY, None)
        # bytes that are not what the column says make the decoders of arrays and images raise nearly anything
        except Exception as error:
            raise SampleError(
                "corrupt_shard", f"{self._path}, sample {ordinal}: {type(error).__name__}: {error}; was it changed since?"
            ) from None
        return Sample(f"{self._name}/{ordinal}" if key is None else key.decode("utf-8", "surrogateescape"), members)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)


def _entries(key: str, index: str) -> list[dict[str, Any]]:
    """The shards that an index file lists."""
    try:
        content = read_remote(index) if is_remote(index) else Path(index).read_bytes()
    # what the file systems behind fsspec raise has no common base
    except Exception as error:
        raise ConfigError(
            f"{key}: the index {index} cannot be read: {error}; check the path, and that this machine sees it"
        ) from error
    try:
        tree = json.loads(content)
        version, entries = tree["version"], list(tree["shards"])
        formats = {str(entry["format"]) for entry in entries}
        versions = {version, *(entry["version"] for entry in entries)}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{key}: {index} is no index of an MDS folder: {type(error).__name__}: {error}; give the index.json that "
            f"mosaicml-streaming wrote"
        ) from None
    if formats - {"mds"}:
        raise ConfigError(f"{key}: {index} lists shards of format {', '.join(sorted(formats))}; only mds is read: convert them")
    if versions - {2}:
        raise ConfigError(f"{key}: {index} is of version {versions}; only MDS version 2 is read: write it again")
    return entries


def _shard(folder: list[str], num_common: int, entry: dict[str, Any], seen: dict[str, Columns]) -> MdsShard:
    names, encodings, sizes = entry["column_names"], entry["column_encodings"], entry["column_sizes"]
    if not names:
        raise ValueError("it has no columns")
    signature = json.dumps([names, encodings, sizes])
    if signature not in seen:
        seen[signature] = Columns(names, encodings, sizes)
    raw, compressed = entry["raw_data"], entry["zip_data"]
    if compressed and not is_compression(entry["compression"]):
        raise ValueError(f"compression {entry['compression']!r} is unknown")
    return MdsShard(
        "/".join([*folder, (compressed or raw)["basename"]]),
        "/".join([*folder[num_common:], raw["basename"]]),
        int(entry["samples"]),
        seen[signature],
        entry["compression"] if compressed else None,
        _stored_file(raw),
        _stored_file(compressed) if compressed else None,
    )


def _stored_file(described: dict[str, Any]) -> StoredFile:
    unknown = [name for name in described["hashes"] if not is_hash(name)]
    if unknown:
        raise ValueError(f"hash {unknown[0]!r} is unknown")
    return StoredFile(int(described["bytes"]), tuple(described["hashes"].items()))


def _check_size(path: str, file: StoredFile) -> None:
    size = os.path.getsize(path)
    if size < file.num_bytes:
        raise SampleError("truncated_shard", f"{path} has {size:,} of {file.num_bytes:,} bytes")
    if size > file.num_bytes:
        raise SampleError("corrupt_shard", f"{path} has {size:,} bytes, its index says {file.num_bytes:,}")


def _check_hashes(path: str, file: StoredFile, content: bytes | mmap.mmap) -> None:
    for algorithm, digest in file.hashes:
        if get_hash(algorithm, content) != digest:
            raise SampleError("wrong_checksum", f"{path}: its {algorithm} is not what its index says")


def _check_file(path: str, file: StoredFile) -> bytes:
    # mapped: a shard may be larger than a loader process should be
    with open(path, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        _check_hashes(path, file, content)
    return b""


def _decompressed(path: str, shard: MdsShard) -> bytes:
    assert shard.zip is not None
    content = Path(path).read_bytes()
    _check_hashes(path, shard.zip, content)
    try:
        raw: bytes = decompress(shard.compression, content)
    # every library of the five has errors of its own
    except Exception as error:
        raise SampleError("corrupt_shard", f"{path} is no {shard.compression}: {type(error).__name__}: {error}") from None
    if len(raw) != shard.raw.num_bytes:
        raise SampleError("corrupt_shard", f"{path}: {len(raw):,} bytes decompressed, its index says {shard.raw.num_bytes:,}")
    _check_hashes(path, shard.raw, raw)
    return raw


def _renderer(name: str, encoding: str) -> Callable[[bytes], dict[str, bytes]] | None:
    """From a column's bytes to members; none where they are the member as they are."""
    if not is_mds_encoding(encoding):
        raise ValueError(f"column {name!r} has encoding {encoding!r}, which is unknown")
    match encoding.partition(":")[0]:
        case kind if kind in _AS_STORED:
            return None
        case "pil":
            return lambda data: {name: _png(data)}
        case "jpeg_array" | "jpegarray":
            return lambda data: _numbered(name, _elements(data, 0))
        case "list[jpeg]" | "list[png]":
            return lambda data: _numbered(name, _elements(data, 4))
        case "list[pil]":
            return lambda data: _numbered(name, map(_png, _elements(data, 4)))
        case "ndarray":
            return lambda data: {name: json.dumps(mds_decode(encoding, data).tolist()).encode()}
        case _:
            return lambda data: {name: str(mds_decode(encoding, data)).encode()}


def _numbered(name: str, images: Iterable[bytes]) -> dict[str, bytes]:
    return {f"{name}.{number}": image for number, image in enumerate(images)}


def _elements(data: bytes, at: int) -> list[bytes]:
    """The elements of a list column, whose count stands at byte `at`: count and sizes as uint32, then the elements."""
    (count,) = struct.unpack_from("<I", data, at)
    sizes = np.frombuffer(data, "<u4", count, at + 4).astype(np.int64)
    ends = at + 4 + 4 * count + np.cumsum(sizes)
    return [data[end - size : end] for size, end in zip(sizes.tolist(), ends.tolist(), strict=True)]


def _png(data: bytes) -> bytes:
    picture: Image.Image = mds_decode("pil", data)
    if picture.mode not in _PNG_MODES:
        picture = picture.convert("RGB")
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=1)
    return out.getvalue()
