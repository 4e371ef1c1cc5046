"""What leaves computes what it did here: images and texts, by the card's own code, and back."""

from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
from transformers import BertTokenizerFast

from exchange_cases import (
    DEMO_TOKENS,
    SIZES,
    TEXTS,
    VIT,
    assert_close,
    exported,
    image_features,
    loaded_by_card,
    pictures,
    random_model,
    small_preset,
    text_features,
)
from scaleclip.config import ModelConfig
from scaleclip.config_tree import deep_update
from scaleclip.data.tokenizer import load_tokenizer
from scaleclip.errors import ConfigError
from scaleclip.exchange.export import Format
from scaleclip.exchange.open_clip_config import model_cfg
from scaleclip.exchange.open_clip_names import name_rules
from scaleclip.exchange.rules import to_theirs
from scaleclip.exchange.weights import in_memory
from scaleclip.trained_model import load_model

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "dog", "##s", "'", "s", "life", "hi", "!", "word"]
# with matrices so large that texts differ
BERT_VALUES = SIZES | {"vocab_size": len(WORDS), "max_position_embeddings": 12, "initializer_range": 0.2}
BERT = {"type": "bert", "context_length": 12, "config": BERT_VALUES}
SIGLIP_IMAGE = {"type": "siglip_vision_model", "size": 32, "config": VIT}
BARE = {"projection": False}
SIGLIP_TEXT = {"type": "siglip_text_model", "tokenizer": "demo", "context_length": 12, "config": SIZES | DEMO_TOKENS}
TIMM_VIT = {"type": "timm_wrapper", "size": 224, "config": {"architecture": "vit_tiny_patch16_224"}}
HF_VIT = {"type": "vit", "size": 32, "config": VIT}
CLIP_IMAGE = {"size": 32, "config": VIT | {"hidden_act": "gelu"}}
QUICK = {"config": {"hidden_act": "quick_gelu"}}


class Case(NamedTuple):
    """A model and the class that it becomes in each library; None: that library cannot hold it."""

    preset: str
    changes: dict[str, Any]
    transformers: str
    open_clip: bool


