"""`model.pretrained`: a training that starts from a whole dual encoder, whoever made it."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from exchange_cases import assert_close, exported, image_features, pictures, random_model, small_preset, text_features
from rank_jobs import first_parameters_of_each
from scaleclip.config import ModelConfig, RunConfig
from scaleclip.config_io import load_config
from scaleclip.config_rules import validate
from scaleclip.config_tree import deep_update
from scaleclip.data.tokenizer import load_tokenizer
from scaleclip.equivalence.shrink import shrink
from scaleclip.errors import ConfigError
from scaleclip.exchange.initial_weights import start_from
from scaleclip.exchange.open_clip_config import model_cfg
from scaleclip.local_ranks import run_ranks
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.models.positions import resize_positions


def changed(config: ModelConfig, tree: dict[str, Any]) -> ModelConfig:
    return ModelConfig.model_validate(deep_update(config.model_dump(), tree))


def started(config: ModelConfig, folder: Path, **tree: Any) -> DualEncoder:
    config = changed(config, {"pretrained": str(folder), **tree})
    torch.manual_seed(9)
    model = DualEncoder(config)
    start_from(model, config)
    return model


@pytest.mark.parametrize("to", ["transformers", "open_clip"])
def test_all_of_it(to: Any, tmp_path: Path) -> None:
    config = changed(small_preset("tiny"), {"init_logit_bias": -3.0})
    trained = random_model(config)
    exported(trained, config, to, tmp_path / "out")
    model = started(config, tmp_path / "out").eval()
    for name, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert all(parameter.requires_grad for parameter in model.parameters())
    images, tokenizer = pictures(config.image.size), load_tokenizer("demo", config.text.context_length)
    assert_close(image_features(trained, images), image_features(model, images))
    assert_close(text_features(trained, tokenizer), text_features(model, tokenizer))


@pytest.mark.parametrize("to", ["transformers", "open_clip"])
def test_a_folder_that_only_the_library_describes(to: Any, tmp_path: Path) -> None:
    """CLIP's pooler is the end token's state, by whichever name."""
    config = small_preset("tiny")
    trained = random_model(config)
    exported(trained, config, to, tmp_path / "out")
    (tmp_path / "out" / "scaleclip.json").unlink()
    model = started(config, tmp_path / "out")
    for name, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_other_sizes_and_new_parts(tmp_path: Path) -> None:
    """Positions are resized; what the other model does not have starts afresh; what is locked stays locked."""
    config = small_preset("tiny")
    trained = random_model(config)
    exported(trained, config, "transformers", tmp_path / "out")
    length = config.text.context_length + 4
    text = {"context_length": length, "locked": True}
    model = started(
        config, tmp_path / "out", image={"size": 48}, text=text, projector={"hidden": 8, "dim": 4}, init_logit_bias=-10.0
    )
    assert model.projector is not None
    assert model.logit_bias is not None
    assert model.logit_bias.item() == -10
    state, before = model.state_dict(), trained.state_dict()
    resized = [name for name in before if state[name].shape != before[name].shape]
    assert len(resized) == 2
    for name in before:
        expected = before[name]
        if name in resized:
            expected = resize_positions(name, expected, state[name].shape)
        assert torch.equal(state[name], expected), name
    assert not any(parameter.requires_grad for parameter in model.text.body.parameters())


def test_a_projection_that_the_other_model_does_without_changes_nothing_at_first(tmp_path: Path) -> None:
    config = small_preset("SigLIP-B/16")
    trained = random_model(config)
    assert exported(trained, config, "transformers", tmp_path / "siglip") == "SiglipModel"
    images = pictures(config.image.size)
    for projection in (False, True):
        model = started(config, tmp_path / "siglip", image={"projection": projection}).eval()
        assert len(list(model.image_projection.parameters())) == projection
        assert_close(image_features(trained, images), image_features(model, images))
    exported(model, changed(config, {"image": {"projection": True}}), "transformers", tmp_path / "projected")
    with pytest.raises(ConfigError, match=r"belongs to other values: set model\.image\.projection=true$"):
        started(config, tmp_path / "projected")


def test_fixed_positions_are_made_anew_and_learned_ones_are_no_fixed_ones(tmp_path: Path) -> None:
    config = changed(small_preset("tiny"), {"image": {"positions": "sincos"}})
    exported(random_model(config), config, "transformers", tmp_path / "fixed")
    name = "image.body.vision_model.embeddings.position_embedding.weight"
    model = started(config, tmp_path / "fixed", image={"size": 48})
    assert torch.equal(model.state_dict()[name], DualEncoder(changed(config, {"image": {"size": 48}})).state_dict()[name])
    learned = small_preset("tiny")
    exported(random_model(learned), learned, "transformers", tmp_path / "learned")
    with pytest.raises(ConfigError, match=r"has learned positions: set model\.image\.positions=learned"):
        started(config, tmp_path / "learned")


def test_a_bare_file_is_what_the_configuration_says(tmp_path: Path) -> None:
    """open_clip's state dict does not say its heads: nothing is guessed."""
    config = small_preset("tiny")
    torch.manual_seed(0)
    theirs = open_clip.model.CLIP(**model_cfg(config, DualEncoder(config))).eval()
    torch.save(theirs.state_dict(), tmp_path / "x.pt")
    model = started(config, tmp_path / "x.pt").eval()
    tokens = load_tokenizer("demo", config.text.context_length)(["a dog", "two cats"])
    with torch.no_grad():
        assert_close(theirs.encode_text(tokens, normalize=True), model.encode_text(tokens))


