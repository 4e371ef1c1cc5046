"""The command `scaleclip eval`. Imports inside, as in scaleclip/cli.py."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaleclip.cli_arguments import Architecture, Ranks
from scaleclip.errors import ConfigError
from scaleclip.start_ranks import start_ranks

if TYPE_CHECKING:
    from rich.console import Console

    from scaleclip.evaluate_run import Evaluated, Session
    from scaleclip.evaluation.targets import Target
    from scaleclip.metrics import EvaluationLog


def evaluate(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="REFERENCE", help="A run, a checkpoint's folder, a transformers folder, an open_clip checkpoint."
        ),
    ],
    suite: Annotated[str | None, typer.Option(help="A suite of configs/suites.yaml, or a YAML file of one's own.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Folder or URL below which the suite's data sets lie; none: eval.data, `data`.")
    ] = None,
    split: Annotated[list[str] | None, typer.Option(help="Descriptions of held-out splits.")] = None,
    against: Annotated[str | None, typer.Option(help="A system of configs/targets.yaml to hold the figures against.")] = None,
    skip_missing: Annotated[bool, typer.Option("--skip-missing", help="Leave out data sets that are not there.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Every checkpoint of a run, and not the newest.")] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Every checkpoint of a run, as they come, from its begin until it is finished.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Keep figures below this folder; of runs they lie in RUN/evaluations.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images or texts encoded at once.")] = None,
    architecture: Architecture = None,
    ranks: Ranks = 1,
) -> None:
    """Measure a model on suites of data sets and on held-out splits, and print the table.

    Without --suite and --split, by what the run measures itself. Figures are kept a data set at a time, and what is there of
    the same weights is not measured again.
    """
    if every and follow:
        raise ConfigError("--follow takes every checkpoint: leave out --all")
    if not follow and not Path(reference).exists():
        raise ConfigError(f"{reference}: there is no such run, checkpoint or model")
    if out and out.resolve().is_relative_to(Path(reference).resolve()):
        raise ConfigError(f"--out={out} lies in {reference}, whose files say which model it is: name another folder")
    start_ranks(ranks)
    from scaleclip import distributed, evaluate_run
    from scaleclip.config_io import named_architecture
    from scaleclip.data.cache import ShardCache
    from scaleclip.evaluation.targets import load_target
    from scaleclip.report.console import wide_console

    target = load_target(against) if against else None
    world = distributed.init(timeout=distributed.PATIENT)
    find_run = evaluate_run.wait_for_run if follow else evaluate_run.run_of
    run = find_run(reference)
    is_run = run is not None and Path(reference).absolute() == run
    if (every or follow) and not is_run:
        raise ConfigError(f"{reference} is no run: --all and --follow take a run's folder")
    own, cache = evaluate_run.own_config(run)
    asked: dict[str, Any] = {"suite": suite, "splits": tuple(split or ())} if suite or split else {}
    asked |= {name: value for name, value in (("data", data), ("batch", batch)) if value is not None}
    console = wide_console(quiet=not world.is_main)
    clock = time.perf_counter()

    def on_done(name: str, number: int, count: int) -> None:
        nonlocal clock
        before, clock = clock, time.perf_counter()
        console.print(f"{number} of {count}: {name}, {clock - before:,.1f} s", highlight=False)

    place = evaluate_run.below(out) if out else evaluate_run.in_run(run) if run else lambda _: None
    config = own.model_copy(update=asked)
    session = evaluate_run.Session(config, ShardCache(cache), place, skip_missing=skip_missing, on_done=on_done)
    for each in dict.fromkeys(session.suite.missing):
        console.print(f"left out, since it is not there: {each.dataset} ({each.path})", highlight=False)
    if run and (every or follow):
        paths = evaluate_run.checkpoints_as_they_come(run) if follow else evaluate_run.whole_checkpoints(run)
        log = _log(run) if world.is_main else None
        for evaluated in filter(None, map(session.evaluate, evaluate_run.subjects(paths))):
            _show(console, session, evaluated, target)
            if log:
                log.write(evaluated.subject.step or 0, evaluated.figures)
        if log:
            log.close()
    else:
        named = named_architecture(architecture) if architecture else None
        found = session.evaluate(distributed.on_main(lambda: evaluate_run.subject_of(reference, named)))
        if found is None:
            raise ConfigError(f"{reference} was deleted before it was evaluated")
        _show(console, session, found, target)
        # a run's results are those of its end, by what it measures itself
        if run and is_run and world.is_main and not asked and not skip_missing:
            evaluate_run.write_run_results(run, found)
    distributed.shutdown()


def _show(console: "Console", session: "Session", evaluated: "Evaluated", target: "Target | None") -> None:
    from scaleclip.evaluation.saved import read_saved
    from scaleclip.evaluation.targets import targets_table
    from scaleclip.report.console import results_table

    subject, folder = evaluated.subject, session.folder(evaluated.subject)
    console.print(
        results_table(subject.reference + ("" if subject.step is None else f", step {subject.step:,}"), evaluated.figures)
    )
    if folder:
        console.print(f"kept in {folder}", highlight=False)
    if target:
        # those of other suites too, this one's means first
        known = [*evaluated.figures, *(read_saved(folder, subject.identity) if folder else ())]
        console.print(targets_table(target, known))


def _log(run: Path) -> "EvaluationLog":
    from scaleclip.metrics import EvaluationLog
    from scaleclip.run_folder import read_config

    return EvaluationLog(run, read_config(run).metrics)
