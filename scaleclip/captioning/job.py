"""A job that makes texts of the samples of shards. A shard is one rank's work and its files are written whole: any number of
ranks and of tasks of a job array writes the same files, and a start after a kill goes on at the batch that was cut short."""

import contextlib
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from scaleclip.captioning.folder import CaptionFolder, Summary
from scaleclip.captioning.journal import Journal, Made, num_batches
from scaleclip.captioning.progress import Progress, Show
from scaleclip.data.manifest import Manifest
from scaleclip.data.read_ahead import BadSample, Chunk, Piece, ReadAhead
from scaleclip.data.sample import Sample, SampleError
from scaleclip.data.source import Reader
from scaleclip.distributed import World, all_or_none, array_share, gather_objects, on_main
from scaleclip.errors import RunError
from scaleclip.shard_folder import ShardOrigin, file_names, origins

# of samples, where it may be the shard's; a shard with nothing else is as good as missing
_DAMAGED = {"truncated_shard", "corrupt_shard", "wrong_checksum"}
Item = TypeVar("Item")
Content = TypeVar("Content")


class Data(NamedTuple):
    """Which samples."""

    manifest: Manifest
    reader: Reader
    workers: int = 0
    """Loader processes of a rank."""


class Task(Protocol[Item, Content]):
    """What is made of samples, by which model."""

    sources: Sequence[str]
    """Of texts; each sample gets one of every."""
    model_name: str
    """What the user calls the model."""
    prompt_name: str
    """Of what the model is asked, an id."""
    seed: int
    batch: int
    """Texts made at once."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What all texts in a folder share, as JSON has it."""

    def pieces(self, shard: int, num_samples: int, done: int) -> list[Piece]:
        """What must be read of a shard to go on where `done` batches are made."""

    def prepare(self, sample: Sample, shard: int, ordinal: int) -> Item:
        """What is wanted of a sample. Raises SampleError where there is nothing to make a text of."""

    def collate(self, items: Sequence[Item]) -> Content:
        """What the model takes of a piece."""

    def make(self, shard: str, chunk: Chunk[Content], done: int) -> Iterator[list[Made]]:
        """Batches of texts of a piece, a text a sample and source in all, without the first `done` batches of the shard.

        What a batch is, and its draw, depend on the shard's name and the batch's number alone, so that they come out the same
        wherever a start goes on.
        """


def write_texts(task: Task[Any, Any], data: Data, out: Path, world: World, show: Show) -> Summary:
    """Make the texts of all shards that have none yet. Every rank calls, and all get what lies in the folder then.

    Args:
        task: what to make.
        data: of which samples.
        out: a new folder, or one that the same task began.
        world: this rank.
        show: is told, on rank 0, how far all ranks of all tasks of the job array are.

    Raises:
        ConfigError: two shards share a name, or `out` has texts of another model or task or of other shards, or
            something else.
        RunError: a shard cannot be read, has changed, or is one of which nothing can be made before any other is done, in
            which case the others are done; nothing can be made of two; `out` cannot be written, or another job writes
            there; a loader process died; the GPU's memory is full.
    """
    there, (manifest, reader, _) = set[str](), data
    with all_or_none():
        names, share = file_names(manifest.names), array_share(world)
    of_shard = on_main(lambda: origins(manifest, names))  # a look at every shard
    with all_or_none():
        made_by = {"prompt": task.prompt_name, "model": task.model_name, "seed": task.seed}
        folder = CaptionFolder(out, task.sources, task.identity, made_by, task.batch)
        if world.is_main:
            there = folder.begin(of_shard)
    there = gather_objects(there)[0]
    number, count = share
    # tasks of an array start at different times and see different shards done, so the deal is of all
    mine = [shard for shard in range(number, len(names), count) if names[shard] not in there]
    its_names = [names[shard] for shard in mine]
    depends_on = {name: _depends_on(task, of_shard[name]) for name in its_names}
    done = {shard: num_batches(folder.journal(names[shard]), depends_on[names[shard]]) for shard in mine}
    pieces = {shard: task.pieces(shard, int(manifest.counts[shard]), done[shard]) for shard in mine}
    ahead = ReadAhead(manifest, reader, task.prepare, task.collate, data.workers)
    chunks = ahead.chunks(list(itertools.chain(*pieces.values())), pin_memory=world.device.type == "cuda")
    texts = {name: each.samples * len(task.sources) for name, each in of_shard.items()}
    progress = Progress(folder, share, texts, show if world.is_main else None)
    failed, nothing_made = list[str](), 0
    for shard in mine:
        name, its_chunks = names[shard], itertools.islice(chunks, len(pieces[shard]))
        journal = Journal(folder.journal(name), depends_on[name])
        progress.begin_shard(list(itertools.chain(*journal.batches)))
        try:
            error = _make_shard(task, folder, name, its_chunks, done[shard], journal, progress)
        except _NothingMade as nothing:
            error, nothing_made = str(nothing), nothing_made + 1
            # a shard of many may be so, and is left for a start that finds others done; two of a rank's are the settings
            if nothing_made == 2:
                raise RunError(error) from None
        if not error:
            error = _write_shard(folder, manifest, reader, shard, name, journal, of_shard[name])
        journal.close() if error else journal.remove()
        failed += [error] if error else []
        progress.end_shard()
    progress.tell()
    failed = [error for errors in gather_objects(failed) for error in errors]
    if world.is_main:
        progress.tell()
    if failed:
        raise RunError(
            f"{len(failed)} of {len(names)} shards could not be made"
            + ", the others are done" * (len(failed) < len(names))
            + f"; the first: {failed[0]}; mend what is wrong, and start the same command again for those"
        )
    summary = on_main(lambda: folder.summary(names))  # others may not see yet what this rank's disk has
    if world.is_main and not summary.left:
        progress.end()
        folder.complete(summary, dict(zip(names, manifest.names, strict=True)))
    return summary


