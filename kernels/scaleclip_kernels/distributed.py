"""Over ranks: how every rank's columns meet every rank's rows, by a ring or by gathering.

A *tour* brings every rank's columns to this rank's rows and calls `work` on each visit. *Fixed* tensors (features, labels)
are read; a *carried* tensor (statistics, gradients) is added to and comes home complete. Pictures: kernels/README.md.

Shapes: W ranks, m columns on a rank, of which view v has the pairs v n to (v + 1) n; columns beyond V n are extra.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from scaleclip_kernels.blocks import Matched
from scaleclip_kernels.channels import Channels, answer_from

ScheduleName = Literal["auto", "ring", "gather"]

# A ring's hops follow one another, about 25 us each on a network card: 64 of them cost what gathering does (README).
MAX_RING_RANKS = 64
# of gathered features in flight; two chunks are held at a time
GATHERED_BYTES = 64 << 20

_log = logging.getLogger("scaleclip_kernels")


class Piece(NamedTuple):
    """Columns of one view within a visit, and which of this rank's rows match them."""

    view: int
    columns: slice
    rows: slice
    """Of a tensor that holds this rank's rows once a view, view after view."""
    matched: Matched

    def within(self, columns: slice) -> "Piece | None":
        """The part of this piece that lies in `columns`."""
        start, stop = max(self.columns.start, columns.start), min(self.columns.stop, columns.stop)
        if start >= stop:
            return None
        skipped = start - self.columns.start
        row, column, length = self.matched
        first, last = max(column, skipped), min(column + length, stop - self.columns.start)
        matched = Matched(row + first - column, first - skipped, max(0, last - first))
        return self._replace(columns=slice(start, stop), matched=matched)


class Visit(NamedTuple):
    """Columns that are here now."""

    fixed: tuple[Tensor | None, ...]
    pieces: list[Piece]
    carried: Callable[[], Tensor]
    """Waits until the carried tensor of these columns has arrived; add to it in place."""

    def carried_by(self, piece: Piece) -> Callable[[], Tensor]:
        return lambda: self.carried()[piece.columns]


class Carried(NamedTuple):
    """A tensor with one row a column, which every rank adds its part to."""

    start: Callable[[int], Tensor]
    """That many columns' rows before anything is added."""
    combine: Callable[[Tensor], Tensor] | None
    """[W, m, ...] parts to their total [m, ...]; None: their sum."""


class Layout(NamedTuple):
    """Pairs on each rank in rank order, and what goes with them."""

    sizes: tuple[int, ...]
    views: int
    extras: int
    """Columns of each rank that no row matches, after those of the only view."""

    def columns(self, rank: int) -> int:
        return self.views * self.sizes[rank] + self.extras

    def rows(self, view: int, rank: int) -> slice:
        return slice(view * self.sizes[rank], (view + 1) * self.sizes[rank])


class Schedule(Protocol):
    num_ranks: int

    def tour(self, fixed: tuple[Tensor | None, ...], carried: Carried | None, work: Callable[[Visit], None]) -> Tensor | None:
        """Call `work` once for every block of columns; this rank's carried tensor, complete. All ranks call."""

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""


class Alone:
    """One process holds the whole batch."""

    num_ranks = 1

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def tour(self, fixed: tuple[Tensor | None, ...], carried: Carried | None, work: Callable[[Visit], None]) -> Tensor | None:
        home = None if carried is None else carried.start(self._layout.columns(0))
        work(Visit(fixed, _pieces(self._layout, 0, 0), lambda: _present(home)))
        return home

    def total(self, tensor: Tensor) -> Tensor:
        return tensor


