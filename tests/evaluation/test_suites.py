"""Suites: their YAML, what they open, what is missing, and means over data sets."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

from classified import PROMPTS, digits, tiny_encoder, write_folder
from helpers import encode_image, write_tar
from scaleclip.config import EvalConfig
from scaleclip.errors import ConfigError
from scaleclip.evaluation.evaluate import distinct, occurrences
from scaleclip.evaluation.results import Figure
from scaleclip.evaluation.suite import open_evaluations, open_suite
from scaleclip.evaluation.suite_config import SUITES, load_suite
from scaleclip.files import resolve_path

LACLIP_15 = (
    "food101", "cifar10", "cifar100", "sun397", "cars", "fgvc_aircraft", "dtd", "pets", "caltech101", "flowers", "stl10",
    "eurosat", "resisc45", "gtsrb", "country211",
)  # fmt: skip
PER_CLASS = {"fgvc_aircraft", "pets", "caltech101", "flowers"}


def write(path, **tree):
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.fixture
def classified(monkeypatch):
    """Classification in place of the real one: a data set's accuracy is the length of its name in per cent."""
    calls = []

    def module(name, **members):
        monkeypatch.setitem(sys.modules, f"scaleclip.evaluation.{name}", ModuleType(name))
        for key, value in members.items():
            setattr(sys.modules[f"scaleclip.evaluation.{name}"], key, value)

    def measured(metric, mean_per_class):
        def measure(encoder, data, *more, **options):
            name = data.name.removesuffix(" (train)")
            calls.append((metric, name, data.path, more, options))
            value = len(name) / 100
            named = f"{metric} mean per class" if mean_per_class and options["mean_per_class"] else metric
            return [Figure(name, named, value, 0.1, low=value - 0.01, high=value + 0.02)]

        return measure

    def open_labelled(name, path, cache):
        digest = f"digest of {path}"
        return SimpleNamespace(name=name, path=path, num_images=7, class_names=None, fingerprint=lambda: digest)

    module("labelled", open_labelled=open_labelled)
    module("class_names", prompts_of=lambda dataset, data: (f"prompts of {dataset}", data.name))
    module("few_shot", evaluate_few_shot=measured("5-way 5-shot", False), few_classes=lambda *_: "too few")
    module("linear_probe", evaluate_linear_probe=measured("linear probe", True))
    real = sys.modules["scaleclip.evaluation.zero_shot"]
    zero_shot = measured("zero-shot", True)

    def evaluate_zero_shot(*arguments, mean_per_class):
        [figure] = zero_shot(*arguments, mean_per_class=mean_per_class)
        return [figure if mean_per_class else figure._replace(metric="zero-shot top-1")]

    monkeypatch.setattr(real, "evaluate_zero_shot", evaluate_zero_shot, raising=False)
    return calls


def test_our_suites_are_the_papers():
    with open(resolve_path(SUITES)) as file:
        names = set(yaml.safe_load(file)["suites"])
    assert names == {"imagenet", "laclip-15", "few-shot", "linear-probe", "retrieval", "text", "demo", "all"}
    [task] = load_suite("laclip-15").tasks
    assert (task.task, task.datasets, task.mean) == ("zero-shot", LACLIP_15, "laclip-15")
    datasets = load_suite("laclip-15").datasets
    assert {name for name, each in datasets.items() if each.mean_per_class} == PER_CLASS
    [few] = load_suite("few-shot").tasks
    assert (few.datasets, few.ways, few.shots, few.queries, few.episodes) == (LACLIP_15, 5, 5, 15, 600)
    assert load_suite("retrieval").tasks[0].datasets == ("coco", "flickr30k", "urban1k")
    kinds = [task.task for task in load_suite("all").tasks]
    assert kinds == ["zero-shot", "zero-shot", "few-shot", "linear-probe", "linear-probe", "retrieval", "sts", "text-retrieval"]


def test_clip_benchmark_knows_the_names():
    prompts = pytest.importorskip("clip_benchmark.datasets.builder").__file__.replace("builder.py", "")
    with open(f"{prompts}/en_zeroshot_classification_templates.json") as file:
        assert {"imagenet1k", *LACLIP_15} <= json.load(file).keys()


