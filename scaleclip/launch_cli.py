"""Commands for jobs on a cluster. Imports inside, as in scaleclip/cli.py."""

import itertools
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scaleclip.cli_arguments import ConfigFile, Overrides, RunFolder
from scaleclip.errors import ConfigError

if TYPE_CHECKING:
    from scaleclip.config import RunConfig

# between values, and not inside of one
_COMMA = re.compile(r",(?![^\[{]*[]}])")


def launch(
    config: ConfigFile,
    overrides: Overrides = None,
    cluster: Annotated[str | None, typer.Option(help="Defaults: a name in slurm/clusters, or a .yaml file.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes of the job.")] = None,
    min_nodes: Annotated[int | None, typer.Option(help="Nodes with which it starts where not all are free.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of a node, a rank each, whatever --cluster says of ranks.")] = None,
    ranks: Annotated[int | None, typer.Option(help="Ranks of a node, where that is not its GPUs.")] = None,
    cpus: Annotated[int | None, typer.Option(help="CPUs of a rank.")] = None,
    hours: Annotated[float | None, typer.Option(help="Time limit: it saves and goes back into the queue under its id.")] = None,
    partition: Annotated[str | None, typer.Option(help="SLURM's partition.")] = None,
    account: Annotated[str | None, typer.Option(help="SLURM's account.")] = None,
    qos: Annotated[str | None, typer.Option(help="SLURM's quality of service.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Nodes that the job must not get.")] = None,
    sweep: Annotated[list[str] | None, typer.Option(help="KEY=V1,V2: a run each, every combination; an array of jobs.")] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="A second job evaluates every checkpoint once the first is done.")
    ] = False,
    local: Annotated[bool, typer.Option("--local", help="Run on this machine instead, on the ranks of a node.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what sbatch would get, and submit nothing.")] = False,
) -> None:
    """Submit a run to SLURM: it saves and starts again at time limits, preemptions and failures until it is finished."""
    from scaleclip.cluster import load_cluster
    from scaleclip.config_rules import validate
    from scaleclip.launch import run_here, sbatch_files, submit
    from scaleclip.run_folder import check_same_run

    if local and dry_run:
        raise ConfigError("--dry-run prints what sbatch would get, and --local has no sbatch: leave out one of them")

    options = {
        "nodes": nodes, "min_nodes": min_nodes, "gpus": gpus, "ranks": ranks, "cpus": cpus, "hours": hours,
        "partition": partition, "account": account, "qos": qos, "exclude": exclude,
    }  # fmt: skip
    wanted = load_cluster(cluster, options)
    root, configs = _swept(config, overrides or (), sweep or ())
    for each in configs:
        validate(each, wanted.ranks_per_node * (1 if local else wanted.nodes))
        check_same_run(each)
    if dry_run:
        for what, file in sbatch_files(configs, root, wanted, evaluate=evaluate):
            typer.echo(f"# {what}\n{file}\n")
    elif local:
        raise typer.Exit(run_here(configs, root, wanted, evaluate=evaluate))
    else:
        for each, job in zip(configs, submit(configs, root, wanted, evaluate=evaluate), strict=True):
            folder = each.run.folder
            typer.echo(f"job {job.train} trains {folder}: scaleclip logs {folder} --follow")
            if job.evaluate:
                typer.echo(f"job {job.evaluate} evaluates it when it is finished: {folder}/evaluations")


def jobs(
    root: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where runs lie.")] = Path("runs"),
) -> None:
    """List runs: what they do, how far they are, when they will be done; where there is room for it, how fast and with what."""
    from rich.console import Console

    from scaleclip.jobs import jobs_table

    console = Console()
    console.print(jobs_table(root, console.width))


def logs(
    run: RunFolder,
    rank: Annotated[int, typer.Option(min=0, help="Whose log.")] = 0,
    lines: Annotated[int, typer.Option(min=0, help="From the end.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written, over restarts.")] = False,
) -> None:
    """Print the log of a run's newest start, or the output of its job where that has not started training."""
    from scaleclip.jobs import log_lines

    for line in log_lines(run, rank, lines, follow):
        typer.echo(line)


def cancel(run: RunFolder) -> None:
    """End the jobs of a run, or of all runs of a sweep, for good.

    What is not saved is lost: see `scancel --signal=USR2` for a stop that saves.
    """
    from scaleclip.jobs import cancel_jobs

    for job in cancel_jobs(run):
        typer.echo(f"job {job} is cancelled")


def check(
    config: ConfigFile,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="Of the whole job.")] = 1,
    grace: Annotated[float, typer.Option(min=0, help="Seconds between SLURM's warning and the end.")] = 60.0,
) -> None:
    """Check this node before a job trains on it: GPUs, run folder, disk, time to save, data.

    A line a failed check, or one that there is none. The exit code is 2 where a setting must be mended, 3 where only this node
    is at fault.
    """
    from scaleclip.config_io import load_config
    from scaleclip.config_rules import validate
    from scaleclip.files import resolve_path
    from scaleclip.node_check import check_node

    run = load_config(resolve_path(config), overrides or ())
    validate(run, ranks)
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    faults = list(check_node(run, ranks, -(-ranks // nodes), grace))
    for fault in faults:
        typer.echo(f"bad node {node}: {fault.message}" if fault.of_node else f"check failed on {node}: {fault.message}")
    if not faults:
        typer.echo(f"node {node} is in order for {run.run.folder}")
    else:
        raise typer.Exit(3 if all(fault.of_node for fault in faults) else 2)


def _swept(config: str, overrides: Sequence[str], sweeps: Sequence[str]) -> "tuple[Path, list[RunConfig]]":
    """The folder of all, and a configuration for every combination of the swept values, each with a folder of its own there."""
    from scaleclip.config_io import load_config
    from scaleclip.files import resolve_path

    axes: dict[str, list[str]] = {}
    for text in sweeps:
        key, equals, listed = text.partition("=")
        values = _COMMA.split(listed)
        if not equals or not all(values):
            raise ConfigError(f"--sweep={text}: give a key and values, for example optim.lr=1e-3,5e-4")
        if key.partition(".")[0] == "run":
            raise ConfigError(f"--sweep={text}: each run has a folder of its own below run.folder: sweep other keys")
        if key in axes:
            raise ConfigError(f"--sweep={text}: {key} has a --sweep already: give all its values in one")
        axes[key] = [f"{key}={value}" for value in values]
    folder = load_config(resolve_path(config), overrides).run.folder
    found: list[RunConfig] = []
    for chosen in itertools.product(*axes.values()):
        own = [f"run.folder={folder}/{'-'.join(chosen).replace('/', '_')}"] if chosen else []
        each = load_config(resolve_path(config), [*overrides, *chosen, *own])
        for other in found:
            if other.run == each.run or other.model_copy(update={"run": each.run}) == each:
                raise ConfigError(f"--sweep: {' '.join(chosen)} is the same run as {other.run.folder}: leave out one of them")
        found.append(each)
    return Path(folder), found
