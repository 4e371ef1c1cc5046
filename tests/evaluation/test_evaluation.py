"""Retrieval, zero-shot accuracy and chance against their definitions."""

import itertools
import json

import pytest
import torch
from torch.nn.functional import normalize

from helpers import make_sample, write_tar
from scaleclip.errors import ConfigError
from scaleclip.evaluation import retrieval
from scaleclip.evaluation.retrieval import RANKS, chance_recall_at_k, found_at_k
from scaleclip.evaluation.splits import open_splits
from scaleclip.evaluation.zero_shot import Outcomes, class_vectors, label_ranks, top_figure


def features(num, seed):
    return normalize(torch.randn(num, 6, generator=torch.Generator().manual_seed(seed)), dim=1)


def recall_at_k(*features_and_concepts):
    found = found_at_k(*features_and_concepts)
    return dict(zip(RANKS, found.double().mean(dim=0).tolist(), strict=True))


def recall_by_sorting(query, gallery, query_concept, gallery_concept, k):
    found = 0
    for vector, concept in zip(query, query_concept, strict=True):
        nearest = (gallery @ vector).argsort(descending=True)[:k]
        found += bool((gallery_concept[nearest] == concept).any())
    return found / len(query)


@pytest.mark.parametrize("block", [1, 7, 4096])
def test_recall_is_that_of_a_full_sort(monkeypatch, block):
    monkeypatch.setattr(retrieval, "_BLOCK", block)
    query, gallery = features(40, 0), features(60, 1)
    query_concept, gallery_concept = torch.arange(40) % 25, torch.arange(60) % 25
    recall = recall_at_k(query, gallery, query_concept, gallery_concept)
    assert list(recall) == list(RANKS)
    for k, value in recall.items():
        assert value == pytest.approx(recall_by_sorting(query, gallery, query_concept, gallery_concept, k))
    assert 0 < recall[1] < recall[5] < recall[10] < 1


def test_ties_count_against_the_query():
    """A model that maps everything to one vector finds nothing."""
    ones = normalize(torch.ones(30, 6), dim=1)
    assert set(recall_at_k(ones, ones, torch.arange(30), torch.arange(30)).values()) == {0.0}


def test_a_broken_model_finds_nothing():
    broken = torch.full((30, 6), float("nan"))
    assert set(recall_at_k(broken, broken, torch.arange(30), torch.arange(30)).values()) == {0.0}


def test_chance_is_the_mean_over_random_rankings():
    query_concept, gallery_concept = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0, 1, 1, 2, 3])
    chance = chance_recall_at_k(query_concept, gallery_concept)
    assert chance[1] == pytest.approx((3 / 7 + 2 / 7 + 1 / 7) / 3)
    hits = [
        sum(bool((gallery_concept[list(first)] == concept).any()) for concept in query_concept) / 3
        for first in itertools.combinations(range(7), 5)
    ]
    assert chance[5] == pytest.approx(sum(hits) / len(hits))
    assert chance[10] == 1


def test_zero_shot_takes_the_nearest_class_over_templates():
    vectors = {"a cat": (1, 0, 0), "the cat": (0, 1, 0), "a dog": (0, 0, 1), "the dog": (0, 0, 1)}
    classes = class_vectors(["cat", "dog"], ["a {}", "the {}"], lambda texts: torch.tensor([vectors[t] for t in texts]).float())
    torch.testing.assert_close(classes, normalize(torch.tensor([[1.0, 1, 0], [0, 0, 1]]), dim=1))
    images = normalize(torch.tensor([[1.0, 0.9, 0.1], [0.1, 0, 1], [0, 0, 1]]), dim=1)
    labels = torch.tensor([0, 1, 0])
    figure = top_figure("pets", "top-1", Outcomes(label_ranks(images, classes, labels), labels, 2))
    assert (figure.value, figure.chance, figure.majority) == pytest.approx((2 / 3, 1 / 2, 2 / 3))


@pytest.fixture
def split(tmp_path):
    write_tar(tmp_path / "held-00000.tar", [make_sample(i) for i in range(5)])
    (tmp_path / "held.json").write_text(
        json.dumps(
            {
                "name": "held",
                "about": "five things",
                "gallery": [{"concept": f"c{i}", "text": f"thing {i}"} for i in range(5)],
                "concepts": {f"{i:09d}": f"c{i}" for i in range(5)},
            }
        )
    )
    return tmp_path / "held.json"


def test_a_split_gives_its_images_in_order(split, cache):
    [data] = open_splits([str(split.parent / "*.json")], cache)
    batches = [data.images(start, start + 2, size=24) for start in range(0, data.num_images, 2)]
    assert [key for keys, _ in batches for key in keys] == [f"{i:09d}" for i in range(5)]
    assert [tuple(pixels.shape) for _, pixels in batches] == [(2, 3, 24, 24), (2, 3, 24, 24), (1, 3, 24, 24)]


def test_faults_of_a_split_are_errors(split, cache):
    with pytest.raises(ConfigError, match="nothing matches"):
        open_splits(["/nowhere/*.json"], cache)
    tree = json.loads(split.read_text())
    split.write_text(json.dumps(tree | {"galery": []}))
    with pytest.raises(ConfigError, match="cannot be read as a split"):
        open_splits([str(split)], cache)


def test_a_text_that_no_image_shows_is_no_query():
    """It is in the gallery, and cannot be found."""
    images = texts = torch.eye(6)[:3]
    distractor = torch.eye(6)[3:4]
    number, further = torch.arange(3), torch.arange(4)
    alone = retrieval.retrieval_figures("held", images, texts, number, number)
    beside = retrieval.retrieval_figures("held", images, torch.cat([texts, distractor]), number, further)
    assert [figure.value for figure in beside] == [figure.value for figure in alone] == [1.0] * 6
    assert beside[0].chance == pytest.approx(1 / 4)
    assert beside[3].chance == pytest.approx(1 / 3)