def test_a_file_of_ones_own_adds_replaces_and_includes(tmp_path):
    path = write(
        tmp_path / "my.yaml",
        datasets={"mine": {"test": "m"}, "pets": {"test": "elsewhere", "mean_per_class": False}},
        suites={
            "a": [{"task": "zero-shot", "datasets": "mine"}, "imagenet"],
            "b": [{"task": "zero-shot", "datasets": ["pets"]}],
        },
    )
    suite = load_suite(f"{path}:a")
    assert [task.datasets for task in suite.tasks] == [("mine",), ("imagenet1k",)]
    assert load_suite(f"{path}:b").datasets["pets"].test == "elsewhere"
    with pytest.raises(ConfigError, match=r"it has a, b: name one as .*my.yaml:NAME"):
        load_suite(path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"task": "zero-shot", "dataset": "pets"}, r"unknown key 'suites.a.0.dataset'; did you mean 'suites.a.0.datasets'\?"),
        (
            {"task": "zero-shoot", "datasets": "pets"},
            r"suites.a.0.task='zero-shoot'; did you mean 'zero-shot'\?; tasks: zero-shot,",
        ),
        ({"datasets": "pets"}, "suites.a.0.task=None"),
        ({"task": "zero-shot"}, "suites.a.0.datasets=.*field required"),
        ({"task": "few-shot", "datasets": "pets", "ways": 1}, "suites.a.0.ways=1: input should be greater than or equal to 2"),
        ({"task": "retrieval", "datasets": "coco", "mean": "x"}, "unknown key 'suites.a.0.mean'"),
        ({"task": "zero-shot", "datasets": "pet"}, "suites.a: there is no data set 'pet'; did you mean 'pets'"),
        ({"task": "linear-probe", "datasets": "x"}, "datasets.x.train is not set: a linear probe learns from it"),
        ({"task": "zero-shot", "datasets": "y"}, r"unknown key 'datasets.y.tset'; did you mean 'datasets.y.test'"),
        ({"task": "zero-shot", "datasets": "z"}, "datasets.z is 'path': give keys with values: test, train"),
        ("imagenett", "suite 'imagenett' is unknown; did you mean 'imagenet'"),
        ("a", "suites go in a circle: a -> a"),
    ],
)
def test_faults_say_where_they_are(entry, message, tmp_path):
    datasets = {"x": {"test": "x"}, "y": {"tset": "y"}, "z": "path"}
    path = write(tmp_path / "my.yaml", datasets=datasets, suites={"a": [entry]})
    with pytest.raises(ConfigError, match=message):
        load_suite(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("suites: [", "cannot be read as suites"),
        ("suite: {}", "should hold datasets and suites, each by name: 'suite'; did you mean 'suites'"),
        ("[]", "it has no suites"),
        ("suites: {a: 3}", "suites.a is 3: give a list of tasks"),
    ],
)
def test_faults_of_a_file_are_errors(content, message, tmp_path):
    (tmp_path / "my.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_suite(str(tmp_path / "my.yaml"))


def test_an_unknown_suite_and_file_are_errors():
    with pytest.raises(
        ConfigError, match=r"suite 'imagnet' is unknown; did you mean 'imagenet'\?; suites: imagenet, laclip-15"
    ):
        load_suite("imagnet")
    with pytest.raises(ConfigError, match=r"/nowhere/my.yaml cannot be read as suites"):
        load_suite("/nowhere/my.yaml")


def test_data_sets_may_lie_behind_urls(tmp_path, cache, monkeypatch):
    asked = []

    def open_at(name, path, cache):
        asked.append((name, path))
        raise ConfigError("no store here")

    monkeypatch.setattr("scaleclip.evaluation.labelled.open_labelled", open_at)
    for root in ("s3://bucket/eval", "https://host/eval"):
        with pytest.raises(ConfigError, match="no store here"):
            open_suite(load_suite("imagenet"), root, cache)
    assert asked == [("imagenet1k", f"{root}/imagenet1k/test") for root in ("s3://bucket/eval", "https://host/eval")]


def test_every_missing_data_set_is_named_with_its_layout(tmp_path, cache):
    (tmp_path / "coco").mkdir()
    with pytest.raises(ConfigError) as caught:
        open_suite(load_suite("retrieval"), str(tmp_path), cache)
    message = str(caught.value)
    assert f"flickr30k: {tmp_path}/flickr30k: Karpathy's dataset_*.json" in message
    assert f"urban1k: {tmp_path}/urban1k: " in message
    assert "coco:" not in message
    assert "--skip-missing" in message
    (tmp_path / "imagenet1k" / "test").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"imagenet1k: .*/imagenet1k/train: a folder of images for each class"):
        open_suite(load_suite("linear-probe"), str(tmp_path), cache)


