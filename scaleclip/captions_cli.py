"""The commands `scaleclip captions ...`. Imports inside, as in scaleclip/cli.py."""

from typing import Annotated

import typer

from scaleclip.cli_arguments import RunFolder

captions_app = typer.Typer(no_args_is_help=True, help="Look at captions.")


@captions_app.callback()
def _group() -> None:
    pass  # with a single command typer would leave out its name


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
