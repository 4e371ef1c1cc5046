"""The folder of a captions job without a language model: texts by a rule, some of them unfit."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from scaleclip.config import CacheConfig
from scaleclip.data.cache import ShardCache
from scaleclip.data.sidecar import sidecar_path, write_rows
from scaleclip.data.source import open_shards
from scaleclip.shard_folder import file_names

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
    """Write texts, sidecar and manifest.

    Args:
        out: folder of the job.
        shards: pattern of tars.
        make: from a sample's number, key and caption to (text, reason) by source.
        task: of the job.
        complete: whether it is.
        skip: shards that have no texts.
    """
    manifest, reader = open_shards("--data", [shards], None, ShardCache(CacheConfig(folder=str(out / "cache"))))
    number = 0
    for shard, (name, file) in enumerate(zip(manifest.names, file_names(manifest.names), strict=True)):
        keys, rows = reader.keys(shard), []
        for ordinal, key in enumerate(keys):
            caption = reader(shard, ordinal).members.get("txt", b"").decode()
            rows += [(key, source, *made) for source, made in make(number, key, caption).items()]
            number += 1
        if shard not in skip:
            write_texts(out / "texts" / f"{file}.parquet", rows)
            sources = list(dict.fromkeys(source for _, source, *_ in rows))
            fit = {(key, source): text for key, source, text, reason in rows if reason is None}
            columns = {source: pa.array([fit.get((key, source)) for key in keys], pa.string()) for source in sources}
            write_rows(sidecar_path(out / "sidecar", name), keys, pa.RecordBatch.from_pydict(columns))
    said = {"task": task, "model": "a rule of the tests", "complete": complete, "text": "txt"}
    (out / "manifest.json").write_text(json.dumps(said))
    return out


def write_texts(path: Path, rows: list[tuple[str, str, str, str | None]]) -> None:
    """A file of texts from (key, source, text, reason)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    keys, sources, texts, reasons = map(list, zip(*rows, strict=True)) if rows else ([], [], [], [])
    strings = {"key": keys, "source": sources, "text": texts, "reason": reasons, "prompt": ["p"] * len(rows)}
    table = {name: pa.array(values, pa.string()) for name, values in strings.items()}
    table |= {"model": pa.array(["rule"] * len(rows), pa.string()), "seed": pa.array([0] * len(rows), pa.int64())}
    pq.write_table(pa.table(table | {"tokens": pa.array([1] * len(rows), pa.int32())}), path)


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
