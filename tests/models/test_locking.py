"""Which group a parameter belongs to, in every kind of tower, and what a locked tower leaves to learn."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from scaleclip.config import ImageTowerConfig, ModelConfig
from scaleclip.errors import ConfigError
from scaleclip.models.depth import depth_groups
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.models.locking import lock

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
VIT = SIZES | {"patch_size": 8, "image_size": 32}
DINO = {key: value for key, value in VIT.items() if key != "intermediate_size"}
BERT = SIZES | {"vocab_size": 100, "max_position_embeddings": 12}
IDS = {"bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 0}
CONVNEXT = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
PVT = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_encoder_blocks": 2, "num_attention_heads": [1, 2],
       "sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2], "strides": [4, 2], "mlp_ratios": [2, 2]}  # fmt: skip

# Names begin like one of these; the groups stand in their order.
TOWERS: dict[str, tuple[dict[str, Any], list[list[str]]]] = {
    "clip_vision_model": (
        VIT,
        [
            ["vision_model.embeddings.", "vision_model.pre_layrnorm."],
            *([f"vision_model.encoder.layers.{i}."] for i in range(3)),
            ["vision_model.post_layernorm."],
        ],
    ),
    "siglip_vision_model": (
        VIT,
        [
            ["vision_model.embeddings."],
            *([f"vision_model.encoder.layers.{i}."] for i in range(3)),
            ["vision_model.post_layernorm.", "vision_model.head."],
        ],
    ),
    "convnext": (
        CONVNEXT,
        [
            ["embeddings."],
            ["encoder.stages.0."],
            ["encoder.stages.1."],
            ["encoder.stages.2.downsampling_layer.", "encoder.stages.2.layers.0."],
            ["encoder.stages.2.layers.1."],
            ["encoder.stages.3."],
            ["layernorm."],
        ],
    ),
    "swin": (
        {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2]},
        [
            ["embeddings."],
            ["encoder.layers.0.blocks.0."],
            ["encoder.layers.0.downsample.", "encoder.layers.1.blocks.0."],
            ["encoder.layers.1.blocks.1."],
            ["layernorm."],
        ],
    ),
    "pvt": (
        PVT,
        [
            ["encoder.patch_embeddings."],
            ["encoder.block.0.0."],
            ["encoder.block.1.0."],
            ["encoder.block.1.1."],
            ["encoder.layer_norm."],
        ],
    ),
    "dinov2": (DINO, [["embeddings."], *([f"encoder.layer.{i}."] for i in range(3)), ["layernorm."]]),
    "clip_text_model": (
        BERT,
        [
            ["text_model.embeddings."],
            *([f"text_model.encoder.layers.{i}."] for i in range(3)),
            ["text_model.final_layer_norm."],
        ],
    ),
    "bert": (BERT, [["embeddings."], *([f"encoder.layer.{i}."] for i in range(3)), ["pooler."]]),
    # its table of distances is registered behind the layers
    "mpnet": (
        BERT,
        [["embeddings.", "encoder.relative_attention_bias."], *([f"encoder.layer.{i}."] for i in range(3)), ["pooler."]],
    ),
    # each layer holds a list of equal networks
    "mobilebert": (BERT, [["embeddings."], *([f"encoder.layer.{i}."] for i in range(3)), ["pooler."]]),
}  # fmt: skip


def body(kind: str, values: dict[str, Any]) -> transformers.PreTrainedModel:
    with torch.device("meta"):
        return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **values))


@pytest.mark.parametrize("kind", TOWERS)
def test_depth_groups(kind: str) -> None:
    values, prefixes = TOWERS[kind]
    tower = body(kind, values)
    groups = depth_groups(tower)
    assert groups.num_groups == len(prefixes)
    assert groups.group_of.keys() == dict(tower.named_parameters()).keys()
    expected = {
        name: next(i for i, starts in enumerate(prefixes) if name.startswith(tuple(starts))) for name in groups.group_of
    }
    assert groups.group_of == expected
    assert set(expected.values()) == set(range(len(prefixes))), "every group has parameters"


def without_layers() -> transformers.PreTrainedModel:
    """A tower of two unlike parts."""
    tower = body("clip_vision_model", VIT)
    tower.vision_model.encoder.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.GELU()), nn.Linear(2, 2)])
    return tower


def test_a_tower_without_layers_is_one_group() -> None:
    groups = depth_groups(without_layers())
    assert groups.num_groups == 1
    assert set(groups.group_of.values()) == {0}


def model_config(image: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **values: Any) -> ModelConfig:
    image = {"size": 32, "config": VIT, **(image or {})}
    text = {"context_length": 12, "config": BERT | IDS, **(text or {})}
    return ModelConfig.model_validate({"embed_dim": 16, "image": image, "text": text, **values})


def test_every_parameter_has_a_place() -> None:
    model = DualEncoder(model_config({"type": "convnext", "config": CONVNEXT}, init_logit_bias=-10.0))
    places = model.parameter_places()
    assert list(places) == [name for name, _ in model.named_parameters()]
    for name, place in places.items():
        assert place.tower == {"i": "image", "t": "text", "l": None}[name[0]], name
        assert place.num_groups == {"image": 7, "text": 5, None: 1}[place.tower]
        assert 0 <= place.group < place.num_groups
    assert places["image_projection.weight"] == ("image", 6, 7)
    assert places["text_projection.weight"] == ("text", 4, 5)
    assert places["text_projection.weight"].groups_above == 0
    assert places["text.body.text_model.embeddings.token_embedding.weight"] == ("text", 0, 5)
    assert places["text.body.text_model.encoder.layers.1.mlp.fc1.bias"].groups_above == 2


def learning(model: DualEncoder, tower: str) -> set[int]:
    """Groups of a tower's body that learn; each does as a whole or not at all."""
    groups = depth_groups(getattr(model, tower).body)
    by_group: dict[int, set[bool]] = {}
    for name, parameter in getattr(model, tower).body.named_parameters():
        by_group.setdefault(groups.group_of[name], set()).add(parameter.requires_grad)
    assert all(len(flags) == 1 for flags in by_group.values())
    return {group for group, flags in by_group.items() if flags == {True}}


