import math
from typing import Any

import pytest
import torch
import transformers

from scaleclip.config import ModelConfig
from scaleclip.errors import ConfigError
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.models.patch_dropout import drop_patches
from scaleclip.models.towers import build_image_tower, build_text_tower, check_tokenizer

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 100}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CLIP_TEXT = BERT | {"bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 0}
# a local layer's tokens see 2 on each side
MODERN = CLIP_TEXT | {"num_hidden_layers": 3, "global_attn_every_n_layers": 2, "local_attention": 4}
DINO = {key: value for key, value in VIT.items() if key != "intermediate_size"}
CONVNEXT = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}


def model_config(image: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **values: Any) -> ModelConfig:
    image, text = image or {"config": VIT}, text or {"config": CLIP_TEXT}
    tree = {"embed_dim": 16, "image": {"size": 32, **image}, "text": {"context_length": 10, **text}, **values}
    return ModelConfig.model_validate(tree)


def batch(num: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (num, 3, 32, 32), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 98, (num, 10), generator=generator)
    tokens[:, 6], tokens[:, 7:] = 99, 0
    return pixels, tokens, torch.arange(num) * 1000


IMAGE_TOWERS = {
    "clip": {"config": VIT},
    "siglip": {"type": "siglip_vision_model", "config": VIT},
    "siglip mean": {"type": "siglip_vision_model", "config": VIT, "pooling": "mean"},
    "siglip fixed": {"type": "siglip_vision_model", "config": VIT, "pooling": "mean", "positions": "sincos"},
    "convnext": {"type": "convnext", "config": CONVNEXT},
    "convnext mean": {"type": "convnext", "config": CONVNEXT, "pooling": "mean"},
    "vit cls": {"type": "vit", "config": VIT, "pooling": "cls"},
    "dinov2 mean": {"type": "dinov2", "config": DINO, "pooling": "mean"},
}

TEXT_TOWERS = {
    "clip": {"config": CLIP_TEXT},
    "clip eos": {"config": CLIP_TEXT, "pooling": "eos"},
    "bert": {"type": "bert", "config": BERT | NO_DROPOUT},
    "bert mean": {"type": "bert", "config": BERT | NO_DROPOUT, "pooling": "mean"},
    "bert cls": {"type": "bert", "config": BERT | NO_DROPOUT, "pooling": "cls"},
    "modernbert mean": {"type": "modernbert", "config": MODERN, "pooling": "mean"},
    "roformer mean": {"type": "roformer", "config": BERT | NO_DROPOUT, "pooling": "mean"},
    "bert eos": {"type": "bert", "config": BERT | NO_DROPOUT | {"eos_token_id": 99}, "pooling": "eos"},
}


@pytest.mark.parametrize("name", IMAGE_TOWERS)
def test_image_towers(name: str) -> None:
    torch.manual_seed(0)
    model = DualEncoder(model_config(image=IMAGE_TOWERS[name]))
    assert model.training
    pixels, _, _ = batch()
    features = model.encode_image(pixels)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    # a sample's features do not depend on the rest of its batch
    torch.testing.assert_close(model.encode_image(pixels[1:3]), features[1:3], rtol=0, atol=1e-6)
    features[:, 0].sum().backward()
    assert all(p.grad is not None for p in model.image_projection.parameters())


def test_an_image_tower_without_a_projection() -> None:
    torch.manual_seed(0)
    model = DualEncoder(model_config({"config": VIT, "projection": False}, embed_dim=32))
    pixels, _, _ = batch()
    torch.testing.assert_close(model.encode_image(pixels), torch.nn.functional.normalize(model.pool_image(pixels), dim=-1))
    assert "image_projection.weight" not in dict(model.named_parameters())
    assert model.parameter_places().keys() == dict(model.named_parameters()).keys()
    with pytest.raises(ConfigError, match=r"vector of 32 values is not of model\.embed_dim=16: set model\.embed_dim=32, or"):
        DualEncoder(model_config({"config": VIT, "projection": False}))


@pytest.mark.parametrize("name", TEXT_TOWERS)
def test_text_towers_ignore_what_stands_behind_the_end_token(name: str) -> None:
    torch.manual_seed(0)
    model = DualEncoder(model_config(text=TEXT_TOWERS[name]))
    _, tokens, _ = batch()
    features = model.encode_text(tokens)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    changed = tokens.clone()
    changed[:, 5] = 7
    assert (model.encode_text(changed) - features).abs().max() > 1e-4
    torch.testing.assert_close(model.encode_text(tokens[:, :7]), features, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["modernbert", "roformer", "bert"])
