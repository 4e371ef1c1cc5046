"""The command `scaleclip verify-equivalence`. Imports inside, as in scaleclip/cli.py."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from scaleclip.cli_arguments import ConfigFile, Overrides
from scaleclip.errors import ConfigError, RunError

if TYPE_CHECKING:
    from rich.table import Table

    from scaleclip.equivalence.verify import Verdict

T = TypeVar("T")


def verify_equivalence(
    config: ConfigFile,
    overrides: Overrides = None,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, processes on this machine's CPU.")] = "1,2,4",
    micro_batches: Annotated[str, typer.Option(help="Pairs that a rank encodes at once.")] = "1,2,8",
    stages: Annotated[str, typer.Option(help="ZeRO stages.")] = "0,1,2,3",
    schedules: Annotated[str, typer.Option(help="How features meet across ranks.")] = "ring,gather",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each layout.")] = 3,
    run_stage: Annotated[int, typer.Option(min=0, help="Which of the run's own `stages`.")] = 0,
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
    from scaleclip.equivalence.layouts import SCHEDULES, STAGES, grid, pairwise
    from scaleclip.equivalence.shrink import shrink
    from scaleclip.equivalence.verify import LATER_LIMIT, LIMIT, Verifier
    from scaleclip.files import resolve_path
    from scaleclip.stages import stages_of

    whole = load_config(resolve_path(config), overrides or ())
    validate(whole, 1)
    layouts = grid(
        _numbers("--ranks", ranks),
        _numbers("--micro-batches", micro_batches),
        _choices("--stages", stages, STAGES),
        _choices("--schedules", schedules, SCHEDULES),
    )
    parts = stages_of(whole)
    if run_stage >= len(parts):
        raise ConfigError(f"--run-stage={run_stage}: the run's stages are 0 to {len(parts) - 1}")
    small = shrink(parts[run_stage].config)
    global_batch = small.config.train.global_batch
    if max(layout.world_size for layout in layouts) > global_batch:
        raise ConfigError(f"--ranks={ranks}: the shrunk global batch has {global_batch} pairs, one a rank at least")
    console = Console()
    console.print("Shrunk: " + ", ".join(small.changes), highlight=False)
    verdicts: list[Verdict] = []
    table = _table(f"{config}, {steps} steps of {global_batch} pairs", LIMIT)
    with Live(table, console=console):
        for verdict in Verifier(small.config, steps)(pairwise(layouts) if quick else layouts):
            verdicts.append(verdict)
            table.add_row(*_row(verdict), style=None if verdict.holds else "bold red")
    beyond = Counter(verdict.differences.worst_parameter for verdict in verdicts if not verdict.holds)
    if beyond:
        names = ", ".join(f"{name} ({count})" for name, count in beyond.most_common())
        raise RunError(
            f"{beyond.total()} of {len(verdicts)} layouts differ by more than {LIMIT:.0e} ({LATER_LIMIT:.0e} for gradients "
            f"after the first step); the parameters whose gradients are furthest away, with the number of layouts: {names}"
        )


def _table(title: str, limit: float) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    caption = (
        f"Largest differences from one process; the limit is {limit:.0e}. Loss: relative. Gradients: |difference| / largest "
        "|gradient|. Parameters: in learning rates, beyond their own rounding, each element weighed by |gradient| / largest "
        "|gradient|, since AdamW moves one whose gradient is only rounding as far as the others. Reduced, gathered: what a "
        "rank hands to DeepSpeed's collectives in a step, in sizes of the gradients. Took: seconds."
    )
    table = Table(
        title=title, title_justify="left", caption=caption, caption_justify="left", box=SIMPLE_HEAD, show_edge=False,
        padding=0, collapse_padding=True,
    )  # fmt: skip
    left = ("schedule",)
    columns = ("ranks", "micro", "ZeRO", *left, "loss", "first\ngrads", "last\ngrads", "params", "reduced", "gathered", "took")
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    return table


def _row(verdict: "Verdict") -> list[str]:
    layout, found = verdict.layout, verdict.differences
    errors = (found.loss, found.gradients[0], found.gradients[-1], found.parameters)
    return [
        *map(str, layout),
        *(f"{error:.1e}" for error in errors),
        *(f"{sent / verdict.gradient_bytes:.2f} x" for sent in verdict.traffic),
        f"{verdict.seconds:.1f}",
    ]


def _numbers(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"{option}={text}: give numbers above 0 with commas between them, for example 1,2")
    return [int(part) for part in parts]


def _choices(option: str, text: str, choices: Sequence[T]) -> list[T]:
    named = {str(choice): choice for choice in choices}
    parts = text.split(",")
    if not set(parts) <= named.keys():
        raise ConfigError(f"{option}={text}: choose among {', '.join(named)}, with commas between them")
    return [named[part] for part in parts]
