"""A sample as it lies in its shard, and what is said of one that cannot be used."""

from collections.abc import Sequence
from typing import NamedTuple


class Sample(NamedTuple):
    """A sample as it lies in the shard; nothing is decoded yet."""

    key: str
    """Unique within its shard, for people and for joins."""
    members: dict[str, bytes]
    """By name: a tar's files by lower-case extension without the leading dot, or an MDS shard's columns."""

    def image(self, names: Sequence[str]) -> bytes:
        """The first member of these names: an encoded image. Raises SampleError without one."""
        for name in names:
            if name in self.members:
                return self.members[name]
        raise SampleError("no_image", f"{self.key} has {', '.join(self.members)}, none of {', '.join(names)}")


class SampleError(Exception):
    """A sample that cannot be used; `cause` is the name under which it is counted."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause, self.detail = cause, detail

    def __reduce__(self) -> tuple[type["SampleError"], tuple[str, str]]:
        return SampleError, (self.cause, self.detail)


class Fault(NamedTuple):
    """A slot of a batch that could not be filled."""

    source: str
    """Name of the sample's source in `data.sources`."""
    shard: str
    """Its shard, as the manifest names it."""
    sample: int
    """Its number in the shard, of all that it holds."""
    cause: str
    """What it is counted as."""
    detail: str
    """What was wrong, for people."""