def test_texts_of_512_tokens(kind: str) -> None:
    torch.manual_seed(0)
    config = (CLIP_TEXT if kind == "modernbert" else BERT | NO_DROPOUT) | {"pad_token_id": 0}
    text = {"type": kind, "config": config, "pooling": "mean", "context_length": 512}
    tower = build_text_tower(model_config(text=text).text, checkpointing=False)
    tokens = torch.randint(1, 98, (2, 512))
    tokens[1, 300:] = 0
    pooled = tower(tokens).pooled_BD
    changed = tokens.clone()
    changed[0, 511], changed[1, 299] = 98, 98
    assert (tower(changed).pooled_BD - pooled).abs().amax(1).min() > 1e-5
    torch.testing.assert_close(tower(tokens[1:, :300]).pooled_BD, pooled[1:], rtol=0, atol=1e-6)


def test_modernbert_runs_as_the_run_says() -> None:
    """Neither compiled by itself nor through flash_attn, on whatever machine."""
    values = build_text_tower(model_config(text=TEXT_TOWERS["modernbert mean"]).text, checkpointing=False).body.config
    assert (values.reference_compile, values._attn_implementation) == (False, "sdpa")


def test_siglips_text_tower_reads_its_last_token_and_is_not_causal() -> None:
    torch.manual_seed(0)
    tower = build_text_tower(model_config(text={"type": "siglip_text_model", "config": CLIP_TEXT}).text, checkpointing=False)
    _, tokens, _ = batch()
    states = transformers.SiglipTextModel.forward(tower.body, input_ids=tokens).last_hidden_state
    torch.testing.assert_close(tower(tokens).pooled_BD, tower.body.text_model.head(states[:, -1]))
    changed = tokens.clone()
    changed[:, -1] = 7
    assert (tower.body(input_ids=changed).last_hidden_state[:, 0] - states[:, 0]).abs().max() > 1e-4


def test_siglips_attention_pooler_is_built_where_it_is_used() -> None:
    names = [
        {name for name, _ in DualEncoder(model_config(image=IMAGE_TOWERS[image])).named_parameters() if ".head." in name}
        for image in ("siglip", "siglip mean")
    ]
    assert names[0]
    assert not names[1]


def test_pooling_is_what_it_says() -> None:
    torch.manual_seed(0)
    tower = build_text_tower(model_config(text=TEXT_TOWERS["bert mean"]).text, checkpointing=False)
    _, tokens, _ = batch()
    states = tower.body(input_ids=tokens, attention_mask=(tokens != 0).int()).last_hidden_state
    torch.testing.assert_close(tower(tokens).pooled_BD, states[:, :7].mean(1))
    tower.pooling = "cls"
    torch.testing.assert_close(tower(tokens).pooled_BD, states[:, 0])


def test_image_mean_leaves_the_class_token_out() -> None:
    torch.manual_seed(0)
    image = {"type": "vit", "config": VIT, "pooling": "mean"}
    tower = build_image_tower(model_config(image=image).image, checkpointing=False).eval()
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(tower(pixels).pooled_BD, tower.body(pixels).last_hidden_state[:, 1:].mean(1))


def test_eos_pooling_takes_the_first_end_token() -> None:
    torch.manual_seed(0)
    pooler = build_text_tower(model_config().text, checkpointing=False)
    _, tokens, _ = batch()
    tokens[:, 7:] = 99
    expected = pooler.body(input_ids=tokens).last_hidden_state[:, 6]
    torch.testing.assert_close(pooler(tokens).pooled_BD, expected)
    pooler.pooling = "eos"
    torch.testing.assert_close(pooler(tokens).pooled_BD, expected)


