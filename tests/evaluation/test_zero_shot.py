"""Zero-shot classification of labelled images: clip-benchmark's figures, ranks, intervals, faults."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from classified import BATCH, PROMPTS, digits, tiny_encoder, write_parquet, write_tars
from scaleclip.data.cache import ShardCache
from scaleclip.errors import ConfigError, RunError
from scaleclip.evaluation.class_names import Prompts
from scaleclip.evaluation.encoder import Encoder
from scaleclip.evaluation.labelled import LabelledImages, open_labelled
from scaleclip.evaluation.splits import open_splits
from scaleclip.evaluation.zero_shot import (
    Outcomes,
    class_mean_figure,
    class_vectors,
    evaluate_zero_shot,
    label_ranks,
    top_figure,
)
from storage_tracker import StorageTracker


@pytest.fixture(scope="module")
def encoder(tiny_config_path: str) -> Encoder:
    return tiny_encoder(tiny_config_path)


def by_clip_benchmark(encoder: Encoder, images: list[tuple[torch.Tensor, torch.Tensor]], prompts: Prompts) -> dict[str, float]:
    """clip-benchmark's figures of (pixels, labels) batches."""
    # seconds to import, and it makes `import transformers` slower
    from clip_benchmark.metrics import zeroshot_classification

    class Loader(list[Any]):
        dataset = SimpleNamespace(classes=prompts.classes)

    templates = [template.replace("{}", "{c}") for template in prompts.templates]
    found: dict[str, float] = zeroshot_classification.evaluate(
        encoder.model, Loader(images), encoder.tokenizer, list(prompts.classes), templates, "cpu", amp=False
    )
    return found


