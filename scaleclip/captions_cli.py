"""The commands `scaleclip captions ...`. Imports inside, as in scaleclip/cli.py."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from scaleclip.captions_score_cli import score
from scaleclip.cli_arguments import Ranks, RunFolder
from scaleclip.start_ranks import start_ranks

if TYPE_CHECKING:
    import torch

    from scaleclip.captioning.job import Task

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a model of transformers.")]
Data = Annotated[
    list[str], typer.Option(help="Tars, index.json of MDS, tables of rows: files, globs, brace ranges, URLs; repeatable.")
]
Out = Annotated[Path, typer.Option(help="Folder of the texts, which all ranks and tasks see; started again the job goes on.")]
Manifest = Annotated[str | None, typer.Option(help="Folder of the shards' manifest; none: their *_stats.json.")]
Cache = Annotated[str | None, typer.Option(help="Local folder for copies of remote shards.")]
Batch = Annotated[int, typer.Option(min=1, help="Texts made at once.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of all that is drawn.")]
Weights = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Of the weights; auto: bfloat16 on a GPU, else float32."),
]

captions_app = typer.Typer(no_args_is_help=True, help="Make captions by other models, judge them, and look at captions.")


@captions_app.command()
def sample(
    run: RunFolder,
    number: Annotated[int, typer.Option(min=1, help="Training samples.")] = 8,
) -> None:
    """Print what the caption decoder of a run's newest checkpoint writes, beside what it read and what was asked for."""
    from rich.console import Console
    from rich.table import Table

    from scaleclip.written_captions import written_captions

    table = Table("sample", "read beside the image", "to write", "written")
    for row in written_captions(run, number):
        table.add_row(*row)
    Console().print(table)


@captions_app.command()
def rewrite(
    model: Model,
    data: Data,
    out: Out,
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="Examples: chatgpt, bard, mscoco, human, or NAME=FILE (YAML or JSON lines of input, output); repeatable; "
            "none: these four."
        ),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Sentence before the examples; none: a usual one.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Ask in a turn of a chat; none: if the model has a template of one.")
    ] = None,
    text: Annotated[str, typer.Option(help="Where the caption lies: a member or column, or json:field.")] = "txt",
    temperature: Annotated[float, typer.Option(min=0, help="Of the draw of tokens; 0: the likeliest.")] = 0.9,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="Probability of the tokens that are drawn from.")] = 0.95,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of a rewrite; one that is cut off there is not fit.")] = 77,
    batch: Batch = 32,
    seed: Seed = 0,
    dtype: Weights = "auto",
    manifest: Manifest = None,
    cache: Cache = None,
    ranks: Ranks = 1,
) -> None:
    """Rewrite captions by a language model, once for each source of examples (LaCLIP)."""
    start_ranks(ranks)
    from scaleclip.captioning.examples import SHIPPED, load_sources
    from scaleclip.captioning.generation import Sampling
    from scaleclip.captioning.language_model import LanguageModel
    from scaleclip.captioning.pretrained import folder_digest
    from scaleclip.captioning.prompt import TASK
    from scaleclip.captioning.rewrite import Rewriting

    examples, sampling = load_sources(source or SHIPPED), Sampling(temperature, top_p, max_tokens)

    def load(device: "torch.device") -> "Task[Any, Any]":
        loaded = LanguageModel(model, dtype, device, chat=chat)
        digest = folder_digest(model)
        return Rewriting(loaded, str(model), digest, examples, task or TASK, sampling, text=text, batch=batch, seed=seed)

    _run("rewriting", load, data, manifest, cache, out, workers=1)


@captions_app.command()
def recaption(
    model: Model,
    data: Data,
    out: Out,
    prompt: Annotated[str | None, typer.Option(help="What is asked of each image; none: Recap-DataComp's.")] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="Member or column of the image; repeatable; none: jpg, png, webp.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of a caption.")] = 128,
    batch: Batch = 32,
    dtype: Weights = "auto",
    manifest: Manifest = None,
    cache: Cache = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Loader processes of a rank; none: its share of the CPUs.")] = None,
    ranks: Ranks = 1,
) -> None:
    """Describe images by a vision-language model, greedily (Recap-DataComp)."""
    start_ranks(ranks)
    from scaleclip.captioning.generation import Sampling
    from scaleclip.captioning.pretrained import folder_digest
    from scaleclip.captioning.recaption import PROMPT, Recaptioning
    from scaleclip.captioning.vision_language_model import VisionLanguageModel

    asked = prompt or PROMPT
    named: dict[str, Any] = {"image": image} if image else {}

    def load(device: "torch.device") -> "Task[Any, Any]":
        loaded = VisionLanguageModel(model, asked, dtype, device)
        sampling = Sampling(temperature=0, max_tokens=max_tokens)
        return Recaptioning(loaded, str(model), folder_digest(model), asked, sampling, batch=batch, **named)

    _run("recaptioning", load, data, manifest, cache, out, workers)


def _run(
    what: str,
    load: Callable[["torch.device"], "Task[Any, Any]"],
    data: list[str],
    manifest: str | None,
    cache: str | None,
    out: Path,
    workers: int | None,
) -> None:
    from scaleclip import distributed
    from scaleclip.captioning.job import Data as Opened
    from scaleclip.captioning.job import write_texts
    from scaleclip.config import CacheConfig
    from scaleclip.data.cache import ShardCache
    from scaleclip.data.read_ahead import default_workers
    from scaleclip.data.source import open_shards
    from scaleclip.shown_progress import ShownProgress

    world = distributed.init(timeout=distributed.PATIENT)
    processes = default_workers(world.local_size) if workers is None else workers
    with distributed.all_or_none():
        # first: it takes less long than a model
        shards = open_shards("--data", data, manifest, ShardCache(CacheConfig(folder=cache) if cache else CacheConfig()))
        made = load(world.device)
    with ShownProgress(what, "texts", quiet=not world.is_main) as progress:
        summary = write_texts(
            made, Opened(*shards, processes), out, world,
            lambda news: progress.show(news.done, news.total, news.texts_per_s, news.said()),
        )  # fmt: skip
    distributed.shutdown()
    if not world.is_main:
        return
    counts, there = summary.whole, f"{summary.shards:,} shard" + "s" * (summary.shards != 1)
    if summary.left:
        said = [f"{out} holds {there}, {summary.left:,} are left to other tasks of the job array"]
    else:
        found = f"{counts.texts:,} texts of {summary.samples:,} samples in {there}"
        said = [f"{out} holds {found}, {counts.fit:,} fit for training, in {out}/sidecar"]
    if counts.reasons:
        causes = ", ".join(f"{reason}: {number:,}" for reason, number in counts.reasons.items())
        said.append(
            f"{sum(counts.reasons.values()):,} are not ({causes}): see {out}/texts, or some of them by `captions score`"
        )
    for line in said:
        progress.console.print(line, highlight=False, soft_wrap=True)


captions_app.command()(score)