def test_what_is_missing_can_be_left_out(tmp_path, cache, classified):
    for name in LACLIP_15[1:]:
        (tmp_path / name / "test").mkdir(parents=True)
    opened = open_suite(load_suite("laclip-15"), str(tmp_path), cache, skip_missing=True)
    assert [each.name for each in opened.evaluations] == [f"zero-shot {name}" for name in LACLIP_15[1:]]
    assert [each.dataset for each in opened.missing] == ["food101"]
    figures = [figure for each in opened.evaluations for figure in each.run(None)]
    assert opened.means_of(figures) == [], "a mean of 14 is not one of 15"


def test_tasks_are_called_with_their_options_and_averaged(tmp_path, cache, classified):
    for name in LACLIP_15:
        for part in ("test", "train"):
            (tmp_path / name / part).mkdir(parents=True)
    path = write(
        tmp_path / "my.yaml",
        suites={
            "mine": [
                "laclip-15",
                {"task": "few-shot", "datasets": ["pets", "dtd"], "mean": "two", "episodes": 7, "seed": 3},
                {"task": "linear-probe", "datasets": ["pets", "dtd"], "mean": "two"},
            ]
        },
    )
    opened = open_suite(load_suite(path), str(tmp_path), cache)
    features = tmp_path / "features"
    figures = [figure for each in opened.evaluations for figure in each.run("model", features)]
    calls = {(metric, name): (path, more, options) for metric, name, path, more, options in classified}
    assert calls["zero-shot", "pets"] == (f"{tmp_path}/pets/test", (("prompts of pets", "pets"),), {"mean_per_class": True})
    assert calls["zero-shot", "dtd"][2] == {"mean_per_class": False}
    options = {"features": features, "ways": 5, "shots": 5, "queries": 15, "episodes": 7, "seed": 3}
    assert calls["5-way 5-shot", "dtd"] == (f"{tmp_path}/dtd/test", (), options)
    train, [test], options = calls["linear probe", "pets"]
    assert (train, test.path) == (f"{tmp_path}/pets/train", f"{tmp_path}/pets/test")
    assert options == {"mean_per_class": True, "features": features, "validation": None}
    of = {(figure.split, figure.metric): (mean.parts, figure) for mean, figure in opened.means_of(figures)}
    means = {key: figure for key, (_, figure) in of.items()}
    assert set(means) == {("laclip-15", "mean zero-shot"), ("two", "mean 5-way 5-shot"), ("two", "mean linear-probe")}
    assert of["two", "mean linear-probe"][0] == ["linear-probe pets", "linear-probe dtd"]
    mean = means["laclip-15", "mean zero-shot"]
    assert mean.value == pytest.approx(sum(map(len, LACLIP_15)) / 1500)
    assert mean.chance == pytest.approx(0.1)
    # half widths of independent data sets add up as squares
    assert mean.value - mean.low == pytest.approx(0.01 / 15**0.5)
    assert mean.high - mean.value == pytest.approx(0.02 / 15**0.5)


def test_a_definition_changes_with_options_and_place(tmp_path, cache, classified):
    def definition(root, **options):
        (root / "pets" / "test").mkdir(parents=True, exist_ok=True)
        entry = {"task": "few-shot", "datasets": "pets"} | options
        [each] = open_suite(load_suite(write(tmp_path / "my.yaml", suites={"a": [entry]})), str(root), cache).evaluations
        return each.definition

    first = definition(tmp_path / "a")
    assert definition(tmp_path / "a") == definition(tmp_path / "a", mean="x") == first
    assert len({first, definition(tmp_path / "b"), definition(tmp_path / "a", shots=1)}) == 3