def batches(data: LabelledImages, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [data.images(start, start + BATCH, size) for start in range(0, data.num_images, BATCH)]


def test_figures_of_digits_are_clip_benchmarks(encoder: Encoder, tmp_path: Path, cache: ShardCache) -> None:
    data = open_labelled("digits", str(write_tars(tmp_path, *digits(500))), cache)
    top_1, top_5, per_class = evaluate_zero_shot(encoder, data, PROMPTS, mean_per_class=True)
    expected = by_clip_benchmark(encoder, batches(data, encoder.size), PROMPTS)
    assert top_1.value == expected["acc1"]
    assert top_5.value == expected["acc5"]
    assert per_class.value == expected["mean_per_class_recall"]
    # more than one answer is given
    assert per_class.value not in (0.1, top_1.value)
    assert (top_1.metric, top_1.chance) == ("zero-shot top-1", 0.1)
    assert (top_5.metric, top_5.chance) == ("zero-shot top-5", 0.5)
    assert (per_class.metric, per_class.chance, per_class.majority) == ("zero-shot mean per class", 0.1, 0.1)
    assert all(figure.low < figure.value < figure.high for figure in (top_1, top_5, per_class))


def test_figures_of_the_demo_are_clip_benchmarks(encoder: Encoder, cache: ShardCache) -> None:
    [data] = open_splits(["package:scaleclip/data/demo/eval/unseen_clipart.json"], cache)
    with encoder.evaluating():
        keyed = [data.images(start, start + BATCH, encoder.size) for start in range(0, data.num_images, BATCH)]
        image_NE = torch.cat([encoder.images(pixels_BCHW) for _, pixels_BCHW in keyed])
        for task in data.split.zero_shot:
            labelled = [(pixels, torch.tensor([task.labels[key] for key in keys])) for keys, pixels in keyed]
            label_N = torch.cat([labels for _, labels in labelled])
            expected = by_clip_benchmark(encoder, labelled, Prompts(task.classes, task.templates))
            rank_N = label_ranks(image_NE, class_vectors(task.classes, task.templates, encoder.texts), label_N)
            outcomes = Outcomes(rank_N, label_N, len(task.classes))
            class_CE = class_vectors(task.classes, task.templates, encoder.texts)
            assert float((label_ranks(image_NE, class_CE, label_N) == 0).double().mean()) == expected["acc1"]
            assert top_figure("", "", outcomes).value == expected["acc1"]
            assert class_mean_figure("", "", outcomes).value == expected["mean_per_class_recall"]


@pytest.mark.parametrize("block", [7, 4096])
def test_a_labels_rank_is_its_place_in_the_order(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr("scaleclip.evaluation.zero_shot._BLOCK", block)
    random = torch.Generator().manual_seed(0)
    image_NE, class_CE = torch.randn(40, 6, generator=random), torch.randn(9, 6, generator=random)
    label_N = torch.arange(40) % 9
    order_NC = (image_NE @ class_CE.T).argsort(dim=1, descending=True)
    assert label_ranks(image_NE, class_CE, label_N).tolist() == (order_NC == label_N[:, None]).nonzero()[:, 1].tolist()


def test_memory_of_a_comparison_is_bounded_by_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaleclip.evaluation.zero_shot._BLOCK", 64)
    image_NE, class_CE, label_N = torch.randn(3000, 8), torch.randn(100, 8), torch.arange(3000) % 100
    with StorageTracker() as tracker:
        label_ranks(image_NE, class_CE, label_N)
    # fp32 similarities and a few masks of a block, and an int64 an image, twice when they are put together
    assert tracker.peak_bytes <= 64 * 100 * (4 + 5) + 3 * 8 * 3000


def test_of_equal_classes_the_first_is_the_answer() -> None:
    """A model that maps everything to one vector always says class 0."""
    assert label_ranks(torch.ones(4, 2), torch.ones(4, 2), torch.arange(4)).tolist() == [0, 1, 2, 3]


def test_a_broken_model_is_never_right() -> None:
    broken = torch.full((3, 2), float("nan"))
    assert label_ranks(broken, torch.ones(3, 2), torch.arange(3)).tolist() == [3, 3, 3]
    assert label_ranks(torch.ones(3, 2), broken, torch.arange(3)).tolist() == [3, 3, 3]


def test_figures_are_those_of_their_definitions() -> None:
    outcomes = Outcomes(torch.tensor([0, 0, 4, 5, 0, 1, 7]), torch.tensor([0, 0, 0, 0, 1, 1, 6]), 8)
    top_1, top_5, per_class = (
        top_figure("s", "m", outcomes),
        top_figure("s", "m", outcomes, 5),
        class_mean_figure("s", "m", outcomes),
    )
    assert (top_1.value, top_1.chance, top_1.majority) == (3 / 7, 1 / 8, 4 / 7)
    assert (top_5.value, top_5.chance, top_5.majority) == (5 / 7, 5 / 8, 1.0)
    assert per_class.value == pytest.approx((2 / 4 + 1 / 2 + 0) / 3)
    assert (per_class.low, per_class.high) == pytest.approx((1 / 6, 1 / 2), abs=0.2)


def test_few_classes_have_no_top_5(encoder: Encoder, tmp_path: Path, cache: ShardCache) -> None:
    images, labels = digits(100)
    few = [number for number, label in enumerate(labels) if label < 5]
    path = write_parquet(tmp_path / "a.parquet", [images[i] for i in few], [labels[i] for i in few], as_struct=False)
    prompts = Prompts(PROMPTS.classes[:5], PROMPTS.templates)
    figures = evaluate_zero_shot(encoder, open_labelled("few", str(path), cache), prompts, mean_per_class=False)
    assert [figure.metric for figure in figures] == ["zero-shot top-1"]
    assert figures[0].chance == 0.2


def test_labels_and_classes_must_fit(encoder: Encoder, tmp_path: Path, cache: ShardCache) -> None:
    data = open_labelled("digits", str(write_parquet(tmp_path / "a.parquet", *digits(60), as_struct=False)), cache)
    few = Prompts(PROMPTS.classes[:9], PROMPTS.templates)
    with pytest.raises(RunError, match=r"a\.parquet row 9 has label 9, which is not one of 0 to 8"):
        evaluate_zero_shot(encoder, data, few, mean_per_class=False)
    many = Prompts((*PROMPTS.classes, "ten"), PROMPTS.templates)
    with pytest.raises(RunError, match=r"1 of 11 classes have no image, such as 10"):
        evaluate_zero_shot(encoder, data, many, mean_per_class=True)
    named = open_labelled("digits", str(write_tars(tmp_path / "tars", *digits(60))), cache)
    with pytest.raises(ConfigError, match="there are 11 class names for its 10 classes"):
        evaluate_zero_shot(encoder, named, many, mean_per_class=True)


def test_names_with_braces_are_only_put_in_place() -> None:
    seen: list[str] = []

    def encode(texts: list[str]) -> torch.Tensor:
        seen.extend(texts)
        return torch.eye(len(texts))

    class_vectors(["{0}", "b"], ["a {} {x}"], encode)
    assert seen == ["a {0} {x}", "a b {x}"]


def test_the_mode_of_the_model_is_left_alone(encoder: Encoder, tmp_path: Path, cache: ShardCache) -> None:
    data = open_labelled("digits", str(write_tars(tmp_path, *digits(60))), cache)
    encoder.model.train()
    try:
        evaluate_zero_shot(encoder, data, PROMPTS, mean_per_class=False)
        assert encoder.model.training
    finally:
        encoder.model.eval()
