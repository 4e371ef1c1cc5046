"""Image towers of timm: a tiny EVA02 in every place where transformers' own towers are used."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from scaleclip.config import ImageTowerConfig, ModelConfig
from scaleclip.errors import ConfigError
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.models.towers import build_image_tower

SIZES = {"depth": 3, "embed_dim": 48, "num_heads": 2, "patch_size": 8}
EVA = {"architecture": "eva02_base_patch16_clip_224", "model_args": SIZES}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 100,
        "bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 0}  # fmt: skip


def image(config: dict[str, Any] | None = None, **values: Any) -> ImageTowerConfig:
    return ImageTowerConfig.model_validate({"type": "timm_wrapper", "size": 32, "config": config or EVA, **values})


def model(checkpointing: bool = False, **values: Any) -> DualEncoder:
    text = {"context_length": 10, "config": TEXT}
    sections = {"image": image(**values), "text": text, "activation_checkpointing": checkpointing}
    return DualEncoder(ModelConfig.model_validate({"embed_dim": 16, **sections}))


def with_arguments(**arguments: Any) -> dict[str, Any]:
    return EVA | {"model_args": SIZES | arguments}


@pytest.mark.parametrize("size", [32, 48])
def test_the_tower_is_timms(size: int) -> None:
    """In weights as timm draws them, in size and in features."""
    torch.manual_seed(0)
    theirs = timm.create_model(EVA["architecture"], num_classes=0, img_size=size, **SIZES).eval()
    torch.manual_seed(0)
    tower = build_image_tower(image(size=size), checkpointing=False).eval()
    # it was made twice, so the generator stands elsewhere: depth shrinks these matrices and the wrapper's own draw would not
    for number, (our, their) in enumerate(zip(tower.body.timm_model.blocks, theirs.blocks, strict=True), 1):
        for ours, others in ((our.attn.proj, their.attn.proj), (our.mlp.fc2, their.mlp.fc2)):
            assert ours.weight.std().item() == pytest.approx(0.02 / (2 * number) ** 0.5, rel=0.08)
            assert ours.weight.std().item() == pytest.approx(others.weight.std().item(), rel=0.08)
    theirs.load_state_dict(tower.body.timm_model.state_dict())
    pixels = torch.randn(2, 3, size, size)
    torch.testing.assert_close(tower(pixels).pooled_BD, theirs(pixels), rtol=0, atol=1e-6)
    assert tower.width == 48
    assert tower.body.timm_model.pos_embed.shape == (1, 1 + (size // 8) ** 2, 48)


def test_the_meta_device_has_shapes_alone() -> None:
    shapes = {name: p.shape for name, p in model().named_parameters()}
    with torch.device("meta"):
        built = model()
    assert {name: p.shape for name, p in built.named_parameters()} == shapes
    assert all(p.is_meta for p in built.parameters())


def test_a_sample_does_not_depend_on_its_batch_and_all_weights_learn() -> None:
    torch.manual_seed(0)
    built = model()
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    features = built.encode_image(pixels)
    torch.testing.assert_close(built.encode_image(pixels[1:3]), features[1:3], rtol=0, atol=1e-6)
    features[:, 0].sum().backward()
    assert all(p.grad is not None for p in built.image.parameters())


def test_activation_checkpointing_recomputes_the_same_gradients() -> None:
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    gradients, num_calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        built = model(checkpointing)
        calls: list[int] = []
        for block in built.image.body.timm_model.blocks:
            block.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        built.encode_image(pixels)[:, 0].sum().backward()
        gradients.append({name: p.grad for name, p in built.image.named_parameters()})
        num_calls.append(len(calls))
    assert num_calls == [3, 6]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-6)


def test_depth_and_locking() -> None:
    built = model(locked=True, unlocked_groups=2)
    learning = {name for name, p in built.image.named_parameters() if p.requires_grad}
    starts = ("body.timm_model.blocks.2.", "body.timm_model.norm.")
    assert learning == {name for name, _ in built.image.named_parameters() if name.startswith(starts)}
    assert len(learning) > 10
    places = built.parameter_places()
    groups = {name: places[f"image.body.timm_model.{name}"].group for name in ("pos_embed", "cls_token", "norm.weight")}
    assert groups == {"pos_embed": 0, "cls_token": 0, "norm.weight": 4}
    assert places["image.body.timm_model.blocks.1.attn.q_proj.weight"].group == 2


@pytest.mark.parametrize("pool", ["avg", "map"])
def test_timm_pools(pool: str) -> None:
    tower = build_image_tower(image(with_arguments(global_pool=pool)), checkpointing=False)
    assert tower(torch.randn(2, 3, 32, 32)).pooled_BD.shape == (2, 48)


def test_an_architecture_for_any_size() -> None:
    convnext = {"architecture": "convnext_atto", "model_args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}}
    tower = build_image_tower(image(convnext, size=64), checkpointing=False)
    assert tower(torch.randn(2, 3, 64, 64)).pooled_BD.shape == (2, tower.width) == (2, 16)


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 16], "kernel_sizes": 1, "output_stride": 8}),
    ],
)
def test_tokens_are_places_of_a_feature_map(architecture: str, arguments: dict[str, Any]) -> None:
    """Whether timm keeps channels first or last."""
    tower = build_image_tower(
        image({"architecture": architecture, "model_args": arguments}, size=64), checkpointing=False
    ).eval()
    pixels = torch.randn(1, 3, 64, 64)
    states = tower(pixels).states_BND
    assert states.shape == (1, 64, tower.state_width) == (1, 64, 16)
    pixels[:, :, 60:, 60:] += 1  # the last place, in the last window
    changed = (tower(pixels).states_BND - states).abs().amax((0, 2)) > 1e-6
    assert changed[63]
    assert not changed[0]


def test_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(1)
    stored = build_image_tower(image(), checkpointing=False)
    stored.body.save_pretrained(tmp_path)
    tower = build_image_tower(image(pretrained=str(tmp_path)), checkpointing=False)
    torch.testing.assert_close(tower.state_dict(), stored.state_dict(), rtol=0, atol=0)
    with pytest.raises(ConfigError, match=r"timm_model\.pos_embed.*: set model\.image\.size=32$"):
        build_image_tower(image(pretrained=str(tmp_path), size=48), checkpointing=False)
    with pytest.raises(ConfigError, match=r'set model\.image\.config\.model_args=.*"depth":3'):
        build_image_tower(image(with_arguments(depth=2), pretrained=str(tmp_path)), checkpointing=False)


def test_pixels_must_be_normalised_as_timms_folder_says(tmp_path: Path) -> None:
    stored = build_image_tower(image(), checkpointing=False).body
    stored.config.pretrained_cfg = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    stored.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"set model\.image\.mean=\[0\.5,0\.5,0\.5\] model\.image\.std=\[0\.5,0\.5,0\.5\]"):
        build_image_tower(image(pretrained=str(tmp_path)), checkpointing=False)


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no architecture": ({"config": {"model_args": SIZES}}, "architecture=None"),
    "unknown": ({"config": {"architecture": "eva02_base_patch16_clip_225"}}, "did you mean 'eva02_base_patch16_clip_224'"),
    "not fetched": ({"config": {"architecture": "hf-hub:timm/eva02"}}, "'hf-hub:timm/eva02' is none of timm's"),
    "unknown value": ({"config": EVA | {"model_arg": {}}}, "did you mean 'model_args'"),
    "unknown argument": ({"config": with_arguments(dept=3)}, "does not make a timm_wrapper tower: .*'dept'"),
    "no mapping": ({"config": EVA | {"model_args": [3]}}, r"model_args=\[3\] is no mapping"),
    "stages": (
        {"config": {"architecture": "convnext_atto", "model_args": {"dims": [8]}}},
        "does not make a timm_wrapper tower",
    ),
    "heads": ({"config": with_arguments(num_heads=5)}, "does not make a timm_wrapper tower"),
    "pooling": ({"pooling": "mean"}, r"pooling=mean.*use pooler.*model_args\.global_pool"),
    "no pooling": ({"config": with_arguments(global_pool="")}, "states as they are"),
    "no pooling either": ({"config": EVA | {"do_pooling": False}}, "states as they are"),
    "size": ({"config": with_arguments(img_size=64)}, "does not run on 32 x 32 pixels"),
    "patch dropout": ({"patch_dropout": 0.5}, "patch_dropout=0.5.*timm_wrapper"),
    "fixed positions": ({"positions": "sincos"}, "positions=sincos: a timm_wrapper"),
    "batch norm": ({"config": {"architecture": "resnet10t"}}, r"batch norm.*model\.image\.locked=true"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_user(name: str) -> None:
    values, message = FAULTS[name]
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        build_image_tower(image(**values), checkpointing=False)
