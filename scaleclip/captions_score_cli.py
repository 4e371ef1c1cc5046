"""The command `scaleclip captions score`. Imports inside, as in scaleclip/cli.py."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scaleclip.cli_arguments import Architecture
from scaleclip.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from scaleclip.captioning.scored import Score


def score(
    out: Annotated[
        str,
        typer.Argument(metavar="OUT", help="Folder of a captions job or of a sidecar; or tables of texts, with --text."),
    ],
    data: Annotated[
        list[str], typer.Option(help="The samples: tars, index.json of MDS: files, globs, brace ranges, URLs; repeatable.")
    ],
    model: Annotated[
        str | None, typer.Option(help="CLIP for cosines: a run, a checkpoint, or a model of transformers or open_clip.")
    ] = None,
    architecture: Architecture = None,
    against_text: Annotated[
        str | None,
        typer.Option(help="Where the original lies: a member or column, or json:field; none: as the job had it, or txt."),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="OUT is Parquet or JSON lines: score this column of them; repeatable.")
    ] = None,
    table_key: Annotated[str, typer.Option(help="Column of the tables that names the sample.")] = "key",
    by: Annotated[str, typer.Option(help="What it names: the sample's key, or a field of its metadata (uid).")] = "key",
    to: Annotated[
        Path | None, typer.Option(help="Local folder of score.html and score.json; none: OUT, or its job's folder.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Read so many samples, of shards drawn at random; none: all.")
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Samples drawn for the model.")] = 2048,
    seed: Annotated[int, typer.Option(min=0, help="Of all draws.")] = 0,
    image: Annotated[
        list[str] | None, typer.Option(help="Member or column of the image; repeatable; none: jpg, png, webp.")
    ] = None,
    manifest: Annotated[str | None, typer.Option(help="Folder of the shards' manifest; none: their *_stats.json.")] = None,
    cache: Annotated[str | None, typer.Option(help="Local folder for copies of remote shards.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples encoded at once.")] = 256,
) -> None:
    """Say what made texts are worth: words, variety, nearness to images, advice on mixing; as a page with samples.

    Writes score.html, which needs no network, and score.json.
    """
    import contextlib
    import json
    import tempfile

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    from scaleclip.captioning.made_texts import MadeTexts, job_of, open_made_texts
    from scaleclip.captioning.reading import Wanted
    from scaleclip.captioning.score import score as score_texts
    from scaleclip.captioning.scored import as_json, faults
    from scaleclip.captioning.tables import join_tables, refuse_job
    from scaleclip.config import CacheConfig, SourceConfig
    from scaleclip.config_io import named_architecture
    from scaleclip.data.cache import ShardCache
    from scaleclip.data.source import open_shards
    from scaleclip.evaluation.encoder import Encoder
    from scaleclip.files import write_atomic
    from scaleclip.report.console import wide_console
    from scaleclip.report.score_page import write_score_page
    from scaleclip.trained_model import load_model

    if text:
        refuse_job(out)
        if to is None:
            raise ConfigError("--text: OUT names tables, so say --to FOLDER for score.html and score.json")
    # a sidecar of a job is a part of its folder
    place = Path(out) if text else job_of(Path(out)) or Path(out)
    folder = to or place
    trained = load_model(model, named_architecture(architecture) if architecture else None) if model else None
    encoder = Encoder(trained.model, trained.tokenizer, trained.model_config.image.size, batch) if trained else None
    listed, reader = open_shards("--data", data, manifest, ShardCache(CacheConfig(folder=cache) if cache else CacheConfig()))
    console = wide_console()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with contextlib.ExitStack() as stack:
        made: MadeTexts
        if text:
            folder.mkdir(parents=True, exist_ok=True)
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix=".joined-", dir=folder))
            made = join_tables(listed, reader, out, text, Path(scratch), key_column=table_key, sample_key=by)
        else:
            made = open_made_texts(Path(out), listed)
            folder.mkdir(parents=True, exist_ok=True)
        original, members = against_text or made.origin.text or "txt", tuple(image) if image else SourceConfig().image
        # recaptions may be of images that never had a caption
        needs_original = bool(against_text or made.origin.text)
        wanted = Wanted(listed, reader, original, members, limit, pairs, seed, needs_original)
        progress = stack.enter_context(Progress(*columns, transient=True, console=console, disable=not console.is_terminal))
        tasks: dict[str, TaskID] = {}

        def show(doing: str, done: int, total: int) -> None:
            if doing not in tasks:
                tasks[doing] = progress.add_task(doing, total=total)
            progress.update(tasks[doing], completed=done)

        step = "" if trained is None or trained.step is None else f", step {trained.step:,}"
        found = score_texts(made, wanted, encoder, f"{model}{step}" if model else "", show)
        write_atomic(folder / "score.json", json.dumps(as_json(found), indent=2, ensure_ascii=False, allow_nan=False))
        page = write_score_page(found, folder, place.absolute().name)

    def say(line: str) -> None:
        # a file has no width to wrap lines at
        console.print(line, highlight=False, markup=False, soft_wrap=not console.is_terminal)

    console.print(_table(found))
    for fault in faults(found):
        say(f"Fault: {fault}")
    for sentence in found.advice.said:
        say(sentence)
    advice = found.advice
    mixed = ", ".join(f"{name} {weight:.2f} ({advice.effective[name]:.1%})" for name, weight in advice.weights.items())
    say(f"Advice, by the rule that the page states, weights (and the share of samples that will get each text): {mixed}")
    say(f"Page: {page}   open it in a browser")


def _table(found: "Score") -> "Table":
    from rich.markup import escape
    from rich.table import Table

    from scaleclip.captioning.plural import number_of

    title = f"{number_of(found.samples, 'sample')} of {number_of(found.shards, 'shard')}"
    table = Table("source", title=title, title_justify="left")
    for column in ("usable", "words", "changed", "distinct-2", *(["nearer to the image, 95 %"] if found.model else [])):
        table.add_column(column, justify="right")
    for each in (found.original, *found.sources):
        row = [
            f"{each.usable / each.rows:.1%}" if each.rows else "",
            f"{each.words.median:,.0f}" if each.words else "",
            "" if each.changed is None else f"{each.changed:.1%}",
            f"{each.distinct[1]:.3f}" if each.distinct else "",
        ]
        if each.nearness:
            nearer = each.nearness.nearer
            row.append(f"{nearer.value:.1%} ({nearer.low:.1%} - {nearer.high:.1%})")
        table.add_row(escape(each.name), *row)
    return table
