"""Class names and templates: from clip-benchmark, from the data set's folder, and what is wrong with them."""

import importlib.resources
import subprocess
import sys
from pathlib import Path

import pytest

from classified import digits, write_folder
from scaleclip.data.cache import ShardCache
from scaleclip.errors import ConfigError
from scaleclip.evaluation import class_names
from scaleclip.evaluation.class_names import make_prompts, prompts_of
from scaleclip.evaluation.labelled import LabelledImages, open_labelled

IMAGE = digits(1)[0][0]
# recipes: ImageNet and the 15 sets of LaCLIP's table; classes, templates and whether clip-benchmark names the classes
SETS = {
    "ImageNet": (1000, 80, True),
    "Food-101": (101, 1, False),
    "CIFAR-10": (10, 18, False),
    "CIFAR-100": (100, 18, False),
    "SUN397": (397, 2, False),
    "Cars": (196, 8, False),
    "Aircraft": (100, 2, False),
    "DTD": (47, 8, False),
    "Pets": (37, 1, True),
    "Caltech-101": (102, 34, True),
    "Flowers": (102, 1, True),
    "STL-10": (10, 2, False),
    "EuroSAT": (10, 3, True),
    "RESISC45": (45, 4, False),
    "GTSRB": (43, 3, True),
    "Country211": (211, 5, True),
}


def folder_of(root: Path, names: list[str], cache: ShardCache) -> LabelledImages:
    """An image set with a folder of one image a class."""
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "0.png").write_bytes(IMAGE)
    return open_labelled(root.name, str(root), cache)


@pytest.mark.parametrize("name", SETS)
def test_every_set_of_the_papers_has_prompts(tmp_path: Path, cache: ShardCache, name: str) -> None:
    num_classes, num_templates, has_names = SETS[name]
    prompts = prompts_of(name, folder_of(tmp_path / "set", [f"n{number:04d}_x" for number in range(num_classes)], cache))
    assert len(prompts.classes) == num_classes
    assert len(prompts.templates) == num_templates
    assert all("{}" in template for template in prompts.templates)
    assert (prompts.classes[0] != "n0000 x") == has_names
    assert not any("_x" in each for each in prompts.classes)


def test_clip_benchmarks_words_are_taken_as_they_are(tmp_path: Path, cache: ShardCache) -> None:
    prompts = prompts_of("imagenet1k", folder_of(tmp_path / "i", [f"n{number:08d}" for number in range(1000)], cache))
    assert prompts.classes[:2] == ("tench", "goldfish")
    assert prompts.templates[0] == "a bad photo of a {}."


def test_files_beside_the_images_win(tmp_path: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "set" / "test"
    folder_of(folder, ["a", "b"], cache)
    (tmp_path / "set" / "classnames.txt").write_text("ape\nbear\n")
    data = open_labelled("mine", str(folder), cache)
    assert prompts_of("cifar10", data).classes == ("ape", "bear")
    assert len(prompts_of("cifar10", data).templates) == 18
    (folder / "zeroshot_classification_templates.txt").write_text("a {c} {0}\n\n")
    monkeypatch.setattr(class_names, "_known", lambda: pytest.fail("clip-benchmark is not needed"))
    assert prompts_of("mine", open_labelled("mine", str(folder), cache)).templates == ("a {} {0}",)


def test_faults_say_the_way_out(tmp_path: Path, cache: ShardCache) -> None:
    data = folder_of(tmp_path / "set", ["ant", "bee"], cache)
    with pytest.raises(ConfigError, match=r"none of its zeroshot_class.*: write .*a photo of a \{c\}.*`prompts:` .*cifar10"):
        prompts_of("mine", data)
    with pytest.raises(ConfigError, match=r"clip-benchmark names 10 classes, the images have 2"):
        prompts_of("eurosat", data)
    data.class_names = None
    with pytest.raises(ConfigError, match=r"none of its classnames: write classnames\.txt"):
        prompts_of("cifar10", data)
    for template in ("a photo", "a {0} photo", "a { } photo"):
        with pytest.raises(ConfigError, match=r"data set x: template '.*photo' has no \{\}"):
            make_prompts("data set x", ["a"], ["a {c}", template])
    with pytest.raises(ConfigError, match="0 class names and 1 templates"):
        make_prompts("data set x", [], ["a {}"])


def test_another_order_of_classes_is_refused(tmp_path: Path, cache: ShardCache) -> None:
    """Pets' folders by name are clip-benchmark's order; in another one every figure would be wrong without a sign."""
    names = list(class_names._known().classes["pets"])
    folders = [name.replace(" ", "_").lower() for name in names]
    assert prompts_of("pets", folder_of(tmp_path / "pets", folders, cache)).classes == tuple(names)
    data = open_labelled("pets", str(tmp_path / "pets"), cache)
    data.class_names = (*folders[1:], folders[0])
    with pytest.raises(ConfigError, match=r"class 0 is called 'american_bulldog' by the images, .* for class 1: their orders"):
        prompts_of("pets", data)


def test_without_the_extra_the_error_names_it(tmp_path: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    data = folder_of(tmp_path / "set", ["ant", "bee"], cache)
    class_names._known.cache_clear()
    monkeypatch.setattr(importlib.resources, "files", missing)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'scaleclip\[eval\]'"):
        prompts_of("cifar10", data)


def test_only_the_data_files_of_clip_benchmark_are_touched() -> None:
    code = (
        "import sys; from scaleclip.evaluation import class_names; assert class_names._known().templates;"
        "print([name for name in sys.modules if name.startswith(('clip_benchmark.', 'sklearn', 'scipy'))])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_folder_names_become_words(tmp_path: Path, cache: ShardCache) -> None:
    images, labels = digits(10)
    folder = write_folder(tmp_path / "set", images, labels)
    (folder / "0").rename(folder / "traffic_light")
    assert prompts_of("cifar10", open_labelled("mine", str(folder), cache)).classes[-1] == "traffic light"


def test_written_names_in_another_order_than_the_folders_are_refused(tmp_path: Path, cache: ShardCache) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "classnames.txt").write_text("beagle\nAbyssinian\n")
    (tmp_path / "set" / "zeroshot_classification_templates.txt").write_text("a {}\n")
    data = folder_of(tmp_path / "set", ["Abyssinian", "beagle"], cache)
    with pytest.raises(ConfigError, match=r"class 0 is called 'Abyssinian' by the images, and classnames\.txt has"):
        prompts_of("set", data)
    (tmp_path / "set" / "classnames.txt").write_text("Abyssinian cat\nbeagle\n")
    assert prompts_of("set", open_labelled("set", str(tmp_path / "set"), cache)).classes == ("Abyssinian cat", "beagle")