@pytest.mark.parametrize(("unlocked", "expected"), [(0, set()), (1, {4}), (2, {3, 4}), (5, {0, 1, 2, 3, 4})])
def test_a_locked_tower_learns_in_its_last_groups(unlocked: int, expected: set[int]) -> None:
    for tower, other in (("image", "text"), ("text", "image")):
        model = DualEncoder(model_config(**{tower: {"locked": True, "unlocked_groups": unlocked}}))
        assert learning(model, tower) == expected
        assert learning(model, other) == {0, 1, 2, 3, 4}
        rest = [p for name, p in model.named_parameters() if ".body." not in name]
        assert len(rest) == 3
        assert all(p.requires_grad for p in rest)
        assert all(module.training for module in model.modules())


def test_a_locked_towers_projection_and_the_rest_get_gradients() -> None:
    torch.manual_seed(0)
    locked = {"locked": True, "unlocked_groups": 2}
    model = DualEncoder(model_config(locked, activation_checkpointing=True))
    features = model(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), (torch.randint(1, 98, (4, 12)),))
    (features.logit_scale * (features.image_BE * features.texts_BE[0]).sum()).backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got == {name for name, p in model.named_parameters() if p.requires_grad}
    assert "image.body.vision_model.encoder.layers.2.mlp.fc1.weight" in got
    assert "image.body.vision_model.encoder.layers.1.mlp.fc1.weight" not in got


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "not locked": ({"unlocked_groups": 1}, r"model\.text\.unlocked_groups=1 .*set model\.text\.locked=true"),
    "too many": ({"locked": True, "unlocked_groups": 6}, r"model\.text\.unlocked_groups=6: the tower has 5 groups .* 3 layers"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_user(name: str) -> None:
    values, message = FAULTS[name]
    with pytest.raises(ConfigError, match=message):
        DualEncoder(model_config(text=values))


def test_groups_of_a_tower_without_layers_cannot_be_unlocked() -> None:
    tower = without_layers()
    lock("model.image", ImageTowerConfig(locked=True), tower)
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    with pytest.raises(
        ConfigError, match=r"model\.image\.unlocked_groups=1: no layers were found in a clip_vision_model tower"
    ):
        lock("model.image", ImageTowerConfig(locked=True, unlocked_groups=1), tower)


def test_a_locked_tower_keeps_the_drops_of_training() -> None:
    torch.manual_seed(0)
    model = DualEncoder(model_config(text={"type": "bert", "config": BERT | {"hidden_dropout_prob": 0.5}, "locked": True}))
    tokens = torch.randint(1, 98, (4, 12))
    assert not torch.equal(model.encode_text(tokens), model.encode_text(tokens))


def test_what_never_learns_does_not_in_an_unlocked_group_either() -> None:
    image = {"type": "siglip_vision_model", "pooling": "mean", "positions": "sincos", "locked": True, "unlocked_groups": 5}
    text = {"type": "roformer", "config": BERT, "pooling": "mean", "locked": True, "unlocked_groups": 5}
    model = DualEncoder(model_config(image, text))
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        "image.body.vision_model.embeddings.position_embedding.weight",
        "text.body.encoder.embed_positions.weight",
    ]


RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
LOCKED_RESNET = {"type": "resnet", "config": RESNET, "locked": True}


def resnet_folder(folder: Path) -> transformers.ResNetModel:
    """Saved there, with statistics that are not those of a fresh one; in evaluation mode."""
    torch.manual_seed(4)
    whole = transformers.ResNetModel(transformers.ResNetConfig(**RESNET))
    for name, statistic in whole.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            statistic.uniform_(0.5, 2)
    whole.save_pretrained(folder)
    return whole.eval()


def test_batch_norm_of_a_locked_tower_stands_still(tmp_path: Path) -> None:
    theirs = resnet_folder(tmp_path)
    model = DualEncoder(model_config(LOCKED_RESNET | {"pretrained": str(tmp_path)})).eval().train()
    assert model.training
    assert model.image.training
    assert not any(module.training for module in model.image.body.modules())
    before = {name: value.clone() for name, value in model.image.body.state_dict().items()}
    torch.testing.assert_close(before, theirs.state_dict(), rtol=0, atol=0)
    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    features = model.encode_image(pixels)
    features[:, 0].sum().backward()
    # whatever chunks a batch comes in, and however often
    torch.testing.assert_close(torch.cat([model.encode_image(chunk) for chunk in pixels.split([1, 5])]), features)
    torch.testing.assert_close(model.image.body.state_dict(), before, rtol=0, atol=0)
    normalised = torch.randn(2, 3, 32, 32)
    pooled = theirs(normalised).pooler_output.flatten(1)
    torch.testing.assert_close(model.image(normalised).pooled_BD, pooled, rtol=0, atol=1e-6)


def test_statistics_of_a_locked_tower_are_parameters_as_checkpoints_hold_them(tmp_path: Path) -> None:
    resnet_folder(tmp_path)
    stored = DualEncoder(model_config(LOCKED_RESNET | {"pretrained": str(tmp_path)}))
    names = [name for name, p in stored.named_parameters() if name.endswith((".running_mean", ".running_var"))]
    assert len(names) == 2 * sum(isinstance(module, nn.BatchNorm2d) for module in stored.modules()) > 0
    assert not any(p.requires_grad for p in stored.image.body.parameters())
    assert list(stored.parameter_places()) == [name for name, _ in stored.named_parameters()]
    # as a run goes on, without the folder
    resumed = DualEncoder(model_config(LOCKED_RESNET))
    with torch.no_grad():
        for ours, theirs in zip(resumed.parameters(), stored.parameters(), strict=True):
            ours.copy_(theirs)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(resumed.encode_image(pixels), stored.encode_image(pixels))
    with torch.device("meta"):
        shapes = DualEncoder(model_config(LOCKED_RESNET | {"pretrained": str(tmp_path)}))
    assert {name: p.shape for name, p in shapes.named_parameters()} == {n: p.shape for n, p in stored.named_parameters()}
    assert all(p.is_meta for p in shapes.parameters())


@pytest.mark.parametrize("values", [{"locked": False}, {"locked": True, "unlocked_groups": 1}])
def test_batch_norm_of_a_tower_that_learns(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"batch norm.*model\.image\.locked=true model\.image\.unlocked_groups=0"):
        DualEncoder(model_config(LOCKED_RESNET | values))
