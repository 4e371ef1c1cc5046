"""Suites as YAML: data sets by name, and suites of tasks on them.

    datasets:
      pets: {test: pets/test, train: pets/train, mean_per_class: true}
    suites:
      mine:
        - {task: zero-shot, datasets: [pets]}
        - imagenet                                # all of another suite

`configs/suites.yaml` has scaleclip's own; a file of one's own may use its data sets and suites, and replace them.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import yaml
from pydantic import Field

from scaleclip.config import Section, StringList
from scaleclip.config_io import parse_section
from scaleclip.errors import ConfigError
from scaleclip.evaluation.captioned import LAYOUTS
from scaleclip.evaluation.texts import PAIRS_LAYOUT, RETRIEVAL_LAYOUT
from scaleclip.files import resolve_path

SUITES = "package:scaleclip/configs/suites.yaml"
_LABELLED_LAYOUT = "a folder of images for each class, tars with KEY.jpg and KEY.cls (clip-benchmark's), or a Parquet file"


class DatasetConfig(Section):
    """A data set. Paths lie below the root that `--data` or `eval.data` names, unless they are absolute or URLs; what is not
    classified lies on a disk, but for tars of captions that a URL names."""

    test: str
    """What is measured on."""
    train: str | None = None
    """What a linear probe learns from."""
    validation: str | None = None
    """What chooses a linear probe's strength; none: every fifth image of each class of `train`."""
    prompts: str | None = None
    """The data set whose class names and templates clip-benchmark has; none: its own name."""
    mean_per_class: bool = False
    """The papers' figure is the mean over classes of each one's accuracy."""
    split: str = "test"
    """Of Karpathy's file of captions."""


class TaskConfig(Section):
    """What all tasks have."""

    layout: ClassVar[str]
    """Of its data sets, for errors."""
    task: str
    """What is measured."""
    datasets: StringList
    """Names."""


class AveragedConfig(TaskConfig):
    """A task whose papers give a mean over data sets."""

    mean: str | None = None
    """Name of the mean over these data sets, which becomes a figure of its own; none: no mean."""


class ZeroShotConfig(AveragedConfig):
    """Zero-shot classification."""

    layout = _LABELLED_LAYOUT


class FewShotConfig(AveragedConfig):
    """Prototypical classification of few-shot episodes."""

    layout = _LABELLED_LAYOUT
    ways: int = Field(default=5, ge=2)
    """Classes of an episode."""
    shots: int = Field(default=5, ge=1)
    """Images of each that prototypes are made from."""
    queries: int = Field(default=15, ge=1)
    """Images of each that are classified."""
    episodes: int = Field(default=600, ge=1)
    """Episodes."""
    seed: int = 0
    """Of their draw."""


class LinearProbeConfig(AveragedConfig):
    """Logistic regression on frozen features."""

    layout = _LABELLED_LAYOUT


class RetrievalConfig(TaskConfig):
    """Retrieval between images and captions."""

    layout = LAYOUTS


class PairsConfig(AveragedConfig):
    """Correlation of similarities between texts with people's scores."""

    layout = PAIRS_LAYOUT


class TextRetrievalConfig(TaskConfig):
    """Retrieval of documents by queries."""

    layout = RETRIEVAL_LAYOUT


class SplitsConfig(TaskConfig):
    """Held-out splits that have a description of their own (scaleclip.evaluation.splits)."""

    layout = "descriptions (.json) with tars beside each that share its stem"


TASKS: Mapping[str, type[TaskConfig]] = {
    "zero-shot": ZeroShotConfig,
    "few-shot": FewShotConfig,
    "linear-probe": LinearProbeConfig,
    "retrieval": RetrievalConfig,
    "sts": PairsConfig,
    "text-retrieval": TextRetrievalConfig,
    "splits": SplitsConfig,
}


class Suite(NamedTuple):
    """A suite, resolved."""

    tasks: tuple[TaskConfig, ...]
    datasets: Mapping[str, DatasetConfig]
    """Of its tasks, by name."""


def load_suite(name: str) -> Suite:
    """The suite of this name, or of a YAML file (`FILE`, whose only suite it is, or `FILE:NAME`).

    Raises:
        ConfigError: no such suite or file, or a fault in it, by the path of its key.
    """
    tree, file = _read(Path(resolve_path(SUITES))), "configs/suites.yaml"
    path, _, wanted = name.rpartition(":") if not name.endswith((".yaml", ".yml")) else (name, "", "")
    if path:
        own, file = _read(Path(resolve_path(path))), path
        if not wanted and len(own["suites"]) != 1:
            raise ConfigError(f"--suite={name}: it has {', '.join(own['suites']) or 'no suites'}: name one as {name}:NAME")
        wanted = wanted or next(iter(own["suites"]))
        tree = {part: tree[part] | own[part] for part in tree}
    else:
        wanted = name
    tasks = tuple(_tasks(file, tree, wanted, ()))
    datasets = {}
    for key in dict.fromkeys(name for task in tasks for name in task.datasets if task.task != "splits"):
        if key not in tree["datasets"]:
            raise ConfigError(f"{file}: suites.{wanted}: there is no data set {key!r}{_hint(key, tree['datasets'])}")
        datasets[key] = _parse(file, DatasetConfig, tree["datasets"][key], f"datasets.{key}")
    for task in tasks:
        if isinstance(task, LinearProbeConfig):
            for key in task.datasets:
                if datasets[key].train is None:
                    raise ConfigError(f"{file}: datasets.{key}.train is not set: a linear probe learns from it")
    return Suite(tasks, datasets)


def _tasks(file: str, tree: Mapping[str, Any], name: str, outer: tuple[str, ...]) -> list[TaskConfig]:
    if name not in tree["suites"]:
        known = ", ".join(tree["suites"])
        raise ConfigError(f"suite {name!r} is unknown{_hint(name, tree['suites'])}; suites: {known}, or a .yaml file")
    if name in outer:
        raise ConfigError(f"{file}: suites go in a circle: {' -> '.join((*outer, name))}")
    entries = tree["suites"][name]
    if not isinstance(entries, list):
        raise ConfigError(f"{file}: suites.{name} is {entries!r}: give a list of tasks")
    tasks = []
    for number, entry in enumerate(entries):
        if isinstance(entry, str):
            tasks += _tasks(file, tree, entry, (*outer, name))
            continue
        kind = entry.get("task") if isinstance(entry, dict) else None
        if not isinstance(kind, str) or kind not in TASKS:
            key = f"suites.{name}.{number}.task"
            raise ConfigError(f"{file}: {key}={kind!r}{_hint(str(kind), TASKS)}; tasks: {', '.join(TASKS)}")
        tasks.append(_parse(file, TASKS[kind], entry, f"suites.{name}.{number}"))
    return tasks


def _parse(file: str, section: type[Any], tree: Any, key: str) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: {key} is {tree!r}: give keys with values: {', '.join(section.model_fields)}")
    try:
        return parse_section(section, tree, f"{key}.")
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read as suites: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} cannot be read as suites: {error}") from None
    parts = ("datasets", "suites")
    strange = set(tree) - set(parts) if isinstance(tree, dict) else {type(tree).__name__}
    if strange or any(not isinstance(tree.get(part) or {}, dict) for part in parts):
        at = f": {min(map(str, strange))!r}{_hint(min(map(str, strange)), parts)}" if strange else ""
        raise ConfigError(f"{path} should hold {' and '.join(parts)}, each by name{at}")
    return {part: tree.get(part) or {} for part in parts}


def _hint(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
