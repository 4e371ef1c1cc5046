"""Towers that start from transformers folders: the weights to the bit, and every way in which a folder can disagree."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from scaleclip.config import ModelConfig
from scaleclip.errors import ConfigError
from scaleclip.models.dual_encoder import DualEncoder

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VIT = SIZES | {"patch_size": 8}
BERT = SIZES | {"vocab_size": 100}
IDS = {"bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 0}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel in half precision, with the position indices that old versions of transformers stored."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    text = BERT | {"max_position_embeddings": 10, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config=VIT | {"image_size": 32}, projection_dim=16)
    transformers.CLIPModel(config).half().save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    stored["vision_model.embeddings.position_ids"] = torch.arange(17).unsqueeze(0)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return folder


def siglip_folder(folder: Path) -> Path:
    torch.manual_seed(2)
    transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VIT, image_size=32)).save_pretrained(folder)
    return folder


def bert_folder(folder: Path, kind: str = "BertModel") -> Path:
    torch.manual_seed(3)
    getattr(transformers, kind)(transformers.BertConfig(**BERT, max_position_embeddings=10)).save_pretrained(folder)
    return folder


def model_config(image: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> ModelConfig:
    """Towers as the folders have them, with other values laid over."""
    image = {"size": 32, "config": VIT, **(image or {})}
    text = {"context_length": 10, "config": BERT | IDS, **(text or {})}
    return ModelConfig.model_validate({"embed_dim": 16, "image": image, "text": text})


def bert_text(folder: Path, **values: Any) -> dict[str, Any]:
    return {"type": "bert", "config": BERT, "pretrained": str(folder), **values}


def assert_weights(body: torch.nn.Module, stored: dict[str, torch.Tensor]) -> None:
    state = body.state_dict()
    assert state
    for name, value in state.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, stored[name].float()), name


def test_a_folder_of_two_towers_serves_both_in_fp32(clip_folder: Path) -> None:
    model = DualEncoder(model_config({"pretrained": str(clip_folder)}, {"pretrained": str(clip_folder)}))
    stored = load_file(clip_folder / "model.safetensors")
    assert_weights(model.image.body, stored)
    assert_weights(model.text.body, stored)
    assert all(module.training for module in model.modules())
    assert not torch.equal(model.image_projection.weight, stored["visual_projection.weight"].float())
    assert model.image.body.config._attn_implementation == "sdpa"


def test_one_tower_starts_from_a_folder_and_the_other_afresh(tmp_path: Path) -> None:
    folder = siglip_folder(tmp_path)
    model = DualEncoder(model_config({"type": "siglip_vision_model", "pretrained": str(folder)}))
    assert_weights(model.image.body, load_file(folder / "model.safetensors"))
    theirs = transformers.SiglipVisionModel.from_pretrained(folder)
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.image(pixels).pooled_BD, theirs(pixels).pooler_output, rtol=0, atol=1e-6)


def test_a_text_tower_from_bert_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bert_folder(tmp_path / "bert")
    monkeypatch.setenv("HOME", str(tmp_path))
    model = DualEncoder(model_config(text=bert_text(Path("~/bert"))))
    assert_weights(model.text.body, load_file(folder / "model.safetensors"))


def test_the_body_of_a_model_with_a_head(tmp_path: Path) -> None:
    """Its names have a prefix, its head is not the tower's, and the pooler that it lacks matters only where it is used."""
    folder = bert_folder(tmp_path, "BertForMaskedLM")
    model = DualEncoder(model_config(text=bert_text(folder, pooling="mean")))
    stored = load_file(folder / "model.safetensors")
    body = torch.nn.ModuleDict({"embeddings": model.text.body.embeddings, "encoder": model.text.body.encoder})
    assert_weights(body, {name.removeprefix("bert."): value for name, value in stored.items()})
    assert 0 < model.text.body.pooler.dense.weight.std() < 0.1
    with pytest.raises(ConfigError, match=r"model\.text\.pretrained=\S+ lacks pooler\.dense\.bias pooler\.dense\.weight"):
        DualEncoder(model_config(text=bert_text(folder)))


