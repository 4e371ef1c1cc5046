"""The command `scaleclip export`. Imports inside, as in scaleclip/cli.py."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from scaleclip.cli_arguments import Architecture


class Format(StrEnum):
    """Whose folder is written."""

    TRANSFORMERS = "transformers"
    OPEN_CLIP = "open_clip"


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A run (its newest whole checkpoint), RUN/checkpoints/step_X, or another library's model to convert.",
        ),
    ],
    to: Annotated[Format, typer.Option(help="The library that is to load it.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    architecture: Architecture = None,
) -> None:
    """Write a model as a folder that transformers or open_clip loads, with a model card.

    Memory holds one tensor at a time; any number of ranks and any ZeRO stage may have saved it.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from scaleclip.config_io import named_architecture
    from scaleclip.exchange.export import check_target, prepare, write
    from scaleclip.exchange.source import open_source

    check_target(out, force=force)
    opened = open_source(source, named_architecture(architecture) if architecture else None)
    prepared = prepare(opened, to.value)
    with Progress(TextColumn("weights"), BarColumn(), DownloadColumn(), transient=True) as progress:
        task = progress.add_task("weights", total=prepared.num_bytes)
        write(prepared, opened, out, lambda size: progress.advance(task, size))
    typer.echo(f"{out}: {prepared.kind}, {prepared.num_bytes / 2**20:,.0f} MiB of weights. Its README.md says how to load it.")
