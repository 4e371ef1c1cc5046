"""Retrieval over ranks, in bounded memory, and against clip-benchmark's."""

import functools
import json

import pytest
import torch
from torch.nn.functional import normalize

from evaluation_models import tiny_encoder
from evaluation_rank_jobs import failing, found_on_ranks, measure
from helpers import encode_image, write_tar
from scaleclip.errors import RunError
from scaleclip.evaluation import retrieval
from scaleclip.evaluation.captioned import CaptionedImages, evaluate_retrieval
from scaleclip.evaluation.results import Figure
from scaleclip.evaluation.splits import open_splits
from scaleclip.files import resolve_path
from scaleclip.local_ranks import run_ranks
from storage_tracker import StorageTracker

DEMO = "package:scaleclip/data/demo/eval/unseen_family.json"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Captions of 11 images, texts, and a split of 5: block sizes and batches divide none of them."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "captions").mkdir()
    numbers = range(11)
    samples = [
        (f"{n:03d}", {"jpg": encode_image(n, "JPEG"), "txt": "\n".join(f"thing {n} {k}" for k in range(1 + n % 3)).encode()})
        for n in numbers
    ]
    write_tar(folder / "captions" / "0.tar", samples)
    (folder / "texts").mkdir()
    for name, rows in (
        ("queries", [{"id": f"q{n}", "text": f"what is {n}"} for n in range(5)]),
        ("documents", [{"id": f"d{n}", "text": f"it is {n}"} for n in range(7)]),
        ("relevances", [{"query": f"q{n}", "document": f"d{n}", "relevance": 1} for n in range(5)]),
    ):
        (folder / "texts" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_tar(folder / "held-00000.tar", samples[:5])
    gallery = [{"concept": f"c{n}", "text": f"thing {n}"} for n in range(5)]
    tree = {"name": "held", "about": "", "gallery": gallery, "concepts": {f"{n:03d}": f"c{n}" for n in range(5)}}
    (folder / "held.json").write_text(json.dumps(tree))
    return folder


@functools.cache
def figures_on(num_ranks, folder):
    return run_ranks(measure, num_ranks, folder, str(folder / "captions"), str(folder / "texts"), str(folder / "held.json"))


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_give_identical_figures(data, num_ranks):
    [alone] = figures_on(1, data)
    assert len(alone) == 6 + 2 + 6
    assert len({figure.value for figure in alone}) > 5
    assert figures_on(num_ranks, data) == [alone] * num_ranks


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_queries_are_dealt_over_ranks(num_ranks):
    alone = run_ranks(found_on_ranks, 1, 41, 4)
    assert run_ranks(found_on_ranks, num_ranks, 41, 4) == alone * num_ranks


def test_an_image_that_is_broken_on_one_rank_stops_all(data, tmp_path):
    (tmp_path / "captions").mkdir()
    good, bad = ((f"{n}", {"jpg": content, "txt": b"a"}) for n, content in enumerate((encode_image(0, "JPEG"), b"no image")))
    write_tar(tmp_path / "captions" / "0.tar", [good, bad])
    first, second = run_ranks(failing, 2, tmp_path, str(tmp_path / "captions"))
    assert second.startswith("RunError: data set captions: ")
    assert "sample 1 cannot be used: undecodable_image" in second
    assert first.startswith(f"RunError: rank 1 failed: {second[:60]}")


def test_memory_is_bounded_by_the_block(monkeypatch):
    """The docstring's formula: similarities of a block with masks, and what was found."""
    num_queries, num_items = 1500, 700
    query, gallery = normalize(torch.randn(num_queries, 8), dim=1), normalize(torch.randn(num_items, 8), dim=1)
    monkeypatch.setattr(retrieval, "_BLOCK", 16)
    with StorageTracker() as tracker:
        retrieval.found_at_k(query, gallery, torch.arange(num_queries) % num_items, torch.arange(num_items))
    assert 16 * 9 * num_items < tracker.peak_bytes <= 16 * 11 * num_items + 2 * 3 * num_queries + 2**12


@pytest.fixture(scope="module")
def demo_model(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("model"), batch=64)


class AsClipBenchmark:
    """A model as clip_benchmark calls it: tensors of pixels and tokens to features."""

    def __init__(self, encoder):
        self.encode_image, self.encode_text = encoder.model.encode_image, encoder.model.encode_text


def test_it_is_clip_benchmarks_on_the_demo(demo_model, cache, tmp_path):
    """Images of a demo split, with as many captions as texts share their concept: the last digit, since nothing ties."""
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    [split] = open_splits([DEMO], cache)
    keys, pixels = split.images(0, split.num_images, demo_model.size)
    text = {entry.concept: entry.text for entry in split.split.gallery}
    # several captions, all different: equal ones would tie
    captions = [
        [f"{n} {word} {text[split.split.concepts[key]]}" for word in ("a", "the", "my")[: 1 + n % 3]]
        for n, key in enumerate(keys)
    ]
    batches = [(pixels[at : at + 64], captions[at : at + 64]) for at in range(0, len(pixels), 64)]
    found = theirs.evaluate(
        AsClipBenchmark(demo_model), batches, demo_model.tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )

    class Data:
        name, num_images = "demo", len(pixels)

        def read(self, start, stop, size):
            return pixels[start:stop], captions[start:stop]

    with demo_model.evaluating():
        ours = {figure.metric: figure.value for figure in evaluate_retrieval(demo_model, Data())}
    for k in (1, 5, 10):
        assert torch.tensor(ours[f"text -> image R@{k}"]) == torch.tensor(found[f"image_retrieval_recall@{k}"])
        assert torch.tensor(ours[f"image -> text R@{k}"]) == torch.tensor(found[f"text_retrieval_recall@{k}"])
    assert 0 < ours["text -> image R@10"] < 1


def test_ties_count_against_us_and_not_against_clip_benchmark():
    """A model that gives one vector for all: which of equal ones are first is chance there, and none of them here."""
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    ones = normalize(torch.ones(20, 6), dim=1)
    found = retrieval.found_at_k(ones, ones, torch.arange(20), torch.arange(20))
    assert not found.any()
    assert theirs.recall_at_k(ones @ ones.T, torch.eye(20, dtype=torch.bool), k=10).mean() > 0


def test_a_split_says_what_cannot_be_used(data, cache):
    split = json.loads((data / "held.json").read_text())
    (data / "other-00000.tar").write_bytes((data / "held-00000.tar").read_bytes())
    (data / "other-00000_stats.json").write_bytes((data / "held-00000_stats.json").read_bytes())
    (data / "other.json").write_text(json.dumps(split | {"concepts": {}}))
    [other] = open_splits([str(data / "other.json")], cache)
    with pytest.raises(RunError, match="does not say what image 000 shows"):
        other.images(0, 1, 32)


def test_a_split_has_intervals(demo_model, cache):
    [split] = open_splits([DEMO], cache)
    assert resolve_path(DEMO).endswith("unseen_family.json")
    with demo_model.evaluating():
        figures = split.run(demo_model)
    for figure in figures:
        assert isinstance(figure, Figure)
        if "R@" in figure.metric:
            assert figure.low <= figure.value <= figure.high
    assert any(figure.low < figure.value < figure.high for figure in figures if figure.low is not None)


def test_captions_are_named_in_errors(tmp_path, cache):
    (tmp_path / "0.tar").write_bytes(b"no tar")
    with pytest.raises(Exception, match="mine"):
        CaptionedImages("mine", str(tmp_path), "test", cache)
