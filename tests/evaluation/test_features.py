"""Cached features: what they are, what is made again, what makes them stale."""

import os
from pathlib import Path

import pytest
import torch

from classified import BATCH, digits, tiny_encoder, write_folder, write_tars
from scaleclip.data.cache import ShardCache
from scaleclip.errors import RunError
from scaleclip.evaluation import features
from scaleclip.evaluation.encoder import Encoder
from scaleclip.evaluation.features import encode_features
from scaleclip.evaluation.labelled import LabelledImages, open_labelled

IMAGES, LABELS = digits(230)


@pytest.fixture
def encoder(tiny_config_path: str, monkeypatch: pytest.MonkeyPatch) -> Encoder:
    monkeypatch.setattr(features, "_PART", 100)
    return tiny_encoder(tiny_config_path)


@pytest.fixture
def data(tmp_path: Path, cache: ShardCache) -> LabelledImages:
    return open_labelled("digits", str(write_tars(tmp_path / "data", IMAGES, LABELS)), cache)


@pytest.fixture
def read(data: LabelledImages, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the first image of each batch that was read."""
    numbers: list[int] = []
    images = data.images

    def watched(start: int, stop: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        numbers.append(start)
        return images(start, stop, size)

    monkeypatch.setattr(data, "images", watched)
    return numbers


@pytest.mark.parametrize("in_files", [True, False])
def test_features_are_the_encoders(encoder: Encoder, data: LabelledImages, tmp_path: Path, in_files: bool) -> None:
    folder = tmp_path / "features" if in_files else None
    embedding, pooled = (encode_features(encoder, data, kind, folder) for kind in ("embedding", "pooled"))
    pixels_BCHW, label_B = data.images(200, 230, encoder.size)
    with encoder.evaluating():
        torch.testing.assert_close(embedding.whole()[200:], encoder.images(pixels_BCHW), rtol=0, atol=1e-6)
        pooled_BD = encoder.model.image(encoder.model._prepare(pixels_BCHW)).pooled_BD
    feature_BD, labels = pooled.part(2)
    torch.testing.assert_close(feature_BD, pooled_BD, rtol=0, atol=1e-5)
    assert feature_BD.dtype == torch.float32
    assert not feature_BD.requires_grad
    assert labels.tolist() == label_B.tolist() == LABELS[200:]
    assert embedding.whole().shape == (230, 32)
    assert pooled.whole().shape == (230, 64)
    assert pooled.label_N.tolist() == LABELS
    torch.testing.assert_close(embedding.whole().norm(dim=1), torch.ones(230))


def test_parts_that_are_there_are_not_made_again(
    encoder: Encoder, data: LabelledImages, read: list[int], tmp_path: Path
) -> None:
    first = encode_features(encoder, data, "pooled", tmp_path / "f")
    assert read == [0, BATCH, 2 * BATCH, 100, 100 + BATCH, 100 + 2 * BATCH, 200]
    read.clear()
    # a job that was killed within its second part
    first.parts[1].unlink()
    again = encode_features(encoder, data, "pooled", tmp_path / "f")
    assert read == [100, 100 + BATCH, 100 + 2 * BATCH]
    assert torch.equal(again.whole(), first.whole())
    assert torch.equal(again.label_N, first.label_N)
    read.clear()
    encode_features(encoder, data, "embedding", tmp_path / "f")
    assert read


def test_other_weights_images_or_sizes_find_no_stale_features(
    encoder: Encoder, tiny_config_path: str, tmp_path: Path, cache: ShardCache
) -> None:
    path = write_folder(tmp_path / "data", IMAGES[:20], LABELS[:20])

    def folder_of(encoder: Encoder) -> str:
        return encode_features(encoder, open_labelled("x", str(path), cache), "pooled", tmp_path / "f").parts[0].parent.name

    seen = [folder_of(encoder)]
    assert folder_of(tiny_encoder(tiny_config_path)) == seen[0]
    seen.append(folder_of(tiny_encoder(tiny_config_path, seed=1)))
    for change in (
        lambda: encoder.model.image_projection.weight.data[0, 0].add_(1e-3),
        lambda: next(encoder.model.image.parameters()).data.view(-1)[0].add_(1e-3),
        lambda: setattr(encoder.model, "pixel_mean", (0.4, 0.4, 0.4)),
        lambda: setattr(encoder.model.image.body.config, "layer_norm_eps", 0.1),
        lambda: os.utime(path / "0" / "00000.png", (0, 0)),
        lambda: (path / "0" / "new.png").write_bytes(IMAGES[0]),
    ):
        change()
        seen.append(folder_of(encoder))
    assert len(set(seen)) == len(seen)
    # the text tower has no part in it
    encoder.model.text_projection.weight.data.add_(1.0)
    assert folder_of(encoder) == seen[-1]


def test_the_size_is_a_part_of_the_key(encoder: Encoder, data: LabelledImages, tmp_path: Path) -> None:
    smaller = Encoder(encoder.model, encoder.tokenizer, 16, BATCH)
    assert features._place(encoder, data, "pooled", tmp_path) != features._place(smaller, data, "pooled", tmp_path)


def test_a_damaged_part_is_named(encoder: Encoder, data: LabelledImages, tmp_path: Path) -> None:
    found = encode_features(encoder, data, "pooled", tmp_path / "f")
    found.parts[1].write_bytes(found.parts[1].read_bytes()[:1000])
    with pytest.raises(RunError, match=r"000001\.safetensors cannot be read .*: delete it"):
        encode_features(encoder, data, "pooled", tmp_path / "f")
    with pytest.raises(RunError, match=r"000001\.safetensors"):
        found.whole()
