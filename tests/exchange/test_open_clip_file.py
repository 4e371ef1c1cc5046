"""open_clip_config.json: what cannot be is said with the file, the key and the value."""

import json
from pathlib import Path
from typing import Any

import pytest

from scaleclip.errors import ConfigError
from scaleclip.exchange.open_clip_config import model_config
from scaleclip.exchange.open_clip_file import read_open_clip_file

VISION = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 64}
TEXT = {"context_length": 12, "vocab_size": 100, "width": 64, "heads": 1, "layers": 2}
CFG: dict[str, Any] = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}


def without(key: str) -> dict[str, Any]:
    return {"model_cfg": {name: value for name, value in CFG.items() if name != key}}


def vision(**changes: Any) -> dict[str, Any]:
    return {"model_cfg": CFG | {"vision_cfg": VISION | changes}}


def text(**changes: Any) -> dict[str, Any]:
    return {"model_cfg": CFG | {"text_cfg": TEXT | changes}}


def timm(**changes: Any) -> dict[str, Any]:
    return {"model_cfg": CFG | {"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224"} | changes}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"cannot be read as JSON: .*; mend it, or take the file from where the weights come from"),
        ([], r"its content is no mapping"),
        ({}, r"has no model_cfg, which says"),
        ({"model_cfg": None}, r"has no model_cfg, which says"),
        ({"model_cfg": [1]}, r"model_cfg=\[1\] is no mapping"),
        (without("vision_cfg"), r"has no model_cfg\.vision_cfg, which open_clip has no default for"),
        (without("text_cfg"), r"has no model_cfg\.text_cfg, which open_clip has no default for"),
        (without("embed_dim"), r"has no model_cfg\.embed_dim, which open_clip has no default for"),
        ({"model_cfg": CFG | {"embed_dim": "24"}}, r"model_cfg\.embed_dim='24' is not a whole number from 1 on; mend it"),
        ({"model_cfg": CFG | {"embed_dim": True}}, r"model_cfg\.embed_dim=True is not a whole number from 1 on"),
        ({"model_cfg": CFG | {"vision_cfg": "ViT"}}, r"model_cfg\.vision_cfg='ViT' is not a mapping"),
        ({"model_cfg": CFG | {"quick_gelu": "no"}}, r"model_cfg\.quick_gelu='no' is not true or false"),
        (vision(width=6.5), r"model_cfg\.vision_cfg\.width=6\.5 is not a whole number from 1 on"),
        (vision(head_width=0), r"vision_cfg\.head_width=0 is not a whole number from 1 on"),
        (vision(layers=[1, 2]), r"vision_cfg\.layers=\[1, 2\] is not a whole number from 1 on, or four"),
        (vision(image_size="x"), r"vision_cfg\.image_size='x' is not a number of pixels, or two"),
        (vision(norm_kwargs={"eps": "x"}), r"vision_cfg\.norm_kwargs=.* is not a mapping, whose eps is a number"),
        (text(pool_type=["eos"]), r"text_cfg\.pool_type=\['eos'\] is not a name"),
        (text(mlp_ratio=-1), r"text_cfg\.mlp_ratio=-1 is not a number above 0"),
        (timm(timm_pool=1), r"vision_cfg\.timm_pool=1 is not a name"),
        ({"model_cfg": CFG, "preprocess_cfg": {"mean": 0.5}}, r"preprocess_cfg\.mean=0\.5 is not three numbers"),
        ({"model_cfg": CFG, "preprocess_cfg": {"std": [0.5, 0, 1]}}, r"preprocess_cfg\.std=.* is not three numbers above 0"),
    ],
)
def test_what_a_file_cannot_say(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "open_clip_config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError, match=rf"^{path}\b.*{message}"):
        read_open_clip_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (vision(head_width=48), r"vision_cfg\.width=64, no multiple of head_width=48: mend one"),
        (vision(image_size=4), r"vision_cfg\.image_size=4, below patch_size=8: mend one"),
        (vision(pool_type="new"), r"vision_cfg\.pool_type=new: no tower here computes that: models without it"),
        (text(pool_type="new"), r"pool_type=new, proj_bias=False: here are CLIP's .* and SigLIP's"),
        (text(heads=5), r"text_cfg\.width=64, no multiple of heads=5: mend one"),
        (
            {"model_cfg": CFG | {"text_cfg": {"hf_model_name": "x", "hf_pooler_type": "y"}}},
            r"hf_pooler_type=y .* of cls_pooler",
        ),
        (
            timm(timm_model_name="vit_tiny_patch16_225"),
            r"timm_model_name='vit_tiny_patch16_225' is none of timm's: did you mean",
        ),
        (timm(timm_pool="new"), r"timm_pool=new and timm_proj=linear: here vit_tiny_patch16_224 pools as timm"),
    ],
)
def test_what_no_tower_here_computes(content: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^FILE has .*{message}"):
        model_config(content["model_cfg"], {}, "FILE")


def test_a_tower_of_transformers_that_is_not_here(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    cfg = CFG | {"text_cfg": {"hf_model_name": str(tmp_path), "hf_proj_type": "linear"}}
    with pytest.raises(
        ConfigError, match=r"^FILE names text_cfg\.hf_model_name=\S+, a t5: .* bert, roberta, xlm-roberta are here"
    ):
        model_config(cfg, {}, "FILE")
