"""Features of the samples of shards. A shard is one rank's work and its file is written whole: any number of ranks writes the
same files, and a start after a crash does what is left."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from scaleclip.config import ModelConfig
from scaleclip.data.cache import ShardCache
from scaleclip.data.read_ahead import BadSample, Chunk
from scaleclip.data.tokenizer import Tokenizer
from scaleclip.distributed import World, all_or_none, gather_objects, on_main
from scaleclip.embedding.chunks import Inputs, Shards, Wanted
from scaleclip.embedding.folder import DType, FeatureFolder, Summary, architecture_digest, weights_digest
from scaleclip.errors import RunError
from scaleclip.files import writes_into
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.shard_folder import ShardOrigin, file_names, origins

_LOOK_S = 10.0  # between looks at what other ranks have finished

Show = Callable[[int, int, float], None]
"""(samples done, samples in all, samples a second), of this start and all ranks."""


class Embedder(NamedTuple):
    """The model."""

    name: str
    """What the user calls it."""
    step: int | None
    """Of the run that made it, if one did."""
    config: ModelConfig
    """What the model is."""
    model: DualEncoder
    """In evaluation mode."""
    tokenizer: Tokenizer


def embed(embedder: Embedder, wanted: Wanted, cache: ShardCache, out: Path, dtype: DType, world: World, show: Show) -> Summary:
    """Write the features of all shards that have none yet. Every rank calls, and all get what lies in the folder then.

    Args:
        embedder: the model; it computes in fp32.
        wanted: shards, and what of their samples.
        cache: local copies of remote shards.
        out: a new folder, or one that the same model began.
        dtype: of the features on disk.
        world: this rank.
        show: is told, on rank 0, how far all ranks are.

    Raises:
        ConfigError: no shard matches, two share a name, or `out` has features of another model or of other shards, or something
            else.
        RunError: a shard cannot be read, in which case the others are done; `out` cannot be written; a loader process died.
    """
    model, todo = embedder.model, list[int]()
    with all_or_none():
        size = embedder.config.image.size
        shards = Shards(wanted, cache, embedder.tokenizer, size)
        names = file_names(shards.manifest.names)
        identity = {
            "step": embedder.step, "weights": weights_digest(model), "architecture": architecture_digest(embedder.config),
            "image_size": size, "tokenizer": embedder.tokenizer.name, "text": wanted.text,
            "image": list(wanted.members) if wanted.images else None,
        }  # fmt: skip
        folder = FeatureFolder(out, wanted.columns, model.embed_dim, dtype, identity, embedder.name)
    of_shard = on_main(lambda: origins(shards.manifest, names))  # a look at every shard
    with all_or_none():
        if world.is_main:
            there = folder.begin(of_shard)
            todo = [shard for shard, name in enumerate(names) if name not in there]
    todo = gather_objects(todo)[0]
    progress = _Progress(folder, {names[shard]: int(shards.manifest.counts[shard]) for shard in todo}, show)
    failed = []
    chunks = shards.chunks(todo[world.rank :: world.size], pin_memory=world.device.type == "cuda")
    for shard, its_chunks in itertools.groupby(chunks, key=lambda chunk: chunk.piece.shard):
        name = names[shard]
        error = _embed_shard(model, its_chunks, folder, name, of_shard[name], progress if world.is_main else None)
        failed += [error] if error else []
    failed = [error for errors in gather_objects(failed) for error in errors]
    if world.is_main:
        progress.look()
    if failed:
        raise RunError(
            f"{len(failed)} of {len(names)} shards could not be read, the others are done; the first: {failed[0]}; start the "
            f"same command again for those"
        )
    summary = on_main(lambda: folder.summary())  # others may not see yet what this rank's disk has
    if world.is_main:
        folder.complete(names, summary)
    return summary


@torch.no_grad()
def _embed_shard(
    model: DualEncoder,
    chunks: Iterator[Chunk[Inputs]],
    folder: FeatureFolder,
    name: str,
    origin: ShardOrigin,
    progress: "_Progress | None",
) -> str:
    """Encode a shard and write its files; why it cannot be had, or an empty text."""
    device = model.logit_scale.device
    keys, bad, error = list[str](), list[BadSample](), ""
    parts: dict[str, list[Tensor]] = {column: [torch.zeros(0, folder.width)] for column in folder.columns}
    for chunk in chunks:
        error = error or chunk.error
        if error:
            continue
        keys += chunk.keys
        bad += chunk.bad
        if chunk.content is not None and chunk.content.pixels_BCHW is not None:
            parts["image"].append(model.encode_image(chunk.content.pixels_BCHW.to(device, non_blocking=True)).cpu())
        if chunk.content is not None and chunk.content.tokens_BT is not None:
            parts["text"].append(model.encode_text(chunk.content.tokens_BT.to(device, non_blocking=True)).cpu())
        if progress:
            progress.add(chunk.piece.stop - chunk.piece.start)
    if error:
        if progress:
            progress.end_shard(is_there=False)
        return error
    with writes_into(folder.path):
        folder.write(name, keys, {column: torch.cat(some) for column, some in parts.items()}, bad, origin)
    if progress:
        progress.end_shard(is_there=True)
    return ""


class _Progress:
    """How far all ranks are: what others have finished is seen by their files, now and then."""

    def __init__(self, folder: FeatureFolder, counts: Mapping[str, int], show: Show) -> None:
        self._folder, self._counts, self._show = folder, counts, show
        self._begun_s = self._looked_s = time.monotonic()
        self._seen = self._own_since = self._own_open = 0

    def add(self, num_samples: int) -> None:
        """Samples of a shard of this rank's, which is written when all of them are encoded."""
        self._own_open += num_samples
        if time.monotonic() - self._looked_s > _LOOK_S:
            self.look()
        else:
            self._tell()

    def end_shard(self, *, is_there: bool) -> None:
        """It is written, and will be seen by its file, or cannot be had."""
        self._own_since += self._own_open if is_there else 0
        self._own_open = 0

    def look(self) -> None:
        """See what is finished."""
        self._looked_s = time.monotonic()
        self._seen = sum(self._counts.get(name, 0) for name in self._folder.finished())
        self._own_since = 0
        self._tell()

    def _tell(self) -> None:
        done, total = self._seen + self._own_since + self._own_open, sum(self._counts.values())
        self._show(min(done, total), total, done / max(time.monotonic() - self._begun_s, 1e-9))