class Ring:
    """Columns travel from rank to rank; no rank ever holds more than two foreign blocks, whatever W is.

    While a block is worked on the next one is on its way (data channel). What a block carries (gradient channel) leaves in
    two halves, each when it has been added to: each then has the time of half a block's work to arrive.
    """

    def __init__(self, layout: Layout, channels: Channels) -> None:
        self._layout, self._channels = layout, channels
        self.num_ranks, self._rank = channels.num_ranks, channels.rank

    def tour(self, fixed: tuple[Tensor | None, ...], carried: Carried | None, work: Callable[[Visit], None]) -> Tensor | None:
        most = max(map(self._layout.columns, range(self.num_ranks)))
        # One border for all blocks: a half must not be overwritten while another block's other half leaves from there.
        halves = (slice(0, most // 2), slice(most // 2, most))
        # made once: a block that has been passed on makes room for the next but one
        spare_fixed = [_like(fixed, most) for _ in range(2)]
        cargo = None if carried is None else carried.start(self._layout.columns(self._rank))
        spare_cargo = [] if cargo is None else [cargo.new_empty(most, *cargo.shape[1:]) for _ in range(2)]
        cargo_on_its_way = [_Transfer([]) for _ in halves]

        for hop in range(self.num_ranks):
            owner, following = (self._rank - hop) % self.num_ranks, (self._rank - hop - 1) % self.num_ranks
            size = self._layout.columns(following)
            arriving = tuple(None if spare is None else spare[:size] for spare in spare_fixed[hop % 2])
            is_last = hop + 1 == self.num_ranks
            fixed_on_its_way = _Transfer([]) if is_last else self._pass_on(fixed, arriving, self._channels.data)
            next_cargo = spare_cargo[hop % 2][:size] if spare_cargo else None
            pieces = _pieces(self._layout, owner, self._rank)
            for number, half in enumerate(halves):
                arrived = functools.partial(_after, cargo_on_its_way[number], cargo)
                work(Visit(fixed, [part for piece in pieces if (part := piece.within(half))], arrived))
                if next_cargo is not None:
                    cargo_on_its_way[number] = self._pass_on([arrived()[half]], [next_cargo[half]], self._channels.gradients)
            fixed_on_its_way.wait()
            fixed, cargo = arriving, next_cargo
        for transfer in cargo_on_its_way:
            transfer.wait()
        return cargo

    def total(self, tensor: Tensor) -> Tensor:
        return self._channels.total(tensor)

    def _pass_on(
        self, leaving: Sequence[Tensor | None], arriving: Sequence[Tensor | None], group: dist.ProcessGroup
    ) -> "_Transfer":
        after, before = (self._channels.ranks[(self._rank + step) % self.num_ranks] for step in (1, -1))
        # An empty block is not sent: every rank knows every size.
        steps = [
            dist.P2POp(operation, tensor, peer, group)
            for operation, tensors, peer in ((dist.isend, leaving, after), (dist.irecv, arriving, before))
            for tensor in tensors
            if tensor is not None and tensor.numel() > 0
        ]
        whom = f"rank {before}" if before == after else f"rank {before} or {after}"
        with answer_from(whom):
            works = dist.batch_isend_irecv(steps) if steps else []
        return _Transfer(works, leaving, whom=whom)


class Gather:
    """Every rank's columns are gathered a chunk at a time, the next chunk while one is worked on.

    What a chunk carries goes back to its owners while the next chunk is worked on.
    """

    def __init__(self, layout: Layout, channels: Channels) -> None:
        self._layout, self._channels = layout, channels
        self.num_ranks, self._rank = channels.num_ranks, channels.rank

    def tour(self, fixed: tuple[Tensor | None, ...], carried: Carried | None, work: Callable[[Visit], None]) -> Tensor | None:
        layout, chunks = self._layout, self._chunks(_present(fixed[0]))
        home = None if carried is None else carried.start(layout.columns(self._rank))
        if not chunks:
            return home
        arriving, going_home = self._gather(fixed, chunks[0]), _Transfer([])
        for number, chunk in enumerate(chunks):
            arriving.transfer.wait()
            here = arriving.tensors
            if number + 1 < len(chunks):
                arriving = self._gather(fixed, chunks[number + 1])
            parts = None if carried is None else carried.start(self.num_ranks * chunk.width)
            num_matched = max(0, min(chunk.width, layout.sizes[self._rank] - chunk.first_pair))
            matched = Matched(chunk.first_pair, self._rank * chunk.width, num_matched)
            everyone = slice(0, self.num_ranks * chunk.width)
            piece = Piece(chunk.view, everyone, layout.rows(chunk.view, self._rank), matched)
            work(Visit(here, [piece], functools.partial(_present, parts)))
            going_home.wait()
            if carried is not None and home is not None and parts is not None:
                going_home = self._send_home(parts, carried, home[chunk.mine])
        going_home.wait()
        return home

    def total(self, tensor: Tensor) -> Tensor:
        return self._channels.total(tensor)

    def _chunks(self, features: Tensor) -> list["_Chunk"]:
        """The same number of chunks, and the same widths, on every rank: a shorter rank pads."""
        layout = self._layout
        row_bytes = self.num_ranks * features.shape[1] * features.element_size()
        most, longest, mine = max(1, GATHERED_BYTES // row_bytes), max(layout.sizes), layout.sizes[self._rank]
        chunks = []
        for view in range(layout.views):
            # the sum is the view's length: only a single view has extra columns
            for start in range(0, longest + layout.extras, most):
                width = min(most, longest + layout.extras - start)
                own = slice(*(view * mine + min(at, mine + layout.extras) for at in (start, start + width)))
                chunks.append(_Chunk(view, start, width, own))
        return chunks

    def _gather(self, fixed: tuple[Tensor | None, ...], chunk: "_Chunk") -> "_Gathered":
        works: list[Any] = []
        sent: list[Tensor] = []
        gathered: list[Tensor | None] = []
        for tensor in fixed:
            if tensor is None:
                gathered.append(None)
                continue
            part = tensor[chunk.mine]
            if len(part) < chunk.width:
                # padding is invalid, which is the one bool among the fixed tensors; the rest of it is then never looked at
                padding = part.new_full((chunk.width - len(part), *part.shape[1:]), part.dtype == torch.bool)
                part = torch.cat([part, padding])
            sent.append(part.contiguous())
            everyone = part.new_empty(self.num_ranks * chunk.width, *part.shape[1:])
            with answer_from("another rank of the group"):
                works.append(dist.all_gather_single(everyone, sent[-1], group=self._channels.data, async_op=True))
            gathered.append(everyone)
        return _Gathered(tuple(gathered), _Transfer(works, sent))

    def _send_home(self, parts: Tensor, carried: Carried, home: Tensor) -> "_Transfer":
        combine, width = carried.combine, len(parts) // self.num_ranks
        if combine is None:
            total = parts.new_empty(width, *parts.shape[1:])
            with answer_from("another rank of the group"):
                work: Any = dist.reduce_scatter_single(total, parts, group=self._channels.gradients, async_op=True)
            return _Transfer([work], [parts], lambda: home.copy_(total[: len(home)]))
        received = torch.empty_like(parts)
        with answer_from("another rank of the group"):
            work = dist.all_to_all_single(received, parts, group=self._channels.gradients, async_op=True)
        by_rank = received.view(self.num_ranks, width, *parts.shape[1:])
        return _Transfer([work], [parts], lambda: home.copy_(combine(by_rank)[: len(home)]))


def make_schedule(name: ScheduleName, layout: Layout, channels: Channels | None) -> Schedule:
    """`auto`: ring up to MAX_RING_RANKS ranks, gather beyond, said once in the log."""
    if channels is None:
        return Alone(layout)
    if name == "auto":
        name = "ring" if channels.num_ranks <= MAX_RING_RANKS else "gather"
        say_once(f"schedule {name} for {channels.num_ranks} ranks (ring up to {MAX_RING_RANKS})")
    return Ring(layout, channels) if name == "ring" else Gather(layout, channels)


class _Chunk(NamedTuple):
    view: int
    first_pair: int
    width: int
    mine: slice


class _Transfer:
    """Messages on their way; `then` runs once, when they have arrived."""

    def __init__(
        self,
        works: list[Any],
        sent: Sequence[Tensor | None] = (),
        then: Callable[[], Any] | None = None,
        whom: str = "another rank of the group",
    ) -> None:
        # what is sent must stay in memory until it has left
        self._works, self._sent, self._then, self._whom = works, sent, then, whom

    def wait(self) -> None:
        with answer_from(self._whom):
            for work in self._works:
                work.wait()
        if self._then is not None:
            self._then()
        self._works, self._sent, self._then = [], (), None


class _Gathered(NamedTuple):
    tensors: tuple[Tensor | None, ...]
    transfer: _Transfer


def _pieces(layout: Layout, owner: int, rank: int) -> list[Piece]:
    """The views among the columns of rank `owner`, as they meet the rows of `rank`."""
    size, mine = layout.sizes[owner], layout.sizes[rank]
    matched = Matched(0, 0, mine if owner == rank else 0)
    return [
        Piece(view, slice(view * size, (view + 1) * size + layout.extras), layout.rows(view, rank), matched)
        for view in range(layout.views)
    ]


def _like(tensors: tuple[Tensor | None, ...], size: int) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.new_empty(size, *tensor.shape[1:]) for tensor in tensors)


def _after(transfer: _Transfer, tensor: Tensor | None) -> Tensor:
    transfer.wait()
    return _present(tensor)


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "asked for what does not travel"
    return tensor


def say_once(message: str) -> None:
    if not torch.compiler.is_compiling():  # which cannot follow a logger
        _say(message)


@functools.cache
def _say(message: str) -> None:
    _log.info(message)