class _NothingMade(Exception):
    """Of a shard, where no shard is done yet; why."""


def batch_seed(seed: int, *place: str | int) -> int:
    """Of what is drawn at a place: a shard's name, a source, a batch's number."""
    words = "/".join(map(str, (seed, *place)))
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8]) >> 1


def without_text(bad: Sequence[BadSample], sources: Sequence[str]) -> list[Made]:
    """Rows of samples of which nothing can be made."""
    return [Made(each.sample, each.key, source, "", each.cause, 0) for each in bad for source in sources]


def _make_shard(
    task: Task[Any, Content],
    folder: CaptionFolder,
    name: str,
    chunks: Iterator[Chunk[Content]],
    done: int,
    journal: Journal,
    progress: Progress,
) -> str:
    """Make what is left of a shard; why it cannot be had, or an empty text."""
    if len(journal.batches) != done:
        raise RunError(f"another process has gone on with {name}: end one of the two jobs that write into this folder")
    error = detail = ""
    for chunk in chunks:
        error = error or chunk.error
        detail = detail or next((f" ({bad.detail})" for bad in chunk.bad if bad.detail), "")
        if error:
            continue
        for rows in task.make(name, chunk, done):
            journal.append(rows)
            progress.add(rows)
    reasons = {row.reason for row in itertools.chain(*journal.batches)}
    if not error and reasons and reasons <= _DAMAGED:
        journal.remove()
        return f"{name} has no sample that can be read ({', '.join(sorted(map(str, reasons)))}){detail}"
    causes = {"" if row.tokens else row.reason for row in itertools.chain(*journal.batches)}
    if not error and len(causes) == 1 and "" not in causes and not folder.finished():
        journal.remove()
        raise _NothingMade(
            f"{name} has no sample of which a text could be made, all are {causes.pop()}{detail}: see that --text or --image "
            f"names what the shards have and that the model takes it, or leave this shard out of --data"
        )
    return error


def _write_shard(
    folder: CaptionFolder,
    manifest: Manifest,
    reader: Reader,
    shard: int,
    name: str,
    journal: Journal,
    origin: ShardOrigin,
) -> str:
    try:
        keys = reader.keys(shard)
    except SampleError as fault:
        return str(fault)
    made = list(itertools.chain(*journal.batches))
    ordinals = (manifest.ordinal(shard, index) for index in range(int(manifest.counts[shard])))
    wanted = Counter(itertools.product(ordinals, folder.sources))
    # batches hold samples by their content, and a shard may change between the starts of a job
    if Counter((row.ordinal, row.source) for row in made) != wanted:
        journal.remove()
        return f"{name} has changed since its first batches were made, which are now thrown away"
    folder.write(name, manifest.names[shard], keys, made, origin)
    return ""


def _depends_on(task: Task[Any, Any], origin: ShardOrigin) -> dict[str, Any]:
    """All that a batch of a shard depends on, whatever the model is called."""
    changed = None
    with contextlib.suppress(OSError):  # remote, or stored compressed
        changed = os.stat(origin.path).st_mtime_ns
    return {
        **task.identity, "prompt": task.prompt_name, "seed": task.seed, "batch": task.batch, **origin._asdict(),
        "changed": changed, **{name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }  # fmt: skip
