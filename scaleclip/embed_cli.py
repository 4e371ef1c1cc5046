"""The command `scaleclip embed`. Imports inside, as in scaleclip/cli.py."""

import os
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from scaleclip.cli_arguments import Ranks
from scaleclip.start_ranks import start_ranks

_LINE_S = 10.0  # between lines where there is no terminal


def embed(
    reference: Annotated[
        Path,
        typer.Argument(
            metavar="REFERENCE", help="A run (its newest checkpoint), a checkpoint, or a model of transformers or open_clip."
        ),
    ],
    data: Annotated[
        list[str], typer.Option(help="Tars, index.json of MDS, tables of rows: files, globs, brace ranges, URLs; repeatable.")
    ],
    out: Annotated[Path, typer.Option(help="Local folder of the features.")],
    what: Annotated[Literal["images", "texts", "both"], typer.Option(help="What to encode of a sample.")] = "images",
    text: Annotated[str, typer.Option(help="Where the text lies: a member or column, or json:field.")] = "txt",
    image: Annotated[
        list[str] | None, typer.Option(help="Member or column of the image; repeatable; none: jpg, png, webp.")
    ] = None,
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="Of the features on disk.")] = "float32",
    manifest: Annotated[str | None, typer.Option(help="Folder of the shards' manifest; none: their *_stats.json.")] = None,
    cache: Annotated[str | None, typer.Option(help="Local folder for copies of remote shards.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples encoded at once.")] = 256,
    workers: Annotated[int | None, typer.Option(min=0, help="Loader processes of a rank; none: its share of the CPUs.")] = None,
    ranks: Ranks = 1,
) -> None:
    """Write features of images or texts, a Parquet file a shard, with keys; started again it does what is left."""
    start_ranks(ranks)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from scaleclip import distributed
    from scaleclip.checkpoint.folders import newest_whole
    from scaleclip.config import CacheConfig
    from scaleclip.data.cache import ShardCache
    from scaleclip.embedding.chunks import Wanted
    from scaleclip.embedding.embed import Embedder
    from scaleclip.embedding.embed import embed as embed_shards
    from scaleclip.trained_model import load_model

    world = distributed.init()
    # the newest checkpoint may be another one in a moment
    path = distributed.on_main(lambda: newest_whole(reference) if (reference / "checkpoints").is_dir() else reference)
    with distributed.all_or_none():
        trained = load_model(str(path))
    size = trained.model_config.image.size
    embedder = Embedder(str(reference), trained.step, trained.model, trained.tokenizer, size)
    named = {"members": tuple(image)} if image else {}
    wanted = Wanted(
        tuple(data), manifest, what != "texts", **named, text=None if what == "images" else text, batch=batch,
        workers=max((os.cpu_count() or 1) // world.local_size, 1) if workers is None else workers,
    )  # fmt: skip
    console = Console()
    progress = Progress(
        TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal or not world.is_main,
    )  # fmt: skip
    task = progress.add_task("", total=None, rate="")
    said_s, said_done = time.monotonic(), 0

    def show(done: int, total: int, rate: float) -> None:
        nonlocal said_s, said_done
        progress.update(task, completed=done, total=total, rate=f"{rate:,.0f} samples/s")
        is_time = time.monotonic() - said_s > _LINE_S or done == total
        if not console.is_terminal and is_time and done != said_done:
            said_s, said_done = time.monotonic(), done
            left = f", {(total - done) / rate / 60:,.1f} min left" if rate and done < total else ""
            console.print(f"{done:,} of {total:,} samples, {rate:,.0f} a second{left}", highlight=False)

    cache_config = CacheConfig(folder=cache) if cache else CacheConfig()
    with progress:
        summary = embed_shards(embedder, wanted, ShardCache(cache_config), out, dtype, world, show)
    distributed.shutdown()
    if world.is_main:
        console.print(f"{out}: {summary.samples:,} samples of {summary.shards:,} shards have features", highlight=False)
        if summary.faults:
            causes = ", ".join(f"{cause}: {count:,}" for cause, count in summary.faults.items())
            console.print(f"{sum(summary.faults.values()):,} have none ({causes}): see {out}/faults", highlight=False)
