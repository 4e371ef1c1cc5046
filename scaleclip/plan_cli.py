"""The command `scaleclip plan`. Imports inside, as in scaleclip/cli.py."""

from pathlib import Path
from typing import Annotated

import typer

from scaleclip.cli_arguments import ConfigFile, Overrides
from scaleclip.errors import ConfigError, RunError

_PICTURED_RANKS = tuple(2**power for power in range(11))


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Devices of the run, a rank each.")] = 8,
    gpu: Annotated[str, typer.Option(help="a100-40, a100-80, h100, h200, b200, mi300x, l40s or cpu (a core).")] = "h100",
    nodes_of: Annotated[int, typer.Option(min=1, help="Devices of a node.")] = 8,
    mfu: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of the peak that what is executed reaches.")] = 0.4,
    cores_per_gpu: Annotated[
        float | None, typer.Option(min=0.1, help="CPU cores of the loader for each device; none: the maker's server's.")
    ] = None,
    image_px: Annotated[int, typer.Option(help="Height and width of the stored images: 256, 512 or 1024.")] = 512,
    picture: Annotated[Path | None, typer.Option(help="Draw 1 to 1,024 devices into this .png.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Memory, time and traffic of a run before it starts: does it fit, how long does it take, what limits it.

    The model is counted on fake tensors: no device is needed and the data need not exist. A run of several stages has a plan a
    stage, and a picture NAME-STAGE.png.
    """
    from rich.console import Console

    from scaleclip.config_io import load_config
    from scaleclip.config_rules import validate
    from scaleclip.files import resolve_path
    from scaleclip.planning.devices import load_device
    from scaleclip.planning.plan import SAMPLES_PER_CPU_S, Assumptions, sweep
    from scaleclip.planning.plan import plan as make_plan
    from scaleclip.planning.tables import data_advice, figures_table, headline, memory_table, to_json, totals
    from scaleclip.stages import stages_of

    if picture is not None and picture.suffix != ".png":
        raise ConfigError(f"--picture={picture}: only .png is drawn")
    if image_px not in SAMPLES_PER_CPU_S:
        raise ConfigError(
            f"--image-px={image_px} was not measured: choose the nearest of {', '.join(map(str, SAMPLES_PER_CPU_S))}"
        )
    run, device = load_config(resolve_path(config), overrides or ()), load_device(gpu)
    assumptions = Assumptions(nodes_of, mfu, cores_per_gpu, image_px)
    validate(run, gpus)
    stages = stages_of(run)
    planned = [make_plan(stage.config, gpus, device, assumptions) for stage in stages]
    if picture is not None:
        from scaleclip.planning.picture import draw_plan

        for stage, each in zip(stages, planned, strict=True):
            path = picture.with_stem(f"{picture.stem}-{stage.number}") if run.stages else picture
            draw_plan(sweep(stage.config, _PICTURED_RANKS, device, assumptions), each, path)
    if json:
        typer.echo(to_json(planned))
    else:
        console = Console()
        for stage, each in zip(stages, planned, strict=True):
            if run.stages:
                console.rule(f"stage {stage.number}, from step {stage.first_step:,}")
            console.print(memory_table(each))
            console.print(figures_table(each))
            console.print(headline(each), highlight=False)
            if advice := data_advice(each):
                console.print(advice, style="yellow", highlight=False)
        if run.stages:
            console.rule()
            console.print(totals(planned), highlight=False)
    full = [stage for stage, each in zip(stages, planned, strict=True) if not each.micro_batch]
    if full:
        where = f"in stage {full[0].number}, " if run.stages else ""
        raise RunError(
            f"{where}{gpu} does not hold a micro batch under ZeRO-{full[0].config.train.zero_stage}: see the table for a stage "
            f"that fits, or lower train.micro_batch, or set model.activation_checkpointing=true, train.offload_optimizer=true "
            f"or more --gpus"
        )