MLM: dict[str, tuple[str, dict[str, Any]]] = {
    "modernbert": ("ModernBert", BERT | IDS | {"max_position_embeddings": 8192, "classifier_pooling": "mean"}),
    "roformer": ("RoFormer", BERT | {"max_position_embeddings": 512}),
    "bert": ("Bert", BERT | {"max_position_embeddings": 512}),
}


@pytest.mark.parametrize("kind", MLM)
def test_encoders_that_learned_to_fill_gaps(tmp_path: Path, kind: str) -> None:
    """The whole of each is loaded, its head is not, and texts of 512 tokens give the states of transformers' own model."""
    name, values = MLM[kind]
    torch.manual_seed(5)
    values = values | {"decoder_bias": False} if kind == "modernbert" else values
    whole = getattr(transformers, f"{name}ForMaskedLM")(getattr(transformers, f"{name}Config")(**values))
    for parameter in whole.parameters():
        # no norm's weights are ones and no biases zeros, so that one left out would be seen
        parameter.data += 0.02 * torch.randn_like(parameter)
    whole.save_pretrained(tmp_path)
    config = {key: value for key, value in values.items() if key not in ("classifier_pooling", "decoder_bias")}
    config.pop("max_position_embeddings") if kind == "modernbert" else None
    text = {"type": kind, "config": config, "pretrained": str(tmp_path), "pooling": "mean", "context_length": 512}
    tower = DualEncoder(model_config(text=text)).text.eval()
    tokens = torch.randint(1, 98, (2, 512))
    tokens[1, 400:] = 0
    theirs = getattr(transformers, f"{name}Model").from_pretrained(tmp_path).eval()
    states = theirs(input_ids=tokens, attention_mask=(tokens != 0).long()).last_hidden_state
    expected = torch.stack([states[0].mean(0), states[1, :400].mean(0)])
    torch.testing.assert_close(tower(tokens).pooled_BD, expected, rtol=0, atol=1e-5)


def test_a_siglip_folder_serves_both_towers(tmp_path: Path) -> None:
    torch.manual_seed(6)
    text = BERT | {"max_position_embeddings": 10, "projection_size": 32}
    whole = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=VIT | {"image_size": 32}))
    whole.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    image = {"type": "siglip_vision_model", "pretrained": str(tmp_path)}
    model = DualEncoder(model_config(image, {"type": "siglip_text_model", "pretrained": str(tmp_path)}))
    assert_weights(model.image.body, stored)
    assert_weights(model.text.body, stored)
    tokens = torch.randint(1, 98, (2, 10))
    torch.testing.assert_close(model.text(tokens).pooled_BD, whole.get_text_features(tokens), rtol=0, atol=1e-6)
    # without the pooler, which the folder has
    assert_weights(DualEncoder(model_config(image | {"pooling": "mean"})).image.body, stored)


def test_values_that_only_training_uses_may_differ(tmp_path: Path) -> None:
    values = BERT | {"hidden_dropout_prob": 0.3, "initializer_range": 0.5, "eos_token_id": 99}
    DualEncoder(model_config(text=bert_text(bert_folder(tmp_path), config=values)))


DIFFERENCES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "heads": ({"config": VIT | {"num_attention_heads": 4}}, ["model.image.config.num_attention_heads=2"]),
    "activation": ({"config": VIT | {"hidden_act": "gelu"}}, ['model.image.config.hidden_act="quick_gelu"']),
    "epsilon": ({"config": VIT | {"layer_norm_eps": 1e-6}}, ["model.image.config.layer_norm_eps=1e-05"]),
    "layers and width": (
        {"config": VIT | {"num_hidden_layers": 3, "hidden_size": 48}},
        ["model.image.config.hidden_size=32", "model.image.config.num_hidden_layers=2"],
    ),
    "patches": ({"config": VIT | {"patch_size": 16}}, ["model.image.config.patch_size=8"]),
}


