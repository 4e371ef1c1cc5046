"""The command `scaleclip`. Imports inside the commands: `scaleclip --help` answers before torch would have loaded."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from scaleclip.captions_cli import captions_app
from scaleclip.cli_arguments import ConfigFile, Overrides, Ranks, RunFolder
from scaleclip.data_cli import data_app
from scaleclip.embed_cli import embed
from scaleclip.equivalence_cli import verify_equivalence
from scaleclip.eval_cli import evaluate
from scaleclip.exchange_cli import export
from scaleclip.exit_codes import exiting_on_errors
from scaleclip.launch_cli import cancel, check, jobs, launch, logs
from scaleclip.plan_cli import plan
from scaleclip.start_ranks import is_main, start_ranks

app = typer.Typer(
    name="scaleclip", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Pre-train CLIP and its descendants: ZeRO-sharded dual encoders on streaming shards.",
)  # fmt: skip

DEMO_CONFIG = "package:scaleclip/configs/demo.yaml"


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    ranks: Ranks = 1,
    profile: Annotated[bool, typer.Option("--profile", help="Write a trace of a few steps into RUN/profile.")] = False,
) -> None:
    """Train a run, or go on with it where it stopped, then evaluate it."""
    _train(config, overrides, ranks, profile)


@app.command()
def demo(overrides: Overrides = None, ranks: Ranks = 1) -> None:
    """Train a small CLIP on the embedded emoji and clip art: a few minutes on two CPU cores."""
    folder = _train(DEMO_CONFIG, overrides, ranks)
    if is_main():
        from scaleclip.report.page import write_report

        typer.echo(f"Report: {write_report(folder)}   open it in a browser")
        command = "scaleclip" if shutil.which("scaleclip") else os.path.relpath(Path(sys.executable).parent / "scaleclip")
        typer.echo(
            "Try next:\n"
            f"  {command} demo run.folder=runs/milder optim.lr=5e-4   another run, one setting changed\n"
            f"  {command} demo run.folder=runs/two --ranks 2          the same run on two ranks\n"
            f"  {command} report RUN   a page of any run, also while it goes on\n"
            f"  {command} config {DEMO_CONFIG}   every setting\n"
            "  README.md, 'Your own shards'   train on what img2dataset wrote"
        )


@app.command()
def report(
    run: RunFolder,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of texts and images whose neighbours are shown.")] = 0,
    no_sheets: Annotated[
        bool, typer.Option("--no-sheets", help="Leave out what needs the model: neighbours, similarities.")
    ] = False,
    against: Annotated[str | None, typer.Option(help="A system of configs/targets.yaml whose figures stand beside.")] = None,
) -> None:
    """Show a run as one page, RUN/report.html, and as pictures, RUN/report: curves, results, what its model finds."""
    from scaleclip.evaluation.targets import load_target
    from scaleclip.report.page import write_report

    target = None if against is None else load_target(against)
    typer.echo(str(write_report(run, seed=seed, with_sheets=not no_sheets, target=target)))


@app.command("config")
def show_config(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="YAML file; none shows the defaults.")] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a configuration instead.")] = False,
    deepspeed: Annotated[bool, typer.Option("--deepspeed", help="Print the DeepSpeed configuration that is derived.")] = False,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that the DeepSpeed configuration is for.")] = 1,
) -> None:
    """Print a configuration with parents, preset, defaults and overrides resolved; exit 2 if it could not be trained."""
    from scaleclip.config import RunConfig
    from scaleclip.config_io import json_schema, load_config, to_yaml
    from scaleclip.config_rules import validate
    from scaleclip.files import resolve_path
    from scaleclip.stages import stages_of

    if schema:
        typer.echo(json_schema())
        return
    resolved = load_config(resolve_path(config), overrides or ()) if config else RunConfig()
    if not deepspeed:
        typer.echo(to_yaml(resolved), nl=False)
    if deepspeed or any(stage.config.train.deepspeed for stage in stages_of(resolved)):
        from scaleclip.deepspeed_config import deepspeed_config  # with torch: slow

        derived = [deepspeed_config(stage.config, ranks) for stage in stages_of(resolved)]
        if deepspeed:
            typer.echo(json.dumps(derived if resolved.stages else derived[0], indent=2))
    if config:
        validate(resolved, ranks)


for command in (export, plan, verify_equivalence, embed, launch, jobs, logs, cancel, check):
    app.command()(command)
app.command("eval")(evaluate)
app.add_typer(data_app, name="data")
app.add_typer(captions_app, name="captions")


def main() -> None:
    """Entry point; scaleclip.exit_codes says which exit code means what."""
    # no hub: everything a command needs lies on this machine
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with exiting_on_errors():
        app()


def _train(config: str, overrides: list[str] | None, ranks: int, profile: bool = False) -> Path:
    from scaleclip.config_io import load_config
    from scaleclip.files import resolve_path

    run = load_config(resolve_path(config), overrides or ())  # first, so that a mistake is said once and not by every rank
    start_ranks(ranks)
    from scaleclip.train import train as run_training

    folder = run_training(run, profile=profile)
    if is_main():
        _show(folder)
    return folder


def _show(folder: Path) -> None:
    from scaleclip.evaluation.results import finished_step, read_results
    from scaleclip.report.console import results_table, wide_console

    figures = read_results(folder)
    if figures:
        wide_console().print(results_table(f"{folder}, step {finished_step(folder):,}", figures))
    typer.echo(f"Run folder: {folder} (metrics.jsonl, results.json, checkpoints/)")