def test_captions_texts_and_splits_are_opened(tmp_path, cache):
    (tmp_path / "captions").mkdir()
    write_tar(tmp_path / "captions" / "0.tar", [("a", {"jpg": encode_image(0, "JPEG"), "txt": b"one\ntwo"})])
    (tmp_path / "pairs.csv").write_text("text1,text2,score\na,b,1\na,c,2\n")
    path = write(
        tmp_path / "my.yaml",
        datasets={"captions": {"test": "captions"}, "pairs": {"test": "pairs.csv"}},
        suites={"a": [{"task": "retrieval", "datasets": "captions"}, {"task": "sts", "datasets": "pairs"}, "demo"]},
    )
    opened = open_evaluations(EvalConfig(suite=path, data=str(tmp_path)), cache)
    names = [each.name for each in opened.evaluations]
    assert names == ["retrieval captions", "sts pairs", "unseen_clipart", "unseen_concept", "unseen_family", "unseen_vendor"]


@pytest.mark.parametrize("changed", ["captions", "image", "scores", "nothing"])
def test_a_definition_changes_with_the_data(tmp_path, cache, changed):
    """As many of them as before."""

    def definitions(caption="two", image=0, score=2):
        (tmp_path / "captions").mkdir(exist_ok=True)
        picture = encode_image(image, "PNG")
        if not (tmp_path / "captions" / "0.tar").exists() or changed in ("captions", "image"):
            write_tar(tmp_path / "captions" / "0.tar", [("a", {"png": picture, "txt": f"one\n{caption}".encode()})])
        (tmp_path / "pairs.csv").write_text(f"text1,text2,score\na,b,1\na,c,{score}\n")
        path = write(
            tmp_path / "my.yaml",
            datasets={"captions": {"test": "captions"}, "pairs": {"test": "pairs.csv"}},
            suites={"a": [{"task": "retrieval", "datasets": "captions"}, {"task": "sts", "datasets": "pairs"}]},
        )
        return [each.definition for each in open_evaluations(EvalConfig(suite=path, data=str(tmp_path)), cache).evaluations]

    before = definitions()
    after = definitions(
        **{"captions": {"caption": "owt"}, "image": {"image": 1}, "scores": {"score": 3}, "nothing": {}}[changed]
    )
    are_equal = [one == other for one, other in zip(before, after, strict=True)]
    assert are_equal == {"captions": [False, True], "image": [False, True], "scores": [True, False]}.get(changed, [True, True])


def test_a_splits_definition_changes_with_its_tars(tmp_path, cache):
    def definition():
        [split] = open_evaluations(EvalConfig(splits=(str(tmp_path / "unseen_family.json"),)), cache).evaluations
        return split.definition

    for path in Path(resolve_path("package:scaleclip/data/demo/eval")).glob("unseen_family*"):
        shutil.copy(path, tmp_path)
    before = definition()
    assert definition() == before
    os.utime(next(tmp_path.glob("*.tar")), (1, 1))
    assert definition() != before


def test_splits_come_before_the_suite(cache):
    split = "package:scaleclip/data/demo/eval/unseen_family.json"
    opened = open_evaluations(EvalConfig(splits=(split,), suite="demo"), cache)
    assert [each.name for each in opened.evaluations][:2] == ["unseen_family", "unseen_clipart"]
    assert not open_evaluations(EvalConfig(), cache).evaluations


def test_figures_of_one_name_stay_apart():
    figures = [Figure("a", "x", 0.1, 0), Figure("a", "y", 0.2, 0), Figure("a", "x", 0.3, 0), Figure("a", "x", 0.4, 0)]
    assert [(f.split, f.metric) for f in distinct(figures)] == [("a", "x"), ("a", "y"), ("a (2)", "x"), ("a (3)", "x")]
    assert occurrences("abab") == [1, 1, 2, 2]


