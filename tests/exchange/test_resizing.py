"""Systems that bring images to their size otherwise are named where their models are opened."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import CLIPImageProcessor, SiglipImageProcessor

from scaleclip.exchange import resizing
from scaleclip.exchange.source import open_source

SAME = ({}, {"mean": [0.5] * 3}, {"resize_mode": "shortest", "interpolation": "bicubic"}, {"resize_mode": None})


@pytest.mark.parametrize("preprocess", SAME)
def test_open_clips_defaults_are_ours(preprocess: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    resizing.warn_of_open_clips(preprocess, "a file")
    assert not caplog.messages


def test_open_clips_other_ways_are_named(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        resizing.warn_of_open_clips({"resize_mode": "squash", "interpolation": "bilinear"}, "some/open_clip_config.json")
    (message,) = caplog.messages
    assert message.startswith(
        "some/open_clip_config.json brings images to their size by resize_mode=squash and interpolation=bilinear."
    )
    resizing.warn_of_open_clips({"resize_mode": "longest"}, "another")
    assert caplog.messages[1].startswith("another brings images to their size by resize_mode=longest. Here the shorter side")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, "a square without a crop."),
        ({"resample": 2}, "a square without a crop and resample=bilinear."),
        ({"resample": 9, "do_resize": False}, "resample=9."),
    ],
)
def test_a_siglip_of_transformers_squashes(
    changes: dict[str, Any], named: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = json.loads(SiglipImageProcessor().to_json_string()) | changes
    resizing.warn_of_transformers(values, str(tmp_path))
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path} brings images to their size by {named} Here the shorter side is resized")


def test_a_clip_of_transformers_is_opened_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = small | {"image_size": 32, "patch_size": 16}
    config = transformers.CLIPConfig(text_config=small, vision_config=vision, projection_dim=24)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    CLIPImageProcessor().save_pretrained(tmp_path)
    open_source(str(tmp_path))
    assert not caplog.messages
    CLIPImageProcessor(resample=2).save_pretrained(tmp_path)
    open_source(str(tmp_path))
    assert f"{tmp_path}'s preprocessor_config.json brings images to their size by resample=bilinear" in caplog.text
