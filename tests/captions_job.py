"""The folder of a captions job without a language model: texts by a rule, some of them unfit."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from scaleclip.captioning import journal
from scaleclip.captioning.folder import CaptionFolder
from scaleclip.config import CacheConfig
from scaleclip.data.cache import ShardCache
from scaleclip.data.source import open_shards
from scaleclip.shard_folder import file_names, origins

Made = tuple[str, str | None]
ADJECTIVES = ("small", "bright", "plain", "round", "quiet", "old")


def write_job(
    out: Path,
    shards: str,
    make: Callable[[int, str, str], dict[str, Made]],
    *,
    task: str = "rewrite",
    complete: bool = True,
    skip: tuple[int, ...] = (),
) -> Path:
    """Write a job's folder, by what a job writes it with.

    Args:
        out: the folder, a new one.
        shards: pattern of tars.
        make: from a sample's number, key and caption to (text, reason) by source.
        task: of the job.
        complete: whether it is.
        skip: shards that have no texts.
    """
    manifest, reader = open_shards("--data", [shards], None, ShardCache(CacheConfig(folder=str(out.parent / "cache"))))
    names, number = file_names(manifest.names), itertools.count()
    made = list[list[journal.Made]]()
    for shard in range(len(names)):
        made.append([])
        for ordinal, key in enumerate(reader.keys(shard)):
            caption = reader(shard, ordinal).members.get("txt", b"").decode(errors="replace")
            for source, (text, reason) in make(next(number), key, caption).items():
                made[-1].append(journal.Made(ordinal, key, source, text, reason, len(text.split())))
    sources = list(dict.fromkeys(row.source for rows in made for row in rows))
    made_by = {"prompt": "p", "model": "a rule of the tests", "seed": 0}
    folder, of_shard = CaptionFolder(out, sources, {"task": task, "text": "txt"}, made_by, 1), origins(manifest, names)
    folder.begin(of_shard)
    for shard, name in enumerate(names):
        if shard not in skip:
            folder.write(name, manifest.names[shard], reader.keys(shard), made[shard], of_shard[name])
    if complete:
        folder.complete(folder.summary(names), dict(zip(names, manifest.names, strict=True)))
    return out


def replace_texts(path: Path, rows: list[tuple[str, str, str, str | None]]) -> None:
    """Give a shard's file other texts: (key, source, text, reason)."""
    named = [dict(zip(("key", "source", "text", "reason"), row, strict=True)) for row in rows]
    pq.write_table(pa.Table.from_pylist(named, pq.read_schema(path)), path)


def by_rule(number: int, key: str, caption: str) -> dict[str, Made]:
    """Two sources: one that adds words, one that repeats the caption; every tenth text is unfit."""
    adjective = ADJECTIVES[number % len(ADJECTIVES)]
    human: Made = (f"A {adjective} drawing of {caption}, seen on a white ground.", None)
    if number % 10 == 3:
        human = ("", "empty")
    if number % 10 == 7:
        human = (f"{adjective} {caption} " * 12, "loop")
    copied = caption if number % 4 == 0 else f"{adjective} {caption}"
    return {"human": human, "mscoco": (copied.upper(), None)}