def test_views_pass_the_text_tower_together_and_come_apart_again() -> None:
    torch.manual_seed(0)
    model = DualEncoder(model_config(init_logit_scale=10.0, init_logit_bias=-3.0))
    pixels, tokens, _ = batch()
    calls = []
    model.text.register_forward_hook(lambda *_: calls.append(1))
    features = model(pixels, (tokens, tokens.flip(0)))
    assert len(calls) == 1
    torch.testing.assert_close(features.texts_BE[0], model.encode_text(tokens))
    torch.testing.assert_close(features.texts_BE[1], features.texts_BE[0].flip(0))
    assert features.logit_scale.shape == features.logit_bias.shape == ()
    assert model.logit_scale.shape == model.logit_bias.shape == (1,)
    assert features.logit_scale.item() == pytest.approx(10)
    assert features.logit_bias.item() == -3
    assert model.log_max_logit_scale == math.log(100)


def test_bf16_towers_give_fp32_features_from_exactly_normalised_pixels() -> None:
    torch.manual_seed(0)
    model = DualEncoder(model_config()).bfloat16()
    pixels, tokens, _ = batch()
    seen = []
    model.image.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    features = model(pixels, (tokens,))
    assert all(f.dtype == torch.float32 for f in (features.image_BE, *features.texts_BE, features.logit_scale))
    mean, std = torch.tensor(model_config().image.mean), torch.tensor(model_config().image.std)
    expected = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(seen[0], expected.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("image", ["clip", "siglip"])
def test_patch_dropout_depends_on_the_sample_alone(image: str) -> None:
    torch.manual_seed(0)
    model = DualEncoder(model_config(image={**IMAGE_TOWERS[image], "patch_dropout": 0.5}))
    pixels, _, seeds = batch()
    features = model.encode_image(pixels, seeds)
    torch.testing.assert_close(model.encode_image(pixels[2:], seeds[2:]), features[2:], rtol=0, atol=1e-6)
    assert (model.encode_image(pixels, seeds + 1) - features).abs().amax(1).min() > 1e-4
    model.eval()
    plain = DualEncoder(model_config(image=IMAGE_TOWERS[image])).eval()
    plain.load_state_dict(model.state_dict())  # dropping patches changes no parameter's name
    torch.testing.assert_close(model.encode_image(pixels), plain.encode_image(pixels), rtol=0, atol=0)


def test_drop_patches_keeps_prefix_and_a_uniform_share() -> None:
    tokens = torch.arange(21.0).expand(4000, 21).unsqueeze(-1)
    kept = drop_patches(tokens, torch.arange(4000), share=0.7, num_prefix=1).squeeze(-1)
    assert kept.shape == (4000, 1 + 6)
    assert (kept[:, 0] == 0).all()
    assert all(len(set(row.tolist())) == 7 for row in kept[:100])
    frequency = kept[:, 1:].long().flatten().bincount(minlength=21)[1:] / 4000
    assert (frequency - 0.3).abs().max() < 4.5 * (0.3 * 0.7 / 4000) ** 0.5
    # consecutive seeds draw independently: 6 * 6 / 20 patches in common on average
    common = (kept[:-1, 1:, None] == kept[1:, None, 1:]).sum((1, 2)).float().mean()
    assert abs(common - 1.8) < 0.1


def test_the_drawn_patches_stay_the_same_between_versions() -> None:
    patches = torch.arange(16.0).expand(3, 16).unsqueeze(-1)
    kept = drop_patches(patches, torch.tensor([0, 1, -(2**62)]), share=0.75, num_prefix=0).squeeze(-1)
    assert kept.int().tolist() == [[9, 5, 4, 6], [6, 3, 15, 9], [1, 12, 6, 14]]


@pytest.mark.parametrize(("image", "text"), [("clip", "clip"), ("siglip", "bert")])
def test_activation_checkpointing_recomputes_the_same_gradients(image: str, text: str) -> None:
    pixels, tokens, seeds = batch()
    gradients, num_calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        towers = {"image": {**IMAGE_TOWERS[image], "patch_dropout": 0.25}, "text": TEXT_TOWERS[text]}
        model = DualEncoder(model_config(**towers, activation_checkpointing=checkpointing))
        calls: list[int] = []
        for module in model.modules():
            if type(module).__name__.endswith("MLP") or type(module).__name__ == "BertIntermediate":
                module.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        features = model(pixels, (tokens,), seeds)
        (features.image_BE * features.texts_BE[0]).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        num_calls.append(len(calls))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-6)
    assert num_calls[1] >= num_calls[0] + 4  # both layers of both towers ran twice


