"""Tables of positions at other sizes, and fixed ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from open_clip.pos_embed import get_2d_sincos_pos_embed
from torch import Tensor

from scaleclip.config import ModelConfig
from scaleclip.errors import ConfigError
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.models.positions import resize_positions, sincos_table

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VIT = SIZES | {"patch_size": 8}
DINO = {key: value for key, value in VIT.items() if key != "intermediate_size"}
IDS = {"vocab_size": 100, "bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 0}
EVA = {"architecture": "eva02_base_patch16_clip_224",
       "model_args": {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 8}}  # fmt: skip
IMAGE, TEXT = "image.body.vision_model.embeddings.position_embedding.weight", "text.body.embeddings.position_embeddings.weight"

IMAGE_TOWERS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {"config": VIT},
    "siglip_vision_model": {"config": VIT},
    "clip fixed": {"type": "clip_vision_model", "config": VIT, "positions": "sincos"},
    "siglip fixed": {"type": "siglip_vision_model", "config": VIT, "positions": "sincos", "pooling": "mean"},
    "vit": {"config": VIT, "pooling": "cls"},
    "dinov2": {"config": DINO, "pooling": "cls"},
    "timm_wrapper": {"config": EVA},
}
TEXT_TOWERS: dict[str, dict[str, Any]] = {
    "clip_text_model": {"config": SIZES | IDS},
    "siglip_text_model": {"config": SIZES | IDS},
    "bert": {"config": SIZES | IDS},
    "modernbert": {"config": SIZES | IDS, "pooling": "mean"},
    "roformer": {"config": SIZES | IDS, "pooling": "mean"},
}


def build(image: str, text: str, size: int = 32, context_length: int = 10) -> DualEncoder:
    sections = {
        "image": {"type": image, "size": size, **IMAGE_TOWERS[image]},
        "text": {"type": text, "context_length": context_length, **TEXT_TOWERS[text]},
    }
    return DualEncoder(ModelConfig.model_validate({"embed_dim": 8, **sections}))


TOWERS = [
    *((image, "clip_text_model") for image in IMAGE_TOWERS),
    *(("clip_vision_model", text) for text in TEXT_TOWERS if text != "clip_text_model"),
]


@pytest.mark.parametrize(("size", "context_length"), [(48, 20), (24, 6)])
@pytest.mark.parametrize(("image", "text"), TOWERS)
def test_a_stage_of_other_sizes_starts_from_the_last(image: str, text: str, size: int, context_length: int) -> None:
    """Every parameter either has its old shape or is a table that is resized; fixed tables are those of the new size."""
    torch.manual_seed(0)
    old, new = build(image, text), build(image, text, size, context_length)
    assert old.state_dict().keys() == new.state_dict().keys()
    olds = {name: p.detach() for name, p in old.named_parameters()}
    differ = {name for name, p in new.named_parameters() if p.shape != olds[name].shape}
    assert {name.partition(".")[0] for name in differ} == {"image"} | ({"text"} if text != "modernbert" else set())
    for name, parameter in new.named_parameters():
        resized = resize_positions(name, olds[name], parameter.shape)
        if name not in differ:
            # a name that is no table's, or the table itself
            assert resized is None or torch.equal(resized, olds[name])
            continue
        assert resized.shape == parameter.shape
        assert resized.dtype == torch.float32
        if not parameter.requires_grad:
            torch.testing.assert_close(resized, parameter.detach(), rtol=0, atol=1e-6)


def test_a_smooth_function_of_the_place_stays_one() -> None:
    def table(grid: int) -> Tensor:
        places = (torch.arange(grid) + 0.5) / grid
        rows, columns = torch.meshgrid(places, places, indexing="ij")
        return torch.stack([rows, columns, (2 * rows).sin(), torch.ones_like(rows)], -1).flatten(0, 1)

    class_token = torch.randn(1, 4)
    for old, new in ((8, 16), (16, 8), (7, 12)):
        resized = resize_positions(IMAGE, torch.cat([class_token, table(old)]), (new**2 + 1, 4))
        assert torch.equal(resized[:1], class_token)
        # at the border a cubic has nothing to lean on; rows and columns must not change places
        error = (resized[1:] - table(new)).abs().view(new, new, 4)
        assert error[3:-3, 3:-3].max() < 1e-3
        assert error.max() < 0.1
        without = resize_positions(IMAGE, table(old), (new**2, 4))
        torch.testing.assert_close(without, resized[1:], rtol=0, atol=1e-6)


def test_a_smaller_grid_has_no_aliases() -> None:
    """A pattern that changes from patch to patch averages out instead of turning into a coarse one."""
    rows = torch.arange(16).repeat_interleave(16)
    resized = resize_positions(IMAGE, torch.where(rows % 2 == 0, 1.0, -1.0)[:, None].expand(-1, 4), (49, 4))
    assert resized.view(7, 7, 4)[1:-1].abs().max() < 0.25


def test_the_same_number_of_positions_is_the_same_table() -> None:
    for name, shape in ((IMAGE, (17, 6)), (TEXT, (17, 6)), (IMAGE, (1, 17, 6))):
        table = torch.randn(shape)
        assert torch.equal(resize_positions(name, table, shape), table)


def test_texts_are_cut_or_stretched() -> None:
    table = torch.randn(10, 6)
    assert torch.equal(resize_positions(TEXT, table, (7, 6)), table[:7])
    longer = resize_positions(TEXT, table, (19, 6))
    torch.testing.assert_close(longer[::2], table)
    torch.testing.assert_close(longer[1::2], (table[:-1] + table[1:]) / 2)


def test_robertas_rows_before_its_first_position_stay() -> None:
    table = torch.randn(12, 6)
    table[1] = 0
    longer = resize_positions(TEXT, table, (21, 6))
    assert torch.equal(longer[:2], table[:2])
    torch.testing.assert_close(longer[2::2], table[2:])


@pytest.mark.parametrize("num_used", [0, 1, 6])
def test_moments_of_positions_that_no_text_reached(num_used: int) -> None:
    moment = torch.cat([torch.rand(num_used, 6) + 1, torch.zeros(10 - num_used, 6)])
    longer = resize_positions(TEXT, moment, (19, 6))
    torch.testing.assert_close(longer[: 2 * num_used : 2], moment[:num_used])
    assert not longer[2 * num_used :].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_and_leading_dimension_are_kept(dtype: torch.dtype) -> None:
    table = torch.randn(1, 17, 8, dtype=dtype)
    resized = resize_positions("image.body.timm_model.pos_embed", table, (1, 26, 8))
    assert resized.dtype == dtype
    assert resized.shape == (1, 26, 8)
    flat = resize_positions("image.body.timm_model.pos_embed", table[0].float(), (26, 8))
    torch.testing.assert_close(resized[0].float(), flat, rtol=0.01, atol=0.01)


UNKNOWN: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "patches": ("image.body.vision_model.embeddings.patch_embedding.weight", (16, 4), (25, 4)),
    "token types": ("text.body.embeddings.token_type_embeddings.weight", (16, 4), (25, 4)),
    "words": ("text.body.embeddings.word_embeddings.weight", (100, 4), (101, 4)),
    "outside of the towers": ("caption_decoder.position_embedding.weight", (16, 4), (25, 4)),
    "part of a name": ("text.body.embeddings.position_embeddings_norm.weight", (16, 4), (25, 4)),
    "a bias": ("text.body.embeddings.position_embeddings.bias", (16,), (25,)),
    "another width": (IMAGE, (16, 4), (25, 8)),
    "another width of texts": (TEXT, (16, 4), (25, 8)),
    "no square": (IMAGE, (15, 4), (25, 4)),
    "no new square": (IMAGE, (16, 4), (24, 4)),
    "a class token more": (IMAGE, (16, 4), (17, 4)),
    "another number of dimensions": (IMAGE, (16, 4), (1, 25, 4)),
    "a table for each layer": ("image.body.timm_model.pos_embed", (2, 16, 4), (2, 25, 4)),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_no_table_of_positions(case: str) -> None:
    name, old, new = UNKNOWN[case]
    assert resize_positions(name, torch.randn(old), new) is None


@pytest.mark.parametrize(("width", "grid", "num_prefix"), [(16, 4, 0), (24, 7, 1)])
def test_fixed_positions_are_maes(width: int, grid: int, num_prefix: int) -> None:
    theirs = torch.from_numpy(get_2d_sincos_pos_embed(width, grid, cls_token=num_prefix == 1)).float()
    torch.testing.assert_close(sincos_table(grid**2 + num_prefix, width, num_prefix), theirs, rtol=0, atol=1e-6)


def test_a_table_that_began_as_the_fixed_one_and_learned_is_interpolated() -> None:
    fixed = sincos_table(16, 8, 0)
    assert torch.equal(resize_positions(IMAGE, fixed, (36, 8)), sincos_table(36, 8, 0))
    learned = fixed + 0.05 * torch.randn(16, 8)
    assert (resize_positions(IMAGE, learned, (36, 8)) - sincos_table(36, 8, 0)).abs().max() > 0.1


@pytest.mark.parametrize("image", ["clip fixed", "siglip fixed"])
def test_a_tower_with_fixed_positions(image: str) -> None:
    model = build(image, "clip_text_model")
    table = dict(model.named_parameters())[IMAGE]
    num_prefix = 1 if image == "clip fixed" else 0
    assert torch.equal(table, sincos_table(16 + num_prefix, 16, num_prefix))
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [IMAGE]
    with torch.device("meta"):
        shapes = build(image, "clip_text_model")
    assert all(p.is_meta for p in shapes.parameters())
    assert [name for name, p in shapes.named_parameters() if not p.requires_grad] == [IMAGE]


def fixed_config(**image: Any) -> ModelConfig:
    image = {"type": "siglip_vision_model", "size": 32, "pooling": "mean", "positions": "sincos", "config": VIT, **image}
    return ModelConfig.model_validate({"image": image, "text": {"context_length": 10, "config": SIZES | IDS}})


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"type": "vit"}, "positions=sincos: a vit tower.*siglip_vision_model"),
        ({"config": VIT | {"hidden_size": 18}}, "hidden_size=18.*multiple of 4"),
    ],
)
def test_towers_without_fixed_positions(image: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DualEncoder(fixed_config(**image))


def test_a_folder_with_fixed_positions_and_one_without(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VIT, image_size=32))
    model.save_pretrained(tmp_path / "learned")
    model.vision_model.embeddings.position_embedding.weight.data = sincos_table(16, 16, 0)
    model.bfloat16().save_pretrained(tmp_path / "fixed")
    tower = DualEncoder(fixed_config(pretrained=str(tmp_path / "fixed"))).image.body
    assert torch.equal(tower.vision_model.embeddings.position_embedding.weight, sincos_table(16, 16, 0))
    with pytest.raises(ConfigError, match=r"learned has learned positions: set model\.image\.positions=learned"):
        DualEncoder(fixed_config(pretrained=str(tmp_path / "learned")))