def test_one_evaluation_is_enough(tmp_path, cache, classified):
    """Two ways to name the same; another option is another."""
    (tmp_path / "pets" / "test").mkdir(parents=True)
    few = {"task": "few-shot", "datasets": "pets"}
    path = write(tmp_path / "my.yaml", suites={"a": [few, few | {"mean": "x"}, few | {"shots": 1}, "demo"]})
    split = "package:scaleclip/data/demo/eval/unseen_family.json"
    opened = open_evaluations(EvalConfig(splits=(split,), suite=path, data=str(tmp_path)), cache)
    names = [each.name for each in opened.evaluations]
    few_shot = ["few-shot 5-way 5-shot pets", "few-shot 5-way 1-shot pets"]
    assert names == ["unseen_family", *few_shot, "unseen_clipart", "unseen_concept", "unseen_vendor"]
    assert [mean.parts for mean in opened.means] == [few_shot[:1]]


def test_too_few_classes_are_said_before_anything_is_measured(tmp_path, cache):
    images, labels = digits(40)
    write_folder(tmp_path / "digits", images, [label % 3 for label in labels])
    path = write(
        tmp_path / "my.yaml", datasets={"d": {"test": "digits"}}, suites={"a": [{"task": "few-shot", "datasets": "d"}]}
    )
    with pytest.raises(ConfigError, match="data set d has 3 classes, and an episode 5: set `ways: 3` or fewer"):
        open_evaluations(EvalConfig(suite=path, data=str(tmp_path)), cache)


def test_ranks_that_see_other_data_are_an_error(tmp_path, cache, classified, monkeypatch):
    for name in ("pets", "dtd"):
        (tmp_path / name / "test").mkdir(parents=True)
    path = write(tmp_path / "my.yaml", suites={"a": [{"task": "few-shot", "datasets": ["pets", "dtd"]}]})
    opened = open_evaluations(EvalConfig(suite=path, data=str(tmp_path)), cache)
    opened.check_same_everywhere()
    for others, said in (
        (lambda mine: [(mine[0][0], 8), mine[1]], "rank 0 few-shot 5-way 5-shot pets with 7 items, rank 1 .* with 8 items"),
        (lambda mine: mine[:1], "rank 0 few-shot 5-way 5-shot dtd with 7 items, rank 1 nothing"),
    ):
        monkeypatch.setattr("scaleclip.evaluation.suite.gather_objects", lambda mine, others=others: [mine, others(mine)])
        with pytest.raises(ConfigError, match=f"ranks see other data of evaluations: {said}"):
            opened.check_same_everywhere()


def test_classification_from_yaml_to_figures(tmp_path, cache, tiny_config_path):
    """With the real readers and tasks, on digits."""
    images, labels = digits(400)
    write_folder(tmp_path / "digits" / "train", images[:250], labels[:250])
    write_folder(tmp_path / "digits" / "test", images[250:], labels[250:])
    (tmp_path / "digits" / "classnames.txt").write_text("\n".join(PROMPTS.classes))
    (tmp_path / "digits" / "zeroshot_classification_templates.txt").write_text("\n".join(PROMPTS.templates))
    kinds = [{"task": "zero-shot"}, {"task": "few-shot", "shots": 1, "queries": 5, "episodes": 9}, {"task": "linear-probe"}]
    path = write(
        tmp_path / "my.yaml",
        datasets={"digits": {"test": "digits/test", "train": "digits/train", "validation": "digits/test"}},
        suites={"a": [kind | {"datasets": "digits", "mean": "one"} for kind in kinds]},
    )
    opened = open_evaluations(EvalConfig(suite=path, data=str(tmp_path)), cache)
    figures = {(each.split, each.metric): each for each in opened.evaluate(tiny_encoder(tiny_config_path), tmp_path / "kept")}
    metrics = ["zero-shot top-1", "zero-shot top-5", "5-way 1-shot", "linear probe"]
    means = ["mean zero-shot", "mean 5-way 1-shot", "mean linear-probe"]
    assert list(figures) == [("digits", metric) for metric in metrics] + [("one", metric) for metric in means]
    assert figures["one", "mean 5-way 1-shot"].value == figures["digits", "5-way 1-shot"].value
    assert figures["digits", "linear probe"].value > 0.3
    assert not (tmp_path / "kept").exists()
