"""Parameters with optimizer state, cut for ranks as ZeRO's stages cut them, and their checkpoints, without DeepSpeed."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from zlib import crc32

import torch
from safetensors.torch import save
from torch import Tensor

from scaleclip.checkpoint import loading
from scaleclip.checkpoint.border import Border
from scaleclip.checkpoint.checkpointer import Checkpointer
from scaleclip.checkpoint.folders import partial, publish, write_durable
from scaleclip.checkpoint.rank_file import rank_file
from scaleclip.checkpoint.shard import Fragment, Shard, share
from scaleclip.checkpoint.snapshot import Snapshot
from scaleclip.checkpoint.state import STATE, TrainState, encode

Whole = dict[str, dict[str, Tensor]]
"""Parameter -> `weight`, `exp_avg`, `exp_avg_sq` -> values in the parameter's shape."""
Layout = Callable[[Whole, int, int], Shard]

KINDS = ("weight", "exp_avg", "exp_avg_sq")
# sizes that 2, 3 and 4 do not divide, fewer elements than ranks, no dimensions, a parameter that does not learn
SHAPES = {"logit_scale": (1,), "body.weight": (7, 5), "body.bias": (7,), "conv": (2, 3, 3, 3), "pair": (2,), "none": ()}
FROZEN = {"locked.weight": (5, 3), "locked.bias": (1,)}


def make_whole(
    seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES, frozen: Mapping[str, tuple[int, ...]] = FROZEN
) -> Whole:
    """Random values; the same for the same seed."""
    random = torch.Generator().manual_seed(seed)
    whole = {name: {kind: torch.randn(shape, generator=random) for kind in KINDS} for name, shape in shapes.items()}
    return whole | {name: {"weight": torch.randn(shape, generator=random)} for name, shape in frozen.items()}


def scalars_of(seed: int) -> dict[str, Tensor]:
    """Small tensors of several types."""
    return {"adam_step": torch.tensor(seed + 0.5), "good_steps": torch.tensor([seed, -1])}


def replicated(whole: Whole, rank: int, world_size: int) -> Shard:
    """Stage 0."""
    return Shard([_fragment(name, whole, whole[name], 0, is_replicated=True) for name in whole], scalars_of(0))


def cut_together(whole: Whole, rank: int, world_size: int) -> Shard:
    """Stages 1 and 2: what learns is one flat row, filled up at its end and cut in equal parts."""
    learning = {name: tensors for name, tensors in whole.items() if len(tensors) > 1}
    rows = {kind: torch.cat([tensors[kind].flatten() for tensors in learning.values()]) for kind in KINDS}
    part = -(-len(rows["weight"]) // world_size) + 3
    padded = {kind: torch.cat([row, torch.full((part * world_size - len(row),), math.nan)]) for kind, row in rows.items()}
    mine = {kind: row[rank * part : (rank + 1) * part].clone() for kind, row in padded.items()}
    fragments, offset = [], -rank * part
    for name, tensors in learning.items():
        length = tensors["weight"].numel()
        begin, end = max(offset, 0), min(offset + length, part)
        if begin < end:
            flat = {kind: row[begin:end] for kind, row in mine.items()}
            fragments.append(_fragment(name, whole, flat, begin - offset, is_replicated=False))
        offset += length
    locked = [name for name in whole if name not in learning]
    return Shard(
        fragments + [_fragment(name, whole, whole[name], 0, is_replicated=True) for name in locked],
        scalars_of(0),
    )


def cut_each(whole: Whole, rank: int, world_size: int) -> Shard:
    """Stage 3: each parameter is cut in equal parts, the last of them filled up."""
    fragments = []
    for name, tensors in whole.items():
        part = -(-tensors["weight"].numel() // world_size)
        flat = {kind: tensor.flatten()[rank * part : (rank + 1) * part].clone() for kind, tensor in tensors.items()}
        # a locked parameter's part is there when it is empty, too
        if len(flat["weight"]) or len(tensors) == 1:
            fragments.append(_fragment(name, whole, flat, rank * part, is_replicated=False))
    return Shard(fragments, scalars_of(0))


LAYOUTS: dict[str, Layout] = {"replicated": replicated, "cut together": cut_together, "cut each": cut_each}


def blank(shard: Shard) -> Shard:
    """A shard of the same layout that nothing was loaded into."""
    fragments = [
        fragment._replace(tensors={kind: torch.full_like(tensor, math.nan) for kind, tensor in fragment.tensors.items()})
        for fragment in shard.fragments
    ]
    return Shard(fragments, {name: torch.zeros_like(scalar) - 7 for name, scalar in shard.scalars.items()})


def assert_equal(found: Shard, expected: Shard) -> None:
    """Bit for bit."""
    assert [fragment[:3] for fragment in found.fragments] == [fragment[:3] for fragment in expected.fragments]
    for (name, mine), (_, other) in zip(tensors_of(found), tensors_of(expected), strict=True):
        assert mine.dtype == other.dtype, name
        assert torch.equal(mine, other), name


def tensors_of(shard: Shard) -> Iterator[tuple[str, Tensor]]:
    """All tensors with a name for messages."""
    for fragment in shard.fragments:
        for kind, tensor in fragment.tensors.items():
            yield f"{fragment.name} {kind}", tensor
    yield from shard.scalars.items()


def write_step(shard: Shard, step: int) -> None:
    """Fill a shard with values that tell the step, the tensor and the element, whichever rank has it."""
    starts = [fragment.start for fragment in shard.fragments for _ in fragment.tensors] + [0] * len(shard.scalars)
    for start, (name, tensor) in zip(starts, tensors_of(shard), strict=True):
        first = 100 * step + crc32(name.encode()) % 100 + start
        tensor.copy_(torch.arange(first, first + tensor.numel()).view(tensor.shape))


def write(folder: Path, shards: list[Shard], step: int = 4) -> Path:
    """What ranks with these shards save."""
    path = folder / "checkpoints" / f"step_{step:08d}"
    partial(path).mkdir(parents=True)
    digests = {}
    for rank, shard in enumerate(shards):
        mine = share(shard.fragments, rank, len(shards))
        snapshot = Snapshot(mine, torch.device("cpu"))
        snapshot.take(mine)
        digests[rank_file(rank)] = write_durable(partial(path) / rank_file(rank), snapshot.blocks())
    digests[loading.SCALARS] = write_durable(partial(path) / loading.SCALARS, [save(shards[0].scalars)])
    digests[STATE] = write_durable(partial(path) / STATE, [encode(TrainState(step=step))])
    publish(path, digests)
    return path


def load_newest(checkpointer: Checkpointer, border: Border | None = None) -> TrainState | None:
    """Fill the checkpointer's shard from the newest whole checkpoint; its state, or None without any."""
    found = checkpointer.find_newest()
    if found is None:
        return None
    checkpointer.load(found, border)
    return found.state


def _fragment(name: str, whole: Whole, tensors: Mapping[str, Tensor], start: int, is_replicated: bool) -> Fragment:
    flat = {kind: tensor.view(-1) for kind, tensor in tensors.items()}
    return Fragment(name, tuple(whole[name]["weight"].shape), start, flat, is_replicated)
