"""The command `scaleclip embed`. Imports inside, as in scaleclip/cli.py."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from scaleclip.cli_arguments import Architecture, Ranks
from scaleclip.start_ranks import start_ranks


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
    architecture: Architecture = None,
    ranks: Ranks = 1,
) -> None:
    """Write features of images or texts, a Parquet file a shard, with keys; started again it does what is left."""
    start_ranks(ranks)
    from scaleclip import distributed
    from scaleclip.checkpoint.folders import newest_whole
    from scaleclip.config import CacheConfig
    from scaleclip.config_io import named_architecture
    from scaleclip.data.cache import ShardCache
    from scaleclip.data.read_ahead import default_workers
    from scaleclip.embedding.chunks import Wanted
    from scaleclip.embedding.embed import Embedder
    from scaleclip.embedding.embed import embed as embed_shards
    from scaleclip.shown_progress import ShownProgress
    from scaleclip.trained_model import load_model

    world = distributed.init(timeout=distributed.PATIENT)
    # the newest checkpoint may be another one in a moment
    path = distributed.on_main(lambda: newest_whole(reference) if (reference / "checkpoints").is_dir() else reference)
    with distributed.all_or_none():
        trained = load_model(str(path), named_architecture(architecture) if architecture else None)
    embedder = Embedder(str(reference), trained.step, trained.model_config, trained.model, trained.tokenizer)
    named = {"members": tuple(image)} if image else {}
    wanted = Wanted(
        tuple(data), manifest, what != "texts", **named, text=None if what == "images" else text, batch=batch,
        workers=default_workers(world.local_size) if workers is None else workers,
    )  # fmt: skip
    cache_config = CacheConfig(folder=cache) if cache else CacheConfig()
    with ShownProgress("embedding", "samples", quiet=not world.is_main) as progress:
        summary = embed_shards(embedder, wanted, ShardCache(cache_config), out, dtype, world, progress.show)
    distributed.shutdown()
    if world.is_main:
        console = progress.console
        console.print(f"{out}: {summary.samples:,} samples of {summary.shards:,} shards have features", highlight=False)
        if summary.faults:
            causes = ", ".join(f"{cause}: {count:,}" for cause, count in summary.faults.items())
            console.print(f"{sum(summary.faults.values()):,} have none ({causes}): see {out}/faults", highlight=False)
