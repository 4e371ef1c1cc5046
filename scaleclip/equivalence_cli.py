"""The command `scaleclip verify-equivalence`. Imports inside, as in scaleclip/cli.py."""

from typing import TYPE_CHECKING, Annotated

import typer

from scaleclip.errors import ConfigError, RunError

if TYPE_CHECKING:
    from rich.table import Table

    from scaleclip.equivalence.verify import Verdict


def verify_equivalence(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, for example configs/demo.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, for example loss.kind=sigmoid.")
    ] = None,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, processes on this machine's CPU.")] = "1,2,4",
    micro_batches: Annotated[str, typer.Option(help="Pairs that a rank encodes at once.")] = "1,2,8",
    stages: Annotated[str, typer.Option(help="ZeRO stages.")] = "0,1,2,3",
    schedules: Annotated[str, typer.Option(help="How features meet across ranks.")] = "ring,gather",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each layout.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="A few layouts in which every pair of these values meets.")] = False,
) -> None:
    """Check that a run takes the same steps however it is laid out.

    The configuration is shrunk to this machine, and made-up pairs are trained on: its data need not exist. Every combination
    of ranks, micro batch, ZeRO stage and schedule is held against one process in fp32 that takes the whole global batch at
    once, in plain PyTorch. The exit code is 1 if one of them differs by more than rounding.
    """
    from rich.console import Console
    from rich.live import Live

    from scaleclip.config_io import load_config
    from scaleclip.config_rules import validate
    from scaleclip.equivalence.layouts import grid, pairwise
    from scaleclip.equivalence.shrink import shrink
    from scaleclip.equivalence.verify import LIMIT, Verifier
    from scaleclip.files import resolve_path

    whole = load_config(resolve_path(config), overrides or ())
    validate(whole, 1)
    layouts = grid(
        _numbers("--ranks", ranks),
        _numbers("--micro-batches", micro_batches),
        _choices("--stages", stages, {str(stage): stage for stage in (0, 1, 2, 3)}),
        _choices("--schedules", schedules, {"ring": "ring", "gather": "gather"}),
    )
    small = shrink(whole)
    console = Console()
    console.print("shrunk: " + ", ".join(small.changes), highlight=False)
    table, verdicts = _table(small.config.train.global_batch, LIMIT), []
    with Live(table, console=console):
        for verdict in Verifier(small.config, steps)(pairwise(layouts) if quick else layouts):
            verdicts.append(verdict)
            table.add_row(*_row(verdict), style="" if verdict.holds else "bold red")
    beyond = [verdict for verdict in verdicts if not verdict.holds]
    if beyond:
        worst = max(beyond, key=lambda verdict: max(verdict.differences.gradients))
        raise RunError(
            f"{len(beyond)} of {len(verdicts)} layouts differ by more than {LIMIT:.0e}; worst gradient: "
            f"{worst.differences.worst_parameter}, at {_name(worst)}"
        )


def _numbers(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"{option}={text}: give numbers above 0 with commas between them, for example 1,2")
    return [int(part) for part in parts]


def _choices[T](option: str, text: str, choices: dict[str, T]) -> list[T]:
    parts = text.split(",")
    if not set(parts) <= choices.keys():
        raise ConfigError(f"{option}={text}: choose among {', '.join(choices)}, with commas between them")
    return [choices[part] for part in parts]