@pytest.mark.parametrize("name", DIFFERENCES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_folder_of_other_values(clip_folder: Path, name: str, device: str) -> None:
    """The message says what to set, on the ranks that build only shapes too."""
    values, settings = DIFFERENCES[name]
    with pytest.raises(ConfigError) as error, torch.device(device):
        DualEncoder(model_config({"pretrained": str(clip_folder), **values}))
    message = str(error.value)
    assert message.startswith(f"model.image.pretrained={clip_folder} belongs to other values: set ")
    assert message.split(": set ")[1].split() == settings


def test_tables_of_positions_of_another_size(clip_folder: Path) -> None:
    image, text = {"pretrained": str(clip_folder)}, {"pretrained": str(clip_folder), "context_length": 8}
    with pytest.raises(
        ConfigError, match=r"another shape vision_model\S+position_embedding\.weight: set model\.image\.size=32$"
    ):
        DualEncoder(model_config(image | {"size": 64}))
    with pytest.raises(ConfigError, match=r"set model\.image\.config\.image_size=32$"):
        DualEncoder(model_config(image | {"config": VIT | {"image_size": 64}}))
    with pytest.raises(ConfigError, match=r"position_embedding\.weight: set model\.text\.config\.max_position_embeddings=10$"):
        DualEncoder(model_config(text=text))
    DualEncoder(model_config(text=text | {"config": BERT | IDS | {"max_position_embeddings": 10}}))


def test_a_tower_without_a_table_takes_any_size(tmp_path: Path) -> None:
    values = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    torch.manual_seed(4)
    transformers.ConvNextModel(transformers.ConvNextConfig(**values, image_size=224)).save_pretrained(tmp_path)
    model = DualEncoder(model_config({"type": "convnext", "config": values, "pretrained": str(tmp_path)}))
    assert_weights(model.image.body, load_file(tmp_path / "model.safetensors"))


def test_pixels_must_be_normalised_as_the_folder_says(tmp_path: Path) -> None:
    folder = siglip_folder(tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}))
    image = {"type": "siglip_vision_model", "pretrained": str(folder)}
    with pytest.raises(ConfigError, match=r"set model\.image\.mean=\[0\.5,0\.5,0\.5\] model\.image\.std=\[0\.5,0\.5,0\.5\]"):
        DualEncoder(model_config(image))
    DualEncoder(model_config(image | {"mean": [0.5] * 3, "std": [0.5] * 3}))
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json is no JSON"):
        DualEncoder(model_config(image))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


LAYER = "encoder.layer.1.output.dense.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read: .*no file named model.safetensors"),
    "a cut file": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-10]),
        "cannot be read",
    ),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "holds no model of transformers"),
    "a broken configuration": (lambda folder: (folder / "config.json").write_text("{"), "holds no model of transformers"),
    "an unknown model": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "nonesuch"}'),
        "holds no model of transformers",
    ),
    "another model": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "clip"}'),
        "holds clip, clip_text_model, clip_vision_model, not model.text.type=bert",
    ),
    "a weight less": (lambda folder: rewrite(folder, lambda stored: stored.pop(LAYER)), f"lacks {LAYER}$"),
    "weights more": (
        lambda folder: rewrite(folder, lambda s: s.update({f"encoder.layer.{i}.x": torch.ones(1) for i in range(2, 7)})),
        r"the tower does not, encoder.layer.2.x encoder.layer.3.x encoder.layer.4.x and 2 more$",
    ),
    "a weight of another shape": (
        lambda folder: rewrite(folder, lambda stored: stored.update({LAYER: torch.ones(32, 32)})),
        f"has in another shape {LAYER}$",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folders(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(bert_folder(tmp_path))
    with pytest.raises(ConfigError, match=rf"(?s)^model\.text\.pretrained={tmp_path} .*{message}"):
        DualEncoder(model_config(text=bert_text(tmp_path)))


def test_a_name_is_not_fetched() -> None:
    with pytest.raises(ConfigError, match=r"openai/clip-vit-base-patch32 is no folder.*hf download"):
        DualEncoder(model_config({"pretrained": "openai/clip-vit-base-patch32"}))


def test_the_meta_device_reads_no_weights(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path)
    shapes = {name: p.shape for name, p in DualEncoder(model_config(text=bert_text(folder))).named_parameters()}
    (folder / "model.safetensors").write_bytes(b"")
    with torch.device("meta"):
        model = DualEncoder(model_config(text=bert_text(folder)))
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert all(p.is_meta for p in model.parameters())
