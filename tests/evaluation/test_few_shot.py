"""Prototypical few-shot classification against its definition."""

import logging
from pathlib import Path

import pytest
import torch

from classified import digits, tiny_encoder, write_folder, write_tars
from scaleclip.data.cache import ShardCache
from scaleclip.errors import RunError
from scaleclip.evaluation import few_shot
from scaleclip.evaluation.features import encode_features
from scaleclip.evaluation.few_shot import draw_episodes, episode_accuracies, evaluate_few_shot
from scaleclip.evaluation.labelled import open_labelled

IMAGES, LABELS = digits(300)


def accuracy_by_loops(feature_NE: torch.Tensor, image_WK: torch.Tensor, shots: int) -> float:
    prototypes = [sum(feature_NE[image] for image in images[:shots]) / shots for images in image_WK]
    right = []
    for way, images in enumerate(image_WK):
        for query in images[shots:]:
            distances = [float((feature_NE[query] - prototype).square().sum()) for prototype in prototypes]
            right.append(distances.index(min(distances)) == way)
    return sum(right) / len(right)


@pytest.mark.parametrize("block", [1, 3, 32])
def test_an_episode_is_right_where_the_nearest_mean_is_its_class(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(few_shot, "_BLOCK", block)
    random = torch.Generator().manual_seed(0)
    label_N = torch.arange(120) % 6
    feature_NE = torch.randn(120, 4, generator=random) + torch.eye(6, 4)[label_N]
    members = [(label_N == label).nonzero().squeeze(1) for label in range(6)]
    image_PWK = draw_episodes(members, ways=4, images=9, episodes=7, seed=1)
    found = episode_accuracies(feature_NE, image_PWK, shots=2)
    expected = [accuracy_by_loops(feature_NE, image_WK, 2) for image_WK in image_PWK]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert 0.3 < found.mean() < 0.9


def test_ties_and_broken_features_are_not_right() -> None:
    image_PWK = torch.arange(12).view(1, 3, 4)
    assert episode_accuracies(torch.ones(12, 2), image_PWK, shots=2).tolist() == [0.0]
    assert episode_accuracies(torch.full((12, 2), torch.nan), image_PWK, shots=2).tolist() == [0.0]


def test_episodes_draw_without_replacement_and_by_seed() -> None:
    label_N = torch.arange(200) % 8
    members = [(label_N == label).nonzero().squeeze(1) for label in range(8)]
    drawn = draw_episodes(members, ways=5, images=20, episodes=50, seed=0)
    assert drawn.shape == (50, 5, 20)
    for image_WK in drawn:
        assert len(image_WK.flatten().unique()) == 100
        assert len(label_N[image_WK].unique(dim=1).flatten().unique()) == 5
    assert torch.equal(drawn, draw_episodes(members, ways=5, images=20, episodes=50, seed=0))
    assert not torch.equal(drawn, draw_episodes(members, ways=5, images=20, episodes=50, seed=1))
    # all classes and all images take part
    assert len(drawn.unique()) == 200


def test_the_figure_is_the_mean_over_episodes(tiny_config_path: str, tmp_path: Path, cache: ShardCache) -> None:
    encoder = tiny_encoder(tiny_config_path)
    data = open_labelled("digits", str(write_tars(tmp_path, IMAGES, LABELS)), cache)
    [figure] = evaluate_few_shot(encoder, data, episodes=60)
    feature_NE = encode_features(encoder, data, "embedding", None).whole()
    members = [(torch.tensor(LABELS) == label).nonzero().squeeze(1) for label in range(10)]
    accuracy_P = episode_accuracies(feature_NE, draw_episodes(members, 5, 20, 60, seed=0), shots=5)
    half = 1.96 * accuracy_P.std().item() / 60**0.5
    assert figure == ("digits", "5-way 5-shot", accuracy_P.mean().item(), 0.2, 0.2, figure.low, figure.high)
    assert (figure.low, figure.high) == pytest.approx((figure.value - half, figure.value + half))
    assert 0.25 < figure.value < 0.9
    [other] = evaluate_few_shot(encoder, data, ways=3, shots=1, queries=4, episodes=60, seed=3)
    assert other.metric == "3-way 1-shot"
    assert other.chance == 1 / 3
    # one episode has no deviation
    [single] = evaluate_few_shot(encoder, data, episodes=1)
    assert single.low == single.value == single.high


def test_classes_with_few_images_take_no_part(
    tiny_config_path: str, tmp_path: Path, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = tiny_encoder(tiny_config_path)
    kept = [i for i, label in enumerate(LABELS) if label > 2 or LABELS[:i].count(label) < 19]
    folder = write_folder(tmp_path, [IMAGES[i] for i in kept], [LABELS[i] for i in kept])
    data = open_labelled("digits", str(folder), cache)
    with caplog.at_level(logging.WARNING):
        evaluate_few_shot(encoder, data, episodes=20)
    assert "3 of 10 classes are left out: fewer than 20 images" in caplog.text
    [figure] = evaluate_few_shot(encoder, data, queries=14, episodes=20)
    assert figure.value > 0
    assert caplog.text.count("left out") == 1
    with pytest.raises(RunError, match=r"7 of 10 classes have the 5 \+ 15 images that an episode needs of each of 8"):
        evaluate_few_shot(encoder, data, ways=8)
