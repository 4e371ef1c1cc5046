"""Suites of evaluations, opened: from names and a root of data to what can be run on a model.

Everything is opened before anything is measured, so that what is missing shows at once.
"""

import glob
import itertools
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from scaleclip.config import EvalConfig
from scaleclip.data.cache import ShardCache
from scaleclip.distributed import gather_objects, on_main
from scaleclip.errors import ConfigError
from scaleclip.evaluation.captioned import CaptionedImages, evaluate_retrieval
from scaleclip.evaluation.encoder import Encoder
from scaleclip.evaluation.evaluate import Evaluation, distinct
from scaleclip.evaluation.results import Figure
from scaleclip.evaluation.splits import open_splits
from scaleclip.evaluation.suite_config import AveragedConfig, DatasetConfig, FewShotConfig, Suite, TaskConfig, load_suite
from scaleclip.evaluation.texts import TextPairs, TextRetrieval, evaluate_pairs, evaluate_text_retrieval
from scaleclip.files import resolve_path

Measure = Callable[[Encoder, Path | None], list[Figure]]


@dataclass(frozen=True)
class SuiteEvaluation:
    """A task on a data set; see scaleclip.evaluation.evaluate.Evaluation."""

    name: str
    num_items: int
    place: str
    fingerprint: Callable[[], str]
    """Of what is measured on."""
    measure: Measure

    @property
    def definition(self) -> str:
        """What decides its figures, but for the model."""
        return f"{self.place} {self.fingerprint()}"

    def run(self, encoder: Encoder, features: Path | None = None) -> list[Figure]:
        """Its figures."""
        return self.measure(encoder, features)


class _Opened(NamedTuple):
    num_items: int
    fingerprint: Callable[[], str]
    measure: Measure


class Mean(NamedTuple):
    """A mean over the data sets of a task."""

    name: str
    task: TaskConfig
    metrics: dict[str, str]
    """By data set: which of its figures counts."""

    @property
    def parts(self) -> list[str]:
        """Names of the evaluations that it is of."""
        return [_name(self.task, dataset) for dataset in self.metrics]


class Missing(NamedTuple):
    """A data set that is not there."""

    dataset: str
    path: str
    layout: str


class OpenedSuite(NamedTuple):
    """What can be run, and what of it cannot."""

    evaluations: list[Evaluation]
    means: list[Mean]
    missing: list[Missing]

    def check_same_everywhere(self) -> None:
        """Raises ConfigError where ranks have opened other data than rank 0. Every rank calls."""
        everyone = gather_objects([(each.name, each.num_items) for each in self.evaluations])
        for rank, theirs in enumerate(everyone):
            for ours, other in itertools.zip_longest(everyone[0], theirs):
                if ours != other:
                    here, there = (f"{each[0]} with {each[1]:,} items" if each else "nothing" for each in (ours, other))
                    raise ConfigError(
                        f"ranks see other data of evaluations: rank 0 {here}, rank {rank} {there}: have the same data on every "
                        f"node, or on a disk that all see"
                    )

    def evaluate(self, encoder: Encoder, features: Path) -> list[Figure]:
        """Every figure. The model is left in the mode it was in. All ranks call; each encodes its part.

        Args:
            encoder: the model.
            features: a folder for what is too much for memory, on a disk that all ranks see; it is deleted at the end.

        Raises:
            RunError: something in the data cannot be used.
        """
        with encoder.evaluating():
            figures = distinct([figure for each in self.evaluations for figure in each.run(encoder, features)])
        on_main(lambda: shutil.rmtree(features, ignore_errors=True))
        return figures + [figure for _, figure in self.means_of(figures)]

    def means_of(self, figures: Sequence[Figure]) -> list[tuple[Mean, Figure]]:
        """Means over data sets, where the figures of all of them are there.

        The interval of a mean takes the data sets' intervals for independent.
        """
        there = {(figure.split, figure.metric): figure for figure in figures}
        found = []
        for mean in self.means:
            parts = [there[key] for key in mean.metrics.items() if key in there]
            if len(parts) == len(mean.metrics):
                found.append((mean, _mean(mean, parts)))
        return found


