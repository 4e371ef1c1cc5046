"""This package's communicators over a caller's ranks, and what one rank's failure does to the others."""

import contextlib
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_FIRST_OWN_NUMBER = 1 << 30
# as long as a collective would wait for a rank that does something else
_AGREEMENT_S = 1800.0
_POLL_S = 0.01


class RankError(RuntimeError):
    """The loss could not be computed because another rank failed; the message is the first failing rank's."""


class Channels:
    """Two communicators over a group's ranks: on one, data and gradients would wait for each other.

    They are this package's own also so that a failing rank can close them, which frees the others from a wait at once.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.ranks = dist.get_process_group_ranks(group)
        self.num_ranks, self.rank = len(self.ranks), dist.get_rank(group)
        self.name = f"rank {self.ranks[self.rank]}"
        backend = dist.get_backend_config(group)
        self._store: Any = dist.distributed_c10d._get_default_store()
        self._failure, self._agreed, self._num_calls = "", set[str](), 0
        # A new group waits for a dead rank until it times out; the caller's group knows of the death.
        self._meet(group, device)
        self.data, self.gradients = (_new_group(self.ranks, backend) for _ in range(2))
        self._key = f"scaleclip_kernels/{self.data.group_name}"
        for channel in (self.data, self.gradients):
            self._meet(channel, device)  # NCCL wants all ranks in a communicator's first operation

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        with answer_from("another rank of the group"):
            dist.all_reduce(tensor, group=self.data)
        return tensor

    def agree(self, call: str) -> None:
        """Compare this rank's call with the others' if it has not made one like it before; costs nothing afterwards.

        Raises:
            ValueError: another rank makes a different call.
            RankError: another rank failed.
        """
        self._num_calls += 1
        if call in self._agreed:
            return
        self._agreed.add(call)
        keys = [f"{self._key}/call/{self._num_calls}/{rank}" for rank in range(self.num_ranks)]
        self._store.set(keys[self.rank], call)
        deadline = time.monotonic() + _AGREEMENT_S
        while not self._store.check(keys):
            if self._store.check([f"{self._key}/failure"]):
                raise RankError("another rank failed before it made this call")
            if time.monotonic() > deadline:
                raise ValueError(f"no other rank has announced this rank's call in {_AGREEMENT_S:.0f} s: {call}")
            time.sleep(_POLL_S)
        for rank, key in zip(self.ranks, keys, strict=True):
            theirs = self._store.get(key).decode()
            if theirs != call:
                raise ValueError(
                    f"rank {rank} calls the loss with {theirs} and {self.name} with {call}: all ranks of a group must make the "
                    "same call; pad with invalid pairs, or pass sizes where ranks have different numbers of pairs"
                )

    @contextlib.contextmanager
    def shared_fate(self) -> Iterator[None]:
        """An error inside ends every rank's call: the first rank's with its own error, the others' with its message.

        Raises:
            RankError: another rank failed first, or did so in an earlier call.
        """
        if self._failure:
            raise RankError(f"these ranks cannot go on after a failure, start them again: {self._failure}")
        try:
            yield
        except BaseException as error:  # an interrupted rank has left its part of an exchange undone as well
            message = f"{self.name}: {type(error).__name__}: {error}"
            self._failure = self._first_failure(message)
            self._close()
            if self._failure.startswith(message) or not isinstance(error, Exception):
                raise
            raise RankError(f"{self.name} stops, the first failure was on {self._failure}") from error

    def _first_failure(self, message: str) -> str:
        try:
            return str(self._store.compare_set(f"{self._key}/failure", "", message).decode())
        except RuntimeError as error:  # the rank that holds the store is dead: this rank knows only its own
            return f"{message} (the ranks' store is gone: {error})"

    def _close(self) -> None:
        for channel in (self.data, self.gradients):
            # the caller may have destroyed all groups already
            if channel in dist.distributed_c10d._world.pg_map:
                channel.abort()
                dist.destroy_process_group(channel)
        del self.data, self.gradients

    @staticmethod
    def _meet(group: dist.ProcessGroup, device: torch.device) -> None:
        with answer_from("another rank of the group"):
            dist.all_reduce(torch.zeros(1, device=device), group=group)


_num_made: Counter[tuple[int, ...]] = Counter()
_channels: "weakref.WeakKeyDictionary[dist.ProcessGroup, Channels]" = weakref.WeakKeyDictionary()


def channels_over(group: dist.ProcessGroup | None, device: torch.device) -> Channels | None:
    """The group's channels, made at its first call, in which every rank must take part; None where there is one rank."""
    if group is None or dist.get_world_size(group) == 1:
        return None
    if group not in _channels:
        _channels[group] = Channels(group, device)
    return _channels[group]


@contextlib.contextmanager
def answer_from(whom: str) -> Iterator[None]:
    """Say what an error of the network means, and keep its first line: gloo's go on for a paragraph."""
    try:
        yield
    except (torch.OutOfMemoryError, NotImplementedError):
        raise
    except RuntimeError as error:
        first_line = str(error).partition("\n")[0]
        raise RankError(f"no answer from {whom}: it has died, failed or lost its network ({first_line})") from error


def _new_group(ranks: list[int], backend: str) -> dist.ProcessGroup:
    """Made by its members alone, unseen by the caller's own groups.

    PyTorch counts the groups that a process makes and names the next one by that number, so a group made by some ranks only
    would leave later groups, which all ranks make, with different names, and their making would hang. The number is put
    back; the name has one of its own.
    """
    world: Any = dist.distributed_c10d._world
    members = tuple(sorted(ranks))
    number, world.group_count = world.group_count, _FIRST_OWN_NUMBER + _num_made[members]
    _num_made[members] += 1
    try:
        made = dist.new_group(ranks, backend=backend, use_local_synchronization=True, sort_ranks=False)
    finally:
        world.group_count = number
    assert isinstance(made, dist.ProcessGroup), "this process is one of its ranks"
    return made
