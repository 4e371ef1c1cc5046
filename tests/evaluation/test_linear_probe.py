"""The linear probe: scikit-learn's optimum, CLIP's sweep, and what is refused."""

import builtins
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.nn.functional import cross_entropy, pad

from classified import digits, tiny_encoder, write_folder, write_tars
from scaleclip.data.cache import ShardCache
from scaleclip.errors import ConfigError, RunError
from scaleclip.evaluation import logistic
from scaleclip.evaluation.features import Features, encode_features, rows_of
from scaleclip.evaluation.labelled import open_labelled
from scaleclip.evaluation.linear_probe import STRENGTHS, evaluate_linear_probe, every_fifth, find_strength
from scaleclip.evaluation.logistic import Rows, fit
from storage_tracker import StorageTracker

CPU = torch.device("cpu")


def classes_of_points(num: int, seed: int) -> Features:
    """Points of four classes that overlap, in parts."""
    random = torch.Generator().manual_seed(seed)
    label_N = torch.randint(0, 4, (num,), generator=random)
    feature_ND = torch.randn(num, 6, generator=random) + 1.5 * torch.eye(4, 6)[label_N] + 3
    return Features(label_N, tuple(feature_ND[rows_of(part)] for part in range(-(-num // 1024))))


def every(features: Features) -> Rows:
    return Rows(features, torch.ones(len(features.label_N), dtype=torch.bool))


def by_scikit_learn(feature_ND: torch.Tensor, label_N: torch.Tensor, strength: float) -> Any:
    # seconds to import, and it makes `import transformers` slower
    from sklearn.linear_model import LogisticRegression

    found = LogisticRegression(C=1 / strength, max_iter=1000)
    return found.fit(feature_ND.double().numpy(), label_N.numpy())


@pytest.mark.parametrize("strength", [1e-6, 0.1, 10.0, 1e3])
def test_the_optimum_is_scikit_learns(strength: float) -> None:
    features = classes_of_points(1500, seed=0)
    found = fit([every(features)], 4, strength, CPU)
    expected = by_scikit_learn(features.whole(), features.label_N, strength)
    assert found.converged
    weights = np.concatenate([expected.coef_, expected.intercept_[:, None]], axis=1)
    # both stop at a gradient of 1e-4, by the same steps
    np.testing.assert_allclose(found.weight_CD.numpy(), weights, rtol=0, atol=1e-6)


def test_chosen_rows_of_several_sets_are_one_problem() -> None:
    first, second = classes_of_points(1500, seed=0), classes_of_points(90, seed=1)
    chosen_N = torch.arange(1500) % 3 > 0
    found = fit([Rows(first, chosen_N), every(second)], 4, 0.5, CPU)
    feature_ND = torch.cat([first.whole()[chosen_N], second.whole()])
    expected = by_scikit_learn(feature_ND, torch.cat([first.label_N[chosen_N], second.label_N]), 0.5)
    np.testing.assert_allclose(found.weight_CD[:, :-1].numpy(), expected.coef_, rtol=0, atol=1e-6)


def test_a_search_that_is_cut_short_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic, "MOST_ITERATIONS", 2)
    assert not fit([every(classes_of_points(200, seed=0))], 4, 1e-3, CPU).converged


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e5])
def test_the_gradient_is_autograds_whatever_the_features_size(scale: float) -> None:
    """The integers that add up must neither overflow nor be too coarse."""
    features = classes_of_points(1100, seed=0)
    # most images of one class, all features of one sign: the largest sum there can be
    label_N = torch.where(torch.arange(1100) % 50 == 0, features.label_N, 2)
    features = Features(label_N, tuple((part.abs() + 5) * scale for part in features.parts))
    weight_CD = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / scale
    value, gradient = logistic._Objective([every(features)], 4, 3.0, CPU)(weight_CD.numpy().ravel())
    weight_CD.requires_grad_()
    logits_NC = pad(features.whole().double(), (0, 1), value=1.0) @ weight_CD.T
    expected = (cross_entropy(logits_NC, label_N, reduction="sum") + 1.5 * weight_CD[:, :-1].square().sum()) / 1100
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(gradient.reshape(4, 7), weight_CD.grad.numpy(), rtol=1e-10, atol=1e-13 * max(scale, 1))


def test_memory_is_bounded_by_a_part(tmp_path: Path) -> None:
    """A part's features in fp32 and fp64, padded, and three arrays of 1024 x C; the weights and two like them."""
    num_classes, width, num_parts = 50, 40, 12
    random = torch.Generator().manual_seed(0)
    label_N = torch.randint(0, num_classes, (num_parts * 1024,), generator=random)
    files = []
    for part in range(num_parts):
        files.append(tmp_path / f"{part}.safetensors")
        files[-1].write_bytes(safetensors.torch.save({"features": torch.randn(1024, width, generator=random)}))
    rows = every(Features(label_N, tuple(files)))
    objective = logistic._Objective([rows], num_classes, 1.0, CPU)
    with StorageTracker() as tracker:
        objective(np.zeros(num_classes * (width + 1)))
    of_part = 1024 * (width * (4 + 4 + 8) + 8 * (width + 1) + 3 * 8 * num_classes)
    assert tracker.peak_bytes <= of_part + 4 * 8 * num_classes * (width + 1) + 2**15
    assert tracker.peak_bytes < len(label_N) * width * 4


def test_features_that_are_no_numbers_are_refused() -> None:
    features = classes_of_points(200, seed=0)
    features.parts[0][3, 2] = math.nan
    with pytest.raises(RunError, match="features are not finite: the model is broken"):
        fit([every(features)], 4, 1.0, CPU)


def test_the_grid_is_clips() -> None:
    assert len(STRENGTHS) == 97
    assert (STRENGTHS[0], STRENGTHS[-1]) == pytest.approx((1e-6, 1e6))
    assert np.diff(np.log10(STRENGTHS)) == pytest.approx(1 / 8)


@pytest.mark.parametrize("peak", [*range(0, 97, 5), 95, 96])
def test_the_sweep_finds_a_single_peak_in_few_fits(peak: int) -> None:
    tried: list[float] = []

    def score(strength: float) -> float:
        tried.append(strength)
        return -abs(math.log10(strength / STRENGTHS[peak]))

    assert find_strength(score) == STRENGTHS[peak]
    assert tried[:7] == [STRENGTHS[place] for place in range(0, 97, 16)]
    assert len(tried) == len(set(tried)) <= 7 + 4 * 2


def test_of_equal_scores_the_weakest_is_taken() -> None:
    assert find_strength(lambda strength: 0.0) == STRENGTHS[0]


def test_a_fifth_of_each_class_is_held_out() -> None:
    label_N = torch.tensor([0] * 11 + [1] * 4 + [2] * 1 + [0] * 4)
    held = every_fifth(label_N).nonzero().squeeze(1).tolist()
    # the fifth, tenth and fifteenth of class 0, the second of class 1, none of class 2
    assert held == [4, 9, 12, 19]


def data_sets(tmp_path: Path, cache: ShardCache) -> list[Any]:
    images, labels = digits(420)
    cuts = {"train": (0, 250), "val": (250, 320), "test": (320, 420)}
    paths = {name: write_tars(tmp_path / name, images[a:b], labels[a:b]) for name, (a, b) in cuts.items()}
    return [open_labelled(name, str(path), cache) for name, path in paths.items()]


@pytest.mark.parametrize("with_validation", [True, False])
def test_the_probe_is_scikit_learns_with_the_same_sweep(
    tiny_config_path: str, tmp_path: Path, cache: ShardCache, with_validation: bool
) -> None:
    from sklearn.metrics import balanced_accuracy_score

    encoder = tiny_encoder(tiny_config_path)
    train, val, test = data_sets(tmp_path, cache)
    options = {"features": tmp_path / "f", "kind": "embedding", "validation": val if with_validation else None}
    top, per_class = evaluate_linear_probe(encoder, train, test, mean_per_class=True, **options)

    train_f, val_f, test_f = (encode_features(encoder, data, "embedding", tmp_path / "f") for data in (train, val, test))
    (x, y), (x_val, y_val) = ((each.whole(), each.label_N) for each in (train_f, val_f))
    if not with_validation:
        held = every_fifth(y)
        (x, y), (x_val, y_val) = (x[~held], y[~held]), (x[held], y[held])
    strength = find_strength(
        lambda strength: balanced_accuracy_score(y_val, by_scikit_learn(x, y, strength).predict(x_val.double().numpy()))
    )
    last = by_scikit_learn(torch.cat([x, x_val]), torch.cat([y, y_val]), strength)
    predicted = last.predict(test_f.whole().double().numpy())
    assert top.value == np.mean(predicted == test_f.label_N.numpy())
    assert per_class.value == balanced_accuracy_score(test_f.label_N, predicted)
    assert 0.3 < top.value < 1
    assert (top.metric, per_class.metric) == ("linear probe", "linear probe mean per class")
    assert top.low < top.value < top.high


def test_splits_must_have_the_same_classes(tiny_config_path: str, tmp_path: Path, cache: ShardCache) -> None:
    """A class that a split lacks would move every label behind it."""
    images, labels = digits(100)
    without = [number for number, label in enumerate(labels) if label != 3]
    train = open_labelled("train", str(write_folder(tmp_path / "train", images, labels)), cache)
    test = write_folder(tmp_path / "test", [images[i] for i in without], [labels[i] for i in without])
    probe: Callable[..., Any] = evaluate_linear_probe
    with pytest.raises(ConfigError, match=r"data sets train and test name their classes differently, '3' is in one only"):
        probe(
            tiny_encoder(tiny_config_path), train, open_labelled("test", str(test), cache), mean_per_class=False, features=None
        )


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("scipy"):
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"needs scipy, .* pip install 'scaleclip\[eval\]'"):
        fit([every(classes_of_points(50, seed=0))], 4, 1.0, CPU)


def test_the_intercept_is_free() -> None:
    """However strong the penalty, shares of classes are those of the labels."""
    features = classes_of_points(300, seed=0)
    weight_CD = fit([every(features)], 4, 1e6, CPU).weight_CD
    shares = (pad(features.whole().double(), (0, 1), value=1.0) @ weight_CD.T).softmax(dim=1).mean(dim=0)
    torch.testing.assert_close(shares, torch.bincount(features.label_N).double() / 300, rtol=0, atol=1e-3)