QUICK = {"config": {"hidden_act": "quick_gelu"}}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"embed_dim": 16}, r"set model\.embed_dim=32$"),
        (
            {"image": QUICK, "text": QUICK},
            r"set model\.image\.config\.hidden_act=\"gelu\" model\.text\.config\.hidden_act=\"gelu\"$",
        ),
        ({"image": {"config": {"num_attention_heads": 1}}}, r"set model\.image\.config\.num_attention_heads=2$"),
        ({"image": {"config": {"hidden_size": 64}}}, r"set model\.image\.config\.hidden_size=32$"),
        ({"text": {"pooling": "mean"}}, r"set model\.text\.pooling=\"pooler\"$"),
        ({"image": {"std": (0.5, 0.5, 0.5)}}, r"set model\.image\.std=\[0\.2686"),
        ({"image": {"type": "siglip_vision_model"}}, r"set model\.image\.type=\"clip_vision_model\"$"),
    ],
)
def test_what_does_not_agree_is_said(tree: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = small_preset("tiny")
    exported(random_model(config), config, "transformers", tmp_path / "out")
    with pytest.raises(ConfigError, match=rf"^model\.pretrained=\S+ belongs .*{message}"):
        started(config, tmp_path / "out", **tree)


def test_one_of_the_two_places(tiny_config_path: str) -> None:
    config = load_config(tiny_config_path, ["model.pretrained=x", "model.image.pretrained=y"])
    with pytest.raises(ConfigError, match=r"model\.image\.pretrained=y, but model\.pretrained=x has that tower's weights too"):
        validate(config, 1)
    assert config.model.without_pretrained().pretrained is None
    assert shrink(config).config.model.pretrained is None


def test_a_stage_goes_on_with_the_weights_before_it(tiny_config_path: str) -> None:
    with pytest.raises(ConfigError, match=r"stages\.0\.model\.pretrained: a stage goes on"):
        load_config(tiny_config_path, ["stages=[{model: {pretrained: x}, train: {samples: 8}}]"])


def test_every_stage_starts_with_the_same_weights(tiny_config_path: str, tmp_path: Path) -> None:
    """Under stage 3 rank 0 alone reads them, and hands them out."""
    config = load_config(tiny_config_path).model
    trained = random_model(config)
    exported(trained, config, "transformers", tmp_path / "out")
    pretrained = f"model.pretrained={tmp_path / 'out'}"
    for found in run_ranks(
        first_parameters_of_each, 2, tiny_config_path, [[f"train.zero_stage={n}", pretrained] for n in (1, 3)]
    ):
        for parameters in found:
            assert parameters.keys() == trained.state_dict().keys()
            for name, value in trained.named_parameters():
                assert torch.equal(parameters[name], value), name


def test_it_is_free_on_resume() -> None:
    from scaleclip.config_io import differing_keys

    a, b = (RunConfig.model_validate({"model": {"pretrained": name}}) for name in ("a", "b"))
    assert not differing_keys(a, b)
