"""Class names and prompt templates, from the data set's folder or from the installed clip-benchmark (the `eval` extra)."""

import functools
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scaleclip.errors import ConfigError
from scaleclip.evaluation.labelled import LabelledImages

_PLACE = "{}"
_EXAMPLES = {"classnames.txt": "", "zeroshot_classification_templates.txt": ", such as `a photo of a {c}.`"}
# names of the papers' tables that clip-benchmark has another word for; signs and case make no difference
_OTHER_NAMES = {"imagenet": "imagenet1k", "aircraft": "fgvcaircraft", "stanfordcars": "cars", "flowers102": "flowers"}


class Prompts(NamedTuple):
    """What zero-shot classification asks."""

    classes: tuple[str, ...]
    """Names by label."""
    templates: tuple[str, ...]
    """Texts with `{}` where the name goes; a class's vector is the mean over them."""


class _Known(NamedTuple):
    classes: Mapping[str, Sequence[str]]
    templates: Mapping[str, Sequence[str]]


def prompts_of(dataset: str, data: LabelledImages) -> Prompts:
    """Prompts of a data set.

    classnames.txt and zeroshot_classification_templates.txt in its folder come first, then what clip-benchmark has under
    `dataset`, then, for class names, what folders or metadata call the classes.

    Args:
        dataset: one of clip-benchmark's, such as `imagenet1k`, `cifar100`, `fgvc_aircraft`; `ImageNet` and the like also do.
        data: the opened data set.

    Raises:
        ConfigError: the names or templates are nowhere, are not as many as the classes, or stand in another order.
    """
    classes, templates = data.written_classes, data.written_templates
    stored = data.stored_classes
    # folders called by numbers say nothing about names
    if classes is not None and stored is not None and not all(name.isdecimal() for name in stored):
        _check_order(dataset, "classnames.txt", classes, stored)
    if templates is None:
        templates = tuple(_look_up(dataset, _known().templates, "zeroshot_classification_templates.txt"))
    if classes is None:
        known, named = _known().classes, data.class_names
        if named is not None and _key(dataset, known) is None:
            classes = tuple(name.replace("_", " ") for name in named)
        else:
            classes = tuple(_look_up(dataset, known, "classnames.txt"))
            _check_order(dataset, "clip-benchmark", classes, named or classes)
    return make_prompts(f"data set {data.name}", classes, templates)


def make_prompts(key: str, classes: Sequence[str], templates: Sequence[str]) -> Prompts:
    """Prompts from texts with `{}`, or clip-benchmark's `{c}`, in place of the class name.

    Raises:
        ConfigError: a template has no such place, or a list is empty.
    """
    if not classes or not templates:
        raise ConfigError(f"{key}: there are {len(classes)} class names and {len(templates)} templates: give some of both")
    templates = [template.replace("{c}", _PLACE) for template in templates]
    for template in templates:
        if _PLACE not in template:
            raise ConfigError(f"{key}: template {template!r} has no {{}} (or {{c}}) where the class name goes: add it")
    return Prompts(tuple(classes), tuple(templates))


def _check_order(dataset: str, source: str, classes: Sequence[str], named: Sequence[str]) -> None:
    if len(classes) != len(named):
        raise ConfigError(
            f"data set {dataset}: {source} names {len(classes)} classes, the images have {len(named)}: write the names "
            f"into classnames.txt in the data set's folder, one a line"
        )
    place = {_plain(name): label for label, name in enumerate(classes)}
    for label, name in enumerate(named):
        other = place.get(_plain(name), label)
        # two classes of ImageNet share their name with another
        if other != label and _plain(classes[label]) != _plain(name):
            raise ConfigError(
                f"data set {dataset}: class {label} is called {name!r} by the images, and {source} has that name for class "
                f"{other}: their orders differ; write the images' into classnames.txt in the data set's folder"
            )


def _look_up(dataset: str, known: Mapping[str, Sequence[str]], file: str) -> Sequence[str]:
    key = _key(dataset, known)
    if key is None:
        raise ConfigError(
            f"data set {dataset}: clip-benchmark has none of its {file.removesuffix('.txt')}: write {file} into the data set's "
            f"folder, one a line{_EXAMPLES[file]}; or set `prompts:` of the data set to one of {', '.join(sorted(known))}"
        )
    return known[key]


def _key(dataset: str, known: Mapping[str, Sequence[str]]) -> str | None:
    plain = _plain(dataset)
    plain = _OTHER_NAMES.get(plain, plain)
    return next((key for key in known if _plain(key) == plain), None)


def _plain(name: str) -> str:
    return "".join(sign for sign in name.lower() if sign.isalnum())


@functools.cache
def _known() -> _Known:
    """clip-benchmark's English names and templates; only its data files are touched."""
    try:
        # the package itself is empty; its modules import torchvision and more
        folder = importlib.resources.files("clip_benchmark").joinpath("datasets")
        tables = (folder.joinpath(f"en_{kind}.json") for kind in ("classnames", "zeroshot_classification_templates"))
        return _Known(*(json.loads(table.read_text(encoding="utf-8")) for table in tables))
    except ModuleNotFoundError:
        raise ConfigError(
            "class names and prompt templates come from clip-benchmark, which is not installed: pip install 'scaleclip[eval]', "
            "or write classnames.txt and zeroshot_classification_templates.txt beside the images"
        ) from None
