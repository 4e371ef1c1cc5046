"""Reported figures: their file, and how they are held against measured ones."""

import pytest
import yaml
from rich.console import Console

from scaleclip.errors import ConfigError
from scaleclip.evaluation import targets
from scaleclip.evaluation.results import Figure
from scaleclip.evaluation.suite_config import SUITES, load_suite
from scaleclip.evaluation.targets import beside, compare, load_target, load_targets, targets_table
from scaleclip.files import resolve_path

# what of the papers no suite measures
ELSEWHERE = {"clip-benchmark-retrieval", "jina-retrieval", "mteb", "mteb-retrieval", "mteb-sts"}


def figure(dataset, metric, value, **more):
    return Figure(dataset, metric, value, 0.001, **more)


def text(table):
    console = Console(width=220, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_the_recipes_figures_are_there():
    def percent(name):
        return {(each.dataset, each.metric): each.percent for each in load_target(name).figures}

    zero_shot = ("imagenet1k", "zero-shot top-1")
    assert percent("laclip-cc12m-b16") == {
        zero_shot: 48.4,
        ("laclip-15", "mean zero-shot"): 46.2,
        ("laclip-15", "mean 5-way 5-shot"): 85.8,
        ("imagenet1k", "linear probe"): 72.3,
    }
    assert percent("open-clip-laion400m-b16-240")[zero_shot] == 69.21
    assert percent("recap-clip-p0.8-b16") == {
        zero_shot: 69.2,
        ("coco", "image -> text R@1"): 61.5,
        ("coco", "text -> image R@1"): 42.2,
        ("flickr30k", "image -> text R@1"): 85.2,
        ("flickr30k", "text -> image R@1"): 66.9,
    }
    assert len(load_targets()) == 32


def test_every_figure_is_of_a_known_data_set_and_metric():
    """A misspelt name would never be measured."""
    datasets = set(yaml.safe_load(open(resolve_path(SUITES)))["datasets"])  # noqa: SIM115
    kinds = {"few-shot": "5-way 5-shot"}
    averaged = [task for task in load_suite("all").tasks if getattr(task, "mean", None)]
    means = {(task.mean, f"mean {kinds.get(task.task, task.task)}") for task in averaged}
    metrics = {"zero-shot top-1", "linear probe", "image -> text R@1", "text -> image R@1"}
    for name, target in load_targets().items():
        for each in target.figures:
            known = each.dataset in datasets and each.metric in metrics
            assert known or (each.dataset, each.metric) in means or each.dataset in ELSEWHERE, (name, each)
            assert 1 < each.percent < 100


def test_measured_stands_beside_expected():
    measured = [
        figure("imagenet1k", "zero-shot top-1", 0.4712, low=0.467, high=0.4753),
        figure("imagenet1k", "linear probe", 0.8),
    ]
    compared = compare(load_target("laclip-cc12m-b16"), measured)
    by_metric = {(each.reported.dataset, each.reported.metric): each for each in compared}
    assert by_metric["imagenet1k", "zero-shot top-1"].difference == pytest.approx(-1.28)
    assert by_metric["laclip-15", "mean zero-shot"].measured is None
    assert by_metric["laclip-15", "mean zero-shot"].difference is None
    said = text(targets_table(load_target("laclip-cc12m-b16"), measured))
    [row] = [line for line in said.splitlines() if "zero-shot top-1" in line]
    for part in ("imagenet1k", "48.40", "47.12", "-1.28", "46.7 to 47.5", "zero-shot transfer (LaCLIP README)"):
        assert part in row
    assert "arXiv:2305.20088" in said
    assert "+7.70" in said
    assert said.count("not measured") == 2


def test_reported_stands_beside_measured():
    measured = [figure("pets", "zero-shot top-1", 0.5), figure("imagenet1k", "zero-shot top-1", 0.5)]
    pets, imagenet = beside(measured, load_target("laclip-cc12m-b16"))
    assert (pets.reported, pets.difference) == (None, None)
    assert (imagenet.measured, imagenet.difference) == (measured[1], pytest.approx(1.6))
    assert [each.reported for each in beside(measured, None)] == [None, None]


def test_the_first_of_several_counts():
    twice = [figure("imagenet1k", "zero-shot top-1", 0.5), figure("imagenet1k", "zero-shot top-1", 0.1)]
    assert compare(load_target("laclip-cc12m-b16"), twice)[0].measured.value == 0.5


def test_an_unknown_target_gets_a_suggestion():
    with pytest.raises(ConfigError, match=r"--against=laclip-cc12-b16: .* \(did you mean 'laclip-cc12m-b16'"):
        load_target("laclip-cc12-b16")
    with pytest.raises(ConfigError, match=r"configs/targets\.yaml has open-clip-laion400m-b32, "):
        load_target("x")


def test_a_fault_of_the_file_is_named(tmp_path, monkeypatch):
    path = tmp_path / "targets.yaml"
    monkeypatch.setattr(targets, "TARGETS", str(path))
    path.write_text("a: {system: s, source: p, figures: [{dataset: d, metric: m, percent: high, where: w}]}")
    with pytest.raises(ConfigError, match=r"targets.a.figures.0.percent='high'"):
        load_targets()