FAMILIES = ("tiny", "ViT-quickgelu", "Recap", "Jina", "ConvNeXt", "SigLIP", "SigLIP-and-BERT", "CLIP-and-BERT", "ViT-and-BERT")
CASES = {
    "tiny": Case("tiny", {}, "CLIPModel", True),
    "ViT": Case("ViT-B/16", {}, "CLIPModel", True),
    "ViT-clip-tokenizer": Case("ViT-B/16", {"text": {"tokenizer": "clip"}}, "CLIPModel", True),
    "ViT-quickgelu": Case("ViT-B/16", {"image": QUICK, "text": QUICK}, "CLIPModel", True),
    "ViT-tanh": Case("ViT-B/16", {"image": {"config": {"hidden_act": "gelu_pytorch_tanh"}}}, "CLIPModel", True),
    "ViT-eps": Case("ViT-B/16", {"image": {"config": {"layer_norm_eps": 0.1}}}, "CLIPModel", True),
    "ViT-sincos-bias": Case("ViT-B/16", {"image": {"positions": "sincos"}, "init_logit_bias": -10.0}, "CLIPModel", True),
    "ViT-mean-std": Case("ViT-B/16", {"image": {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.6, 0.7)}}, "CLIPModel", True),
    "ViT-wide-head": Case("ViT-H/14", {"image": {"config": {"num_attention_heads": 1}}}, "CLIPModel", True),
    "ViT-end-inside": Case("tiny", {"text": {"config": {"vocab_size": 5000}}}, "CLIPModel", True),
    "ViT-pretrained-table": Case("ViT-B/16", {"text": {"config": {"max_position_embeddings": 20}}}, "CLIPModel", True),
    "timm": Case("tiny", {"image": TIMM_VIT}, "two towers", True),
    "Recap": Case("Recap-B/16", {"text": {"tokenizer": "clip"}}, "two towers", False),
    "Jina": Case("Jina-B/16", {}, "two towers", False),
    "ConvNeXt": Case("ConvNeXt-demo", {}, "two towers", False),
    "CLIP-and-SigLIP-text": Case("tiny", {"image": CLIP_IMAGE, "text": SIGLIP_TEXT}, "two towers", True),
    "SigLIP": Case("SigLIP-B/16", {}, "SiglipModel", False),
    "SigLIP-mean": Case("SigLIP-B/16", {"image": {"pooling": "mean"}}, "two towers", False),
    "SigLIP-alone-and-BERT": Case(
        "tiny", {"image": SIGLIP_IMAGE | BARE, "text": BERT}, "VisionTextDualEncoderModel", False
    ),
    "ViT-alone": Case("ViT-B/16", {"image": BARE}, "CLIPModel", True),
    "timm-alone": Case("tiny", {"embed_dim": 192, "image": TIMM_VIT | BARE}, "two towers", True),
    "SigLIP-and-BERT": Case("tiny", {"image": SIGLIP_IMAGE, "text": BERT}, "VisionTextDualEncoderModel", False),
    "SigLIP-learned-projection": Case(
        "tiny", {"image": SIGLIP_IMAGE, "text": SIGLIP_TEXT}, "two towers", False
    ),
    "SigLIP-and-CLIP-text": Case("tiny", {"image": SIGLIP_IMAGE}, "two towers", False),
    "CLIP-and-BERT": Case("tiny", {"image": CLIP_IMAGE, "text": BERT}, "VisionTextDualEncoderModel", True),
    "CLIP-and-BERT-mean": Case("tiny", {"image": CLIP_IMAGE, "text": {**BERT, "pooling": "mean"}}, "two towers", True),
    "CLIP-and-BERT-cls": Case("tiny", {"image": CLIP_IMAGE, "text": {**BERT, "pooling": "cls"}}, "two towers", True),
    "ViT-and-BERT": Case("tiny", {"image": HF_VIT, "text": BERT}, "VisionTextDualEncoderModel", False),
    "ViT-cls": Case("tiny", {"image": {**HF_VIT, "pooling": "cls"}}, "two towers", False),
    "ConvNeXt-mean": Case("ConvNeXt-demo", {"image": {"pooling": "mean"}}, "two towers", False),
    "ViT-patches": Case("tiny", {"image": {**HF_VIT, "pooling": "mean"}}, "two towers", False),
}  # fmt: skip


def config_of(case: Case, tmp_path: Path) -> ModelConfig:
    config = small_preset(case.preset, case.changes.get("text", {}).get("tokenizer", "demo"))
    tree = config.model_dump()
    for tower in ("image", "text"):
        if "type" in case.changes.get(tower, {}) or case.changes.get(tower) is CLIP_IMAGE:
            tree[tower] = {}
    config = ModelConfig.model_validate(deep_update(tree, case.changes))
    if config.text.type != "bert":
        return config
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "words")
    return config.model_copy(update={"text": config.text.model_copy(update={"tokenizer": str(tmp_path / "words")})})


