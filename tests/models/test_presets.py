"""Presets of the papers' sizes; test_open_clip_parity.py has those with open_clip's names."""

from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from open_clip.model import CLIP

from scaleclip.config import ModelConfig
from scaleclip.config_io import load_config
from scaleclip.exchange.transformers_folder import fitting_kind
from scaleclip.models.dual_encoder import DualEncoder


def load(folder: Path, name: str, *overrides: str) -> ModelConfig:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({"model": name}))
    return load_config(file, overrides).model


def build(config: ModelConfig) -> DualEncoder:
    with torch.device("meta"):
        return DualEncoder(config)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "their_image", "their_text"),
    [
        ("Recap-S/16", "ViT-S-16", "ViT-S-16"),
        ("Recap-B/16", "ViT-B-16", "ViT-B-16"),
        ("Recap-L/16", "ViT-L-14-CLIPA", "ViT-L-14-CLIPA"),
        ("Recap-H/14", "ViT-H-14-CLIPA", "ViT-H-14-CLIPA"),
        ("Recap-S/16-text-B", "ViT-S-16", "ViT-B-16"),
        ("Recap-B/16-text-L", "ViT-B-16", "ViT-L-14-CLIPA"),
        ("Recap-L/16-text-H", "ViT-L-14-CLIPA", "ViT-H-14-CLIPA"),
    ],
)
def test_recap_clip_has_clipas_towers(name: str, their_image: str, their_text: str, tmp_path: Path) -> None:
    """Recap-CLIP trains CLIPA's models; open_clip has two of their sizes, and CLIP's of the others."""
    config = load(tmp_path, name, "model.text.context_length=128")
    ours = build(config)
    image = open_clip.get_model_config(their_image)["vision_cfg"]
    clipa = open_clip.get_model_config("ViT-L-14-CLIPA")["vision_cfg"]
    image |= {key: value for key, value in clipa.items() if key not in image}
    text = open_clip.get_model_config(their_text)["text_cfg"] | {"vocab_size": 49408, "context_length": 128}
    with torch.device("meta"):
        theirs = CLIP(config.embed_dim, image | {"patch_size": 14 if "H" in name.split("/")[0] else 16}, text)
    width, text_width = ours.image.width, ours.text.width
    # CLIPA's class token, whose place our patches' bias takes, has a row of positions too; SigLIP's text tower ends in a matrix
    assert count(ours) == count(theirs) - width + text_width**2 + text_width
    assert (config.image.positions, config.image.pooling) == ("sincos", "mean")


@pytest.mark.parametrize(
    ("name", "their_name", "millions"),
    [
        ("SigLIP-B/16", "ViT-B-16-SigLIP", 203),
        ("SigLIP-L/16", "ViT-L-16-SigLIP-256", 652),
        ("SigLIP-SO400M/14", "ViT-SO400M-14-SigLIP", 877),
    ],
)
def test_siglips_have_the_published_sizes(name: str, their_name: str, millions: int, tmp_path: Path) -> None:
    theirs = open_clip.get_model_config(their_name)
    text = theirs["text_cfg"]
    length = f"model.text.context_length={text['context_length']}"
    config = load(tmp_path, name, f"model.text.config.vocab_size={text['vocab_size']}", length)
    model = build(config)
    assert fitting_kind(config, model) == "SiglipModel"
    # in training the text tower's head and the projection behind it are two matrices, which leave as one
    assert int((count(model) - count(model.text_projection)) / 1e6) == millions
    assert (theirs["embed_dim"], theirs["vision_cfg"]["timm_proj"]) == (config.embed_dim, "none")
    values = config.text.config
    for key, ours in (("width", "hidden_size"), ("layers", "num_hidden_layers"), ("heads", "num_attention_heads")):
        assert text[key] == values[ours]
    assert config.image.mean == config.image.std == (0.5, 0.5, 0.5)


def test_jina_clip_has_the_published_numbers_of_parameters(tmp_path: Path) -> None:
    """223 M of which 137 M are JinaBERT v2's, with its vocabulary; none of them know how long a text is."""
    config = load(tmp_path, "Jina-B/16", "model.text.context_length=512", "model.text.config.vocab_size=30528")
    model = build(config)
    assert round(count(model.text.body) / 1e6) == 137
    assert round((count(model.image.body) + count(model.text.body)) / 1e6) == 223
    theirs = open_clip.get_model_config("EVA02-B-16")
    assert theirs["vision_cfg"]["timm_model_name"] == config.image.config["architecture"]
    assert (config.embed_dim, config.text.pooling, model.image.width, model.text.width) == (768, "mean", 768, 768)