def open_evaluations(config: EvalConfig, cache: ShardCache, *, skip_missing: bool = False) -> OpenedSuite:
    """What `eval.splits` and `eval.suite` name; `skip_missing` leaves out what is not there of the suite. No collectives.

    Raises:
        ConfigError: something is not there, or is not what it should be.
    """
    splits: list[Evaluation] = list(open_splits(config.splits, cache))
    suite = OpenedSuite([], [], [])
    if config.suite:
        suite = open_suite(load_suite(config.suite), config.data, cache, skip_missing=skip_missing)
    first: dict[str, Evaluation] = {}
    for each in (*splits, *suite.evaluations):
        first.setdefault(each.place, each)
    return suite._replace(evaluations=list(first.values()))


def open_suite(suite: Suite, root: str, cache: ShardCache, *, skip_missing: bool = False) -> OpenedSuite:
    """Open the data sets of a suite. No collectives.

    Args:
        suite: what to measure on what.
        root: folder or URL below which data sets lie.
        cache: local copies of remote shards.
        skip_missing: leave out data sets that are not there.

    Raises:
        ConfigError: data sets are missing, every one of them in the message, or one is not what it should be.
    """
    opened = OpenedSuite([], [], [])
    wanted = []
    for task in suite.tasks:
        for name in task.datasets:
            dataset = suite.datasets.get(name) or DatasetConfig(test=name)  # a split's description is its own path
            placed = _placed(dataset, root, task)
            missing = [path for path in placed if not _is_there(path)]
            opened.missing.extend(Missing(name, path, task.layout) for path in missing)
            if not missing:
                wanted.append((task, name, dataset, placed))
        if isinstance(task, AveragedConfig) and task.mean:
            opened.means.append(Mean(task.mean, task, {name: _primary(task, suite.datasets[name]) for name in task.datasets}))
    if opened.missing and not skip_missing:
        rows = "\n".join(f"  {each.dataset}: {each.path}: {each.layout}" for each in dict.fromkeys(opened.missing))
        raise ConfigError(
            f"data sets are missing below --data={root}:\n{rows}\nput them there, name another root, or leave them out with "
            f"--skip-missing"
        )
    for task, name, dataset, placed in wanted:
        opened.evaluations.extend(_open(task, name, dataset, placed, cache))
    return opened


def _open(task: TaskConfig, name: str, dataset: DatasetConfig, placed: Sequence[str], cache: ShardCache) -> list[Evaluation]:
    if task.task == "splits":
        return list(open_splits(placed, cache))
    opened = _OPEN[task.task](task, name, dataset, placed, cache)
    options = task.model_dump_json(exclude={"datasets", "mean"})
    where = [path if "://" in path else os.path.abspath(path) for path in placed]
    place = f"{name} {options} {dataset.model_dump_json()} {where}"
    return [SuiteEvaluation(_name(task, name), opened.num_items, place, opened.fingerprint, opened.measure)]


def _name(task: TaskConfig, dataset: str) -> str:
    kind = f"few-shot {task.ways}-way {task.shots}-shot" if isinstance(task, FewShotConfig) else task.task
    return f"{kind} {dataset}"


def _zero_shot(task: TaskConfig, name: str, dataset: DatasetConfig, placed: Sequence[str], cache: ShardCache) -> _Opened:
    from scaleclip.evaluation.class_names import prompts_of
    from scaleclip.evaluation.labelled import open_labelled
    from scaleclip.evaluation.zero_shot import evaluate_zero_shot

    data = open_labelled(name, placed[0], cache)
    prompts = prompts_of(dataset.prompts or name, data)

    def measure(encoder: Encoder, features: Path | None) -> list[Figure]:
        return evaluate_zero_shot(encoder, data, prompts, mean_per_class=dataset.mean_per_class)

    return _Opened(data.num_images, lambda: f"{data.fingerprint()} {prompts}", measure)


def _few_shot(task: TaskConfig, name: str, dataset: DatasetConfig, placed: Sequence[str], cache: ShardCache) -> _Opened:
    from scaleclip.evaluation.few_shot import evaluate_few_shot, few_classes
    from scaleclip.evaluation.labelled import open_labelled

    assert isinstance(task, FewShotConfig)
    data = open_labelled(name, placed[0], cache)
    if data.class_names is not None and len(data.class_names) < task.ways:
        raise ConfigError(few_classes(name, len(data.class_names), task.ways))
    options = task.model_dump(include={"ways", "shots", "queries", "episodes", "seed"})

    def measure(encoder: Encoder, features: Path | None) -> list[Figure]:
        return evaluate_few_shot(encoder, data, features=features, **options)

    return _Opened(data.num_images, data.fingerprint, measure)