def check(config: ModelConfig, to: Format, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the card, and back."""
    model = random_model(config)
    folder = tmp_path / "out"
    assert exported(model, config, to, folder) == kind
    monkeypatch.chdir(folder)
    loaded = loaded_by_card(folder)
    images, tokenizer = pictures(config.image.size), load_tokenizer(config.text.tokenizer, config.text.context_length)
    texts = TEXTS
    if to == "open_clip" and config.text.tokenizer == "clip":  # its own tokenizer makes an end token of that token's name
        texts = [text for text in TEXTS if "<end_of_text>" not in text]
    if to == "open_clip" and config.text.type == "bert":  # it mends every text before a tokenizer of transformers reads it
        texts = [text for text in TEXTS if text.isascii() and "&" not in text]
    ours = image_features(model, images), text_features(model, tokenizer, texts)
    assert_close(ours[0], loaded.encode_images(images))
    assert_close(ours[1], loaded.encode_texts(texts))
    back = load_model(str(folder))
    assert_close(ours[0], image_features(back.model, images))
    assert_close(ours[1], text_features(back.model, back.tokenizer, texts))
    torch.testing.assert_close(back.model.logit_scale, model.logit_scale)
    if model.logit_bias is not None:
        torch.testing.assert_close(back.model.logit_bias, model.logit_bias)


def cases(held: bool | None = None) -> list[Any]:
    """Names, of those that open_clip holds or not; the families' are fast, but for timm's at its own size."""
    names = [name for name, case in CASES.items() if held in (None, case.open_clip)]
    return [pytest.param(name, marks=() if name in FAMILIES else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", cases())
def test_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(config_of(CASES[name], tmp_path), "transformers", CASES[name].transformers, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", cases(held=True))
def test_open_clip(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(config_of(CASES[name], tmp_path), "open_clip", "open_clip", tmp_path, monkeypatch)


def test_an_end_token_that_is_not_the_largest(tmp_path: Path) -> None:
    config = config_of(CASES["ViT-end-inside"], tmp_path)
    model = random_model(config)
    theirs = open_clip.model.CLIP(**model_cfg(config, model)).eval()
    rules = name_rules(config, model)
    weights = to_theirs(rules, in_memory(model.state_dict()))
    theirs.load_state_dict({name: weights.read(name) for name in weights.shapes})
    tokens = torch.randint(1, 5000, (4, config.text.context_length))
    tokens[:, 5] = 4095
    with torch.no_grad():
        assert_close(model.encode_text(tokens), theirs.encode_text(tokens, normalize=True))


@pytest.mark.parametrize("name", cases(held=False))
def test_what_open_clip_cannot_hold(name: str, tmp_path: Path) -> None:
    config = config_of(CASES[name], tmp_path)
    with pytest.raises(ConfigError, match=f"open_clip cannot hold .* --to transformers fits, as {CASES[name].transformers}$"):
        exported(random_model(config), config, "open_clip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "hindrance"),
    [
        ("Recap-B/16", r"model\.image\.type=siglip_vision_model: with pooling=mean it has no class token"),
        ("SigLIP-B/16", r"model\.image\.type=siglip_vision_model: with pooling=pooler it has no class token"),
        (
            "ConvNeXt-demo",
            r"model\.image\.type=convnext: it has no such tower; of ours it has clip_vision_model and timm_wrapper",
        ),
    ],
)
def test_the_setting_that_open_clip_cannot_hold_is_said(name: str, hindrance: str, tmp_path: Path) -> None:
    config = small_preset(name)
    with pytest.raises(
        ConfigError, match=rf"^--to open_clip: open_clip cannot hold this model: {hindrance}.*transformers fits"
    ):
        exported(random_model(config), config, "open_clip", tmp_path / "out")


def test_a_siglip_comes_back_as_transformers_alone_describes_it(tmp_path: Path) -> None:
    """Of one trained here: no projection, and what the text tower's two matrices make together."""
    config = small_preset("SigLIP-B/16")
    model = random_model(config)
    assert not list(model.image_projection.parameters())
    assert exported(model, config, "transformers", tmp_path / "out") == "SiglipModel"
    (tmp_path / "out" / "scaleclip.json").unlink()
    back, images = load_model(str(tmp_path / "out")), pictures(config.image.size)
    assert (back.model_config.image.projection, back.model_config.image.mean) == (False, config.image.mean)
    assert_close(image_features(model, images), image_features(back.model, images))
    tokenizer = load_tokenizer("demo", config.text.context_length)
    assert_close(text_features(model, tokenizer), text_features(back.model, back.tokenizer))
