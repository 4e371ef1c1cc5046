"""The command `scaleclip`. Imports inside the commands: `scaleclip --help` answers before torch would have loaded."""

import ctypes
import json
import logging
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from scaleclip.data_cli import data_app
from scaleclip.equivalence_cli import verify_equivalence
from scaleclip.errors import ConfigError, RunError, Stopped
from scaleclip.plan_cli import plan

app = typer.Typer(
    name="scaleclip", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Pre-train CLIP and its descendants: ZeRO-sharded dual encoders on streaming shards.",
)  # fmt: skip
app.add_typer(data_app, name="data")
app.command()(plan)
app.command()(verify_equivalence)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

DEMO_CONFIG = "package:scaleclip/configs/demo.yaml"

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, for example configs/demo.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, for example optim.lr=1e-3.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
Ranks = Annotated[int, typer.Option(min=1, help="Processes to start on this machine; srun and torchrun bring their own.")]


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
    _train(DEMO_CONFIG, overrides, ranks)
    if _is_main():
        command = "scaleclip" if shutil.which("scaleclip") else os.path.relpath(Path(sys.executable).parent / "scaleclip")
        typer.echo(
            "Try next:\n"
            f"  {command} demo run.folder=runs/milder optim.lr=5e-4   another run, one setting changed\n"
            f"  {command} demo run.folder=runs/two --ranks 2          the same run on two ranks\n"
            f"  {command} config {DEMO_CONFIG}   every setting\n"
            "  README.md, 'Your own shards'   train on what img2dataset wrote"
        )


@app.command("eval")
def evaluate(
    run: RunFolder,
    split: Annotated[
        list[str] | None, typer.Option(help="Split descriptions instead of the run's own; their figures are not saved.")
    ] = None,
) -> None:
    """Evaluate a run's newest checkpoint on held-out splits and print the table."""
    import torch
    from rich.console import Console

    from scaleclip.checkpoint.folders import damage, newest, saved
    from scaleclip.checkpoint.loading import load_weights
    from scaleclip.checkpoint.state import read_state
    from scaleclip.data.cache import ShardCache
    from scaleclip.data.tokenizer import load_tokenizer
    from scaleclip.evaluation.evaluate import evaluate as run_evaluation
    from scaleclip.evaluation.results import write_results
    from scaleclip.evaluation.splits import open_splits
    from scaleclip.models.dual_encoder import DualEncoder
    from scaleclip.report import results_table
    from scaleclip.run_folder import read_config

    config = read_config(run)
    path = newest(run)
    if path is None and (found := saved(run)):
        raise ConfigError(f"{run}: all checkpoints are damaged, the newest one by this: {damage(found[-1])}")
    if path is None:
        raise ConfigError(f"{run} has no checkpoint to evaluate: train first")
    if not (split or config.eval.splits):
        raise ConfigError("eval.splits of this run is empty: name some with --split")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = DualEncoder(config.model.without_pretrained()).to(device)
    # persistent buffers, which some towers have, are constants and not in a checkpoint
    model.load_state_dict(model.state_dict() | load_weights(path))
    tokenizer = load_tokenizer(config.model.text.tokenizer, config.model.text.context_length)
    splits = open_splits(split or config.eval.splits, ShardCache(config.data.cache))
    figures = run_evaluation(model, tokenizer, splits, config)
    step = read_state(path).step
    if not split:
        write_results(run, step, figures)
    Console().print(results_table(f"{run}, step {step:,}", figures))


@app.command()
def plot(run: RunFolder) -> None:
    """Draw a run's training curves into RUN/curves.png."""
    from scaleclip.report import plot_run

    typer.echo(str(plot_run(run)))


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

    if schema:
        typer.echo(json_schema())
        return
    resolved = load_config(resolve_path(config), overrides or ()) if config else RunConfig()
    if not deepspeed:
        typer.echo(to_yaml(resolved), nl=False)
    if deepspeed or resolved.train.deepspeed:
        from scaleclip.deepspeed_config import deepspeed_config  # with torch: slow

        derived = deepspeed_config(resolved, ranks)
        if deepspeed:
            typer.echo(json.dumps(derived, indent=2))
    if config:
        validate(resolved, ranks)


def main() -> None:
    """Entry point; scaleclip.errors says which exit code means what."""
    # no hub: everything a command needs lies on this machine
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        app()
    except ConfigError as error:
        _fail(error, 2)
    except RunError as error:
        _fail(error, 1)
    except Stopped as stop:
        _fail(stop, stop.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception:
        message = traceback.format_exc()
        logging.getLogger("scaleclip").error(message)  # into the rank's log
        _fail(message, 1)


def _fail(error: Exception | str, code: int) -> None:
    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("RANK", "0")) else ""
    print(f"{rank}{error}", file=sys.stderr, flush=True)
    # loader processes and the process group may wait for each other at the interpreter's end
    os._exit(code)


def _train(config: str, overrides: list[str] | None, ranks: int, profile: bool = False) -> None:
    from scaleclip.config_io import load_config
    from scaleclip.files import resolve_path

    run = load_config(resolve_path(config), overrides or ())  # first, so that a mistake is said once and not by every rank
    _start_ranks(ranks)
    from scaleclip.train import train as run_training

    folder = run_training(run, profile=profile)
    if _is_main():
        _show(folder)


def _start_ranks(ranks: int) -> None:
    """Run this command on `ranks` processes of this machine instead, by torchrun, and exit with their code."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a rank ends when its torchrun is killed
    launched = "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    if ranks == 1 or launched:
        return
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # ranks say themselves what went wrong
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2"
    arguments = ["--standalone", f"--nproc-per-node={ranks}", "-m", "scaleclip", *sys.argv[1:]]
    code = 0
    try:
        torchrun.run(torchrun.parse_args(arguments))  # type: ignore[no-untyped-call]
    except SignalException as stop:
        code = 128 + stop.sigval
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
        code = 128 - code if code < 0 else code  # below 0: killed by that signal
    sys.exit(code)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _show(folder: Path) -> None:
    from rich.console import Console

    from scaleclip.evaluation.results import finished_step, read_results
    from scaleclip.metrics import read_rows
    from scaleclip.report import plot_run, results_table

    figures = read_results(folder)
    if figures:
        Console().print(results_table(f"{folder}, step {finished_step(folder):,}", figures))
    if read_rows(folder):  # a run that came back whole from its mirror has none
        plot_run(folder)
    typer.echo(f"Run folder: {folder} (metrics.jsonl, results.json, curves.png, checkpoints/)")