def test_same_seed_same_weights() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(DualEncoder(model_config()).state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_sdpa_attention_is_used() -> None:
    model = DualEncoder(model_config(text=TEXT_TOWERS["bert"]))
    assert model.image.body.config._attn_implementation == model.text.body.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("image", IMAGE_TOWERS)
@pytest.mark.parametrize("text", TEXT_TOWERS)
def test_shapes_without_weights(image: str, text: str) -> None:
    """How ranks other than 0 make the model under ZeRO-3."""
    with torch.device("meta"):
        model = DualEncoder(model_config(image=IMAGE_TOWERS[image], text=TEXT_TOWERS[text]))
    assert all(parameter.is_meta for parameter in model.parameters())


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown type": ({"image": {"type": "convnet"}}, "model.image.type='convnet'.*did you mean 'convnext'"),
    "unknown value": ({"image": {"config": VIT | {"hidden_sise": 8}}}, "config.hidden_sise.*did you mean 'hidden_size'"),
    "unknown text value": ({"text": {"config": {"num_layer": 8}}}, "model.text.config.num_layer"),
    "heads": ({"image": {"config": VIT | {"num_attention_heads": 3}}}, "model.image.config does not make"),
    "batch norm": ({"image": {"type": "resnet"}}, "batch norm"),
    "no checkpointing": (
        {"image": IMAGE_TOWERS["convnext"], "activation_checkpointing": True},
        "activation_checkpointing.*convnext",
    ),
    "no patches": ({"image": {**IMAGE_TOWERS["convnext"], "patch_dropout": 0.5}}, "patch_dropout=0.5.*convnext"),
    "clip mean": ({"image": {"config": VIT, "pooling": "mean"}}, "pooling=mean"),
    "convnext cls": ({"image": {**IMAGE_TOWERS["convnext"], "pooling": "cls"}}, "pooling=cls"),
    "image size": (
        {"image": {"type": "siglip_vision_model", "config": VIT | {"image_size": 64}}},
        "does not run on 32 x 32 pixels",
    ),
    "legacy eos": ({"text": {"config": CLIP_TEXT | {"eos_token_id": 2}}}, "eos_token_id=2"),
    "eos unknown": ({"text": {**TEXT_TOWERS["bert"], "pooling": "eos"}}, "eos_token_id is unset"),
    "too few positions": ({"text": {"config": CLIP_TEXT | {"max_position_embeddings": 9}}}, "max_position_embeddings=9.*to 10"),
    "too few rotary positions": (
        {"text": {**TEXT_TOWERS["roformer mean"], "config": BERT | {"max_position_embeddings": 9}}},
        "max_position_embeddings=9.*to 10",
    ),
    "siglip padding": (
        {"text": {"type": "siglip_text_model", "config": CLIP_TEXT | {"pad_token_id": None}, "pooling": "mean"}},
        "pad_token_id is unset",
    ),
    "roberta positions": (
        {"text": {"type": "roberta", "config": BERT | {"pad_token_id": 1}}},
        "max_position_embeddings=10.*to 12",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_user(name: str) -> None:
    values, message = FAULTS[name]
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        DualEncoder(model_config(**values))


def test_check_tokenizer() -> None:
    text = model_config().text
    check_tokenizer(text, size=100, end_id=99, pad_id=0)
    check_tokenizer(text, size=100, end_id=99, pad_id=5)  # CLIP's tower does not look at padding
    with pytest.raises(ConfigError, match=r"vocab_size=100.*101 tokens"):
        check_tokenizer(text, size=101, end_id=99, pad_id=0)
    with pytest.raises(ConfigError, match=r"eos_token_id=99.*98"):
        check_tokenizer(text, size=100, end_id=98, pad_id=0)
    mean = model_config(text={"config": CLIP_TEXT, "pooling": "mean"}).text
    with pytest.raises(ConfigError, match=r"pad_token_id=0.*5"):
        check_tokenizer(mean, size=100, end_id=99, pad_id=5)
    bert = model_config(text=TEXT_TOWERS["bert"]).text
    check_tokenizer(bert, size=100, end_id=98, pad_id=0)
    with pytest.raises(ConfigError, match=r"pad_token_id=0.*5"):
        check_tokenizer(bert, size=100, end_id=98, pad_id=5)


def test_image_size_is_filled_in_unless_given() -> None:
    tower = build_image_tower(model_config().image, checkpointing=False)
    assert tower.body.config.image_size == 32
    assert tower.width == 32