def _linear_probe(task: TaskConfig, name: str, dataset: DatasetConfig, placed: Sequence[str], cache: ShardCache) -> _Opened:
    from scaleclip.evaluation.labelled import open_labelled
    from scaleclip.evaluation.linear_probe import evaluate_linear_probe

    parts = (name, f"{name} (train)", f"{name} (validation)")
    test, train, *more = splits = [open_labelled(part, path, cache) for part, path in zip(parts, placed, strict=False)]
    validation = more[0] if more else None

    def measure(encoder: Encoder, features: Path | None) -> list[Figure]:
        return evaluate_linear_probe(
            encoder, train, test, mean_per_class=dataset.mean_per_class, features=features, validation=validation
        )

    num_images = sum(split.num_images for split in splits)
    return _Opened(num_images, lambda: " ".join(split.fingerprint() for split in splits), measure)


def _retrieval(task: TaskConfig, name: str, dataset: DatasetConfig, placed: Sequence[str], cache: ShardCache) -> _Opened:
    data = CaptionedImages(name, placed[0], dataset.split, cache)
    return _Opened(data.num_images, data.fingerprint, lambda encoder, _: evaluate_retrieval(encoder, data))


def _sts(task: TaskConfig, name: str, dataset: DatasetConfig, placed: Sequence[str], cache: ShardCache) -> _Opened:
    pairs = TextPairs(name, placed[0])
    return _Opened(len(pairs.firsts), pairs.fingerprint, lambda encoder, _: evaluate_pairs(encoder, pairs))


def _text_retrieval(task: TaskConfig, name: str, dataset: DatasetConfig, placed: Sequence[str], cache: ShardCache) -> _Opened:
    data = TextRetrieval(name, placed[0])
    num_texts = len(data.queries) + len(data.documents)
    return _Opened(num_texts, data.fingerprint, lambda encoder, _: evaluate_text_retrieval(encoder, data))


_OPEN: dict[str, Callable[[TaskConfig, str, DatasetConfig, Sequence[str], ShardCache], _Opened]] = {
    "zero-shot": _zero_shot,
    "few-shot": _few_shot,
    "linear-probe": _linear_probe,
    "retrieval": _retrieval,
    "sts": _sts,
    "text-retrieval": _text_retrieval,
}


def _placed(dataset: DatasetConfig, root: str, task: TaskConfig) -> list[str]:
    """Where a task's parts of a data set lie."""
    of_probes = (dataset.train, dataset.validation) if task.task == "linear-probe" else ()
    parts = [dataset.test, *(part for part in of_probes if part)]
    # splits come with the package, or lie where one says
    return [
        resolve_path(part) if ":" in part or task.task == "splits" else os.path.join(resolve_path(root), part) for part in parts
    ]


def _is_there(path: str) -> bool:
    # what is behind a URL or a brace range, opening will tell
    return "://" in path or "{" in path or bool(glob.glob(path)) or os.path.exists(path)


def _primary(task: TaskConfig, dataset: DatasetConfig) -> str:
    """The metric that a paper's table has of a data set."""
    if isinstance(task, FewShotConfig):
        return f"{task.ways}-way {task.shots}-shot"
    per_class = " mean per class" if dataset.mean_per_class else ""
    return {
        "zero-shot": f"zero-shot{per_class or ' top-1'}",
        "linear-probe": f"linear probe{per_class}",
        "sts": "STS Spearman",
    }[task.task]


def _mean(mean: Mean, parts: Sequence[Figure]) -> Figure:
    value, chance = (sum(getattr(part, name) for part in parts) / len(parts) for name in ("value", "chance"))
    low = high = None
    if all(part.low is not None and part.high is not None for part in parts):
        low = value - math.hypot(*(part.value - (part.low or 0) for part in parts)) / len(parts)
        high = value + math.hypot(*((part.high or 0) - part.value for part in parts)) / len(parts)
    kind = parts[0].metric if isinstance(mean.task, FewShotConfig) else mean.task.task  # which says ways and shots
    return Figure(mean.name, f"mean {kind}", value, chance, low=low, high=high)
