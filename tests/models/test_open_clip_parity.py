"""Our CLIP is open_clip's CLIP: sizes, features and initialisation."""

from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from open_clip.model import CLIP
from torch import Tensor

from scaleclip.config import ModelConfig
from scaleclip.config_io import load_config, preset_names
from scaleclip.models.dual_encoder import DualEncoder

WIDTH, TEXT_WIDTH, NUM_LAYERS = 192, 128, 3
LAYER_NAMES = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def small_clip() -> CLIP:
    return CLIP(
        embed_dim=48,
        vision_cfg={"image_size": 32, "layers": NUM_LAYERS, "width": WIDTH, "head_width": 32, "patch_size": 8},
        text_cfg={"context_length": 12, "vocab_size": 700, "width": TEXT_WIDTH, "heads": 4, "layers": NUM_LAYERS},
    )


def small_config() -> ModelConfig:
    shared = {"num_hidden_layers": NUM_LAYERS, "hidden_act": "gelu"}
    image = {"hidden_size": WIDTH, "num_attention_heads": 6, "intermediate_size": 4 * WIDTH, "patch_size": 8, **shared}
    text = {"hidden_size": TEXT_WIDTH, "num_attention_heads": 4, "intermediate_size": 4 * TEXT_WIDTH, **shared}
    ids = {"vocab_size": 700, "bos_token_id": 698, "eos_token_id": 699, "pad_token_id": 0}
    return ModelConfig.model_validate(
        {"embed_dim": 48, "image": {"size": 32, "config": image}, "text": {"context_length": 12, "config": text | ids}}
    )


def renamed(theirs: CLIP) -> dict[str, Tensor]:
    """open_clip's parameters under our names."""
    state = theirs.state_dict()
    ours = {
        "image.body.vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "image.body.vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "image.body.vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "text.body.text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text.body.text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "image_projection.weight": state["visual.proj"].T,
        "text_projection.weight": state["text_projection"].T,
        "logit_scale": state["logit_scale"].reshape(1),
    }
    norms = {
        "image.body.vision_model.pre_layrnorm": "visual.ln_pre",
        "image.body.vision_model.post_layernorm": "visual.ln_post",
        "text.body.text_model.final_layer_norm": "ln_final",
    }
    for end in ("weight", "bias"):
        for our_name, their_name in norms.items():
            ours[f"{our_name}.{end}"] = state[f"{their_name}.{end}"]
        for our_tower, their_tower in (("image.body.vision_model", "visual."), ("text.body.text_model", "")):
            for i in range(NUM_LAYERS):
                a, b = f"{our_tower}.encoder.layers.{i}", f"{their_tower}transformer.resblocks.{i}"
                for name, third in zip("qkv", state[f"{b}.attn.in_proj_{end}"].chunk(3), strict=True):
                    ours[f"{a}.self_attn.{name}_proj.{end}"] = third
                ours[f"{a}.self_attn.out_proj.{end}"] = state[f"{b}.attn.out_proj.{end}"]
                for our_name, their_name in LAYER_NAMES.items():
                    ours[f"{a}.{our_name}.{end}"] = state[f"{b}.{their_name}.{end}"]
    return ours


def test_same_weights_give_the_same_features() -> None:
    torch.manual_seed(0)
    theirs, ours = small_clip().eval(), DualEncoder(small_config()).eval()
    ours.load_state_dict(renamed(theirs))
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.randint(1, 698, (4, 12))
    tokens[:, 0] = 698
    tokens[torch.arange(4), torch.tensor([3, 11, 1, 7])] = 699
    tokens[0, 4:] = 0
    mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
    normalised = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        features = ours(pixels, (tokens,))
        torch.testing.assert_close(features.image_BE, theirs.encode_image(normalised, normalize=True), rtol=0, atol=1e-6)
        torch.testing.assert_close(features.texts_BE[0], theirs.encode_text(tokens, normalize=True), rtol=0, atol=1e-6)
        torch.testing.assert_close(features.logit_scale, theirs.logit_scale.exp())


def test_initialisation_has_open_clips_distributions() -> None:
    torch.manual_seed(0)
    theirs, ours = renamed(small_clip()), DualEncoder(small_config()).state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        ratio = value.double().pow(2).mean().sqrt() / theirs[name].double().pow(2).mean().sqrt()
        if theirs[name].abs().max() == 0:
            assert value.abs().max() == 0, name
            continue
        # a normal sample's rms strays by (2 n)^-1/2 and there are two; 4.5 of these for all names together
        assert abs(ratio - 1) < 4.5 * value.numel() ** -0.5, f"{name}: rms {ratio:.3f} times open_clip's"
        if value.numel() > 5000:
            peaks = [(t.double() / t.double().std()).pow(4).mean() for t in (value, theirs[name])]
            # 1.8 for a uniform, 3 for a normal distribution
            assert abs(peaks[0] - peaks[1]) < 0.3, f"{name}: kurtosis {peaks[0]:.2f}, open_clip's {peaks[1]:.2f}"


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith("ViT")])
def test_preset_has_open_clips_number_of_parameters(name: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"model": name}))
    theirs = open_clip.get_model_config(name.replace("/", "-"))
    with torch.device("meta"):
        ours = DualEncoder(load_config(file).model)
        counts = [sum(p.numel() for p in model.parameters()) for model in (ours, CLIP(**theirs))]
    assert counts[0] == counts[1]
