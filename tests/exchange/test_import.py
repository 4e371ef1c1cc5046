"""Other libraries' models, made by them with random weights, give the same features here; others are told apart."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPImageProcessor

from exchange_cases import (
    DEMO_TOKENS,
    SIZES,
    VIT,
    assert_close,
    exported,
    image_features,
    pictures,
    random_model,
    small_preset,
)
from scaleclip.config_io import named_architecture
from scaleclip.data.tokenizer import fast_tokenizer
from scaleclip.errors import ConfigError
from scaleclip.exchange.source import open_source
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.trained_model import TrainedModel, load_model

VISION = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 64, "mlp_ratio": 2.0}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
CFG: dict[str, Any] = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
VIT_TI = "vit_tiny_patch16_224"
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


def clip_tokens(number: int = 4, end: int = 49407, length: int = 12) -> Tensor:
    tokens = torch.randint(1, end - 1, (number, length), generator=torch.Generator().manual_seed(0))
    tokens[torch.arange(number), torch.tensor([length - 1, 3, 1, 7])] = end
    tokens[1, 4:] = 0
    return tokens


def normalised(images: list[Image.Image], mean: Any = MEAN, std: Any = STD) -> Tensor:
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]) / 255
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def open_clip_model(custom: bool = False, **changes: Any) -> Any:
    torch.manual_seed(0)
    kind = open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP
    return randomised(kind(**(CFG | changes)))


@torch.no_grad()
def check_open_clip(theirs: Any, ours: TrainedModel) -> None:
    images, tokens = pictures(ours.model_config.image.size), clip_tokens()
    assert_close(theirs.encode_image(normalised(images), normalize=True), image_features(ours.model, images))
    assert_close(theirs.encode_text(tokens, normalize=True), ours.model.encode_text(tokens))
    torch.testing.assert_close(theirs.logit_scale.exp().reshape(1), ours.model.logit_scale.exp())


def save_plain(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "weights.pt")
    return folder / "weights.pt"


def save_training(state: dict[str, Tensor], folder: Path) -> Path:
    """open_clip's own training checkpoint, of a distributed run."""
    wrapped = {f"module.{name}": value for name, value in state.items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": wrapped, "optimizer": {"state": {}}}, folder / "epoch_3.pt")
    return folder / "epoch_3.pt"


def save_old(state: dict[str, Tensor], folder: Path) -> Path:
    """Before files were zip archives, which can be mapped."""
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    return folder / "old.pt"


def save_safetensors(state: dict[str, Tensor], folder: Path) -> Path:
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "weights.safetensors")
    return folder / "weights.safetensors"


@pytest.mark.parametrize("save", [save_plain, save_training, save_old, save_safetensors])
def test_a_file_of_open_clips_weights(save: Callable[[dict[str, Tensor], Path], Path], tmp_path: Path) -> None:
    theirs = open_clip_model()
    check_open_clip(theirs, load_model(str(save(theirs.state_dict(), tmp_path))))


@pytest.mark.parametrize(
    ("custom", "changes"),
    [
        (True, {}),
        (False, {"quick_gelu": True}),
        (False, {"init_logit_bias": -7.0}),
        (False, {"vision_cfg": VISION | {"head_width": 16, "norm_kwargs": {"eps": 1e-2}}}),
        (False, {"text_cfg": TEXT | {"heads": 4, "act_kwargs": {"approximate": "tanh"}}}),
        (False, {"text_cfg": TEXT | {"pool_type": "eos", "eos_id": 49407, "vocab_size": 49500}}),
        (True, {"text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}}),
        (False, {"text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last"}}),
        (True, {"vision_cfg": {"timm_model_name": VIT_TI, "timm_pool": "token", "image_size": 224}}),
        (
            True,
            {
                "embed_dim": 192,
                "vision_cfg": {"timm_model_name": VIT_TI, "timm_pool": "token", "timm_proj": "none"},
            },
        ),
    ],
    ids=["text module", "quick", "bias", "heads eps", "tanh", "end", "siglip", "clipa text", "timm", "timm alone"],
)
def test_a_folder_of_open_clips(custom: bool, changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = open_clip_model(custom, **changes)
    save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    content = {"model_cfg": CFG | changes | {"custom_text": custom}, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    ours = load_model(str(tmp_path))
    check_open_clip(theirs, ours)
    if "init_logit_bias" in changes:
        assert ours.model.logit_bias is not None
        assert ours.model.logit_bias.item() == theirs.logit_bias.item()


def test_a_vocabulary_that_is_elsewhere(tmp_path: Path) -> None:
    """Texts are not read by another one."""
    save_file(open_clip_model().state_dict(), tmp_path / "open_clip_model.safetensors")
    content = {"model_cfg": CFG | {"text_cfg": TEXT | {"hf_tokenizer_name": "bert-base-uncased"}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"model\.text\.tokenizer='bert-base-uncased' is neither a folder nor"):
        load_model(str(tmp_path))
    fast_tokenizer("clip", 12).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).tokenizer.name == str(tmp_path)


def test_other_means(tmp_path: Path) -> None:
    theirs = open_clip_model()
    save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    content = {"model_cfg": CFG, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.6, 0.5, 0.4]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    images = pictures(32)
    with torch.no_grad():
        expected = theirs.encode_image(normalised(images, (0.5, 0.4, 0.3), (0.6, 0.5, 0.4)), normalize=True)
    assert_close(expected, image_features(load_model(str(tmp_path)).model, images))


def test_openais_archive(tmp_path: Path) -> None:
    """TorchScript in half precision, with constants beside the weights, and the quick GELU."""
    theirs = open_clip_model(quick_gelu=True)
    for name, value in (("input_resolution", 32), ("context_length", 12), ("vocab_size", 49408)):
        vars(theirs).pop(name, None)
        theirs.register_buffer(name, torch.tensor(value))
    open_clip.model.convert_weights_to_lp(theirs)
    traced = torch.jit.trace_module(theirs, {"encode_image": torch.zeros(1, 3, 32, 32).half()}, strict=False)
    traced.save(str(tmp_path / "ViT.pt"))
    ours = load_model(str(tmp_path / "ViT.pt"))
    check_open_clip(theirs.float(), ours)
    # a preset without the quick GELU does not decide what an archive of OpenAI's is
    again = load_model(str(tmp_path / "ViT.pt"), named_architecture("ViT-B/32"))
    assert again.model_config.image.config["hidden_act"] == "quick_gelu"


def test_a_name_says_what_shapes_do_not(tmp_path: Path) -> None:
    theirs = open_clip_model(quick_gelu=True)
    path = str(save_plain(theirs.state_dict(), tmp_path))
    quick = {"config": {"hidden_act": "quick_gelu"}}
    guessed = load_model(path).model_config
    named = guessed.model_copy(
        update={
            tower: getattr(guessed, tower).model_copy(update={"config": getattr(guessed, tower).config | quick["config"]})
            for tower in ("image", "text")
        }
    )
    check_open_clip(theirs, load_model(path, named))
    with pytest.raises(AssertionError):
        check_open_clip(theirs, load_model(path))


def test_named_architectures() -> None:
    assert named_architecture("ViT-B-32") == named_architecture("ViT-B/32")
    quick = named_architecture("ViT-L-14-336-quickgelu")
    assert quick.image.size == 336
    assert quick.text.config["hidden_act"] == quick.image.config["hidden_act"] == "quick_gelu"
    with pytest.raises(ConfigError, match=r"--architecture='ViT-Q' is unknown"):
        named_architecture("ViT-Q-quickgelu")


def transformers_folder(model: Any, folder: Path, end: str | None = "demo") -> Path:
    randomised(model).save_pretrained(folder)
    CLIPImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder)
    if end:
        fast_tokenizer(end, 12).save_pretrained(folder)
    return folder


@torch.no_grad()
def check_transformers(theirs: Any, ours: DualEncoder, end: int) -> None:
    images, tokens = pictures(32), clip_tokens(end=end)
    image = theirs.get_image_features(pixel_values=normalised(images, [0.5] * 3, [0.25] * 3))
    mask = {"attention_mask": (tokens != 0).long()} if "bert" in type(theirs.text_model).__name__.lower() else {}
    text = theirs.get_text_features(input_ids=tokens, **mask)
    assert_close(torch.nn.functional.normalize(image, dim=-1), image_features(ours, images))
    assert_close(torch.nn.functional.normalize(text, dim=-1), ours.encode_text(tokens))
    torch.testing.assert_close(theirs.logit_scale.reshape(1), ours.logit_scale)


@pytest.mark.parametrize("end", [2, 4095])
def test_a_clip_of_transformers(end: int, tmp_path: Path) -> None:
    """OpenAI's configuration says that the end token's id is 2, which means the largest id; and it is saved in two files."""
    text = SIZES | DEMO_TOKENS | {"max_position_embeddings": 12, "eos_token_id": end, "projection_dim": 24}
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=VIT | {"image_size": 32}, projection_dim=24)
    )
    folder = transformers_folder(theirs, tmp_path)
    if end == 2:
        theirs.save_pretrained(folder, max_shard_size="200KB")
        (folder / "model.safetensors").unlink()
    check_transformers(theirs, load_model(str(folder)).model, 4095)


def test_a_siglip_of_transformers(tmp_path: Path) -> None:
    text = SIZES | DEMO_TOKENS | {"max_position_embeddings": 12}
    theirs = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=VIT | {"image_size": 32}))
    ours = load_model(str(transformers_folder(theirs, tmp_path))).model
    check_transformers(theirs, ours, 4095)
    assert ours.logit_bias is not None
    torch.testing.assert_close(ours.logit_bias, theirs.logit_bias)
    assert not list(ours.image_projection.parameters())


def test_a_bert_and_a_vit_of_transformers(tmp_path: Path) -> None:
    text = transformers.BertConfig(**SIZES, vocab_size=4096, max_position_embeddings=12, pad_token_id=0)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.ViTConfig(**VIT, image_size=32), text, projection_dim=24
    )
    theirs = transformers.VisionTextDualEncoderModel(config)
    check_transformers(theirs, load_model(str(transformers_folder(theirs, tmp_path))).model, 4095)


def test_openais_vocabulary_needs_no_file(tmp_path: Path) -> None:
    text = SIZES | {"max_position_embeddings": 12, "eos_token_id": 49407}
    config = transformers.CLIPConfig(text_config=text, vision_config=VIT | {"image_size": 32}, projection_dim=24)
    ours = load_model(str(transformers_folder(transformers.CLIPModel(config), tmp_path, end=None)))
    assert ours.tokenizer.name == "clip"


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "resnet": ({"visual.layer1.0.conv1.weight": (1,)}, "has CLIP's ResNet as its image tower"),
    "no clip": ({"classifier.weight": (3, 4)}, r"holds no CLIP of open_clip or OpenAI: it has classifier\.weight$"),
    "coca": ({"text_decoder.resblocks.0.ln_1.weight": (64,)}, r"has, and the model does not, text_decoder\.resblocks"),
    "no norm": ({"visual.ln_pre.weight": None}, r"holds another architecture: it lacks visual\.ln_pre\.weight$"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_file_of_another_architecture(name: str, tmp_path: Path) -> None:
    changes, message = FAULTS[name]
    state = {} if name == "no clip" else open_clip_model().state_dict()
    for key, shape in changes.items():
        if shape is None:
            del state[key]
        else:
            state[key] = torch.zeros(shape)
    with pytest.raises(ConfigError, match=message):
        load_model(str(save_plain(state, tmp_path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multimodal_cfg": {}}, "is a CoCa"),
        ({"vision_cfg": VISION | {"layers": [3, 4, 6, 3]}}, "CLIP's ResNet"),
        ({"vision_cfg": VISION | {"pool_type": "avg", "no_ln_pre": True}}, r"cfg\.pool_type=avg, vision_cfg\.no_ln_pre=True"),
        ({"vision_cfg": VISION | {"image_size": [32, 64]}}, "here they are square"),
        ({"vision_cfg": {"timm_model_name": VIT_TI, "timm_proj": "mlp"}}, r"timm_proj=mlp: here vit_tiny_patch16_224"),
        ({"vision_cfg": {"timm_model_name": VIT_TI, "timm_pool": "avg"}}, r"timm_pool=avg and timm_proj=linear"),
        ({"vision_cfg": {"timm_model_name": VIT_TI, "timm_pool": "", "timm_proj": "none"}}, r"timm_pool= and timm_proj=none"),
        ({"text_cfg": TEXT | {"embed_cls": True}}, r"text_cfg\.embed_cls=True"),
        ({"text_cfg": TEXT | {"proj_bias": True}}, r"no_causal_mask=False, pool_type=argmax, proj_bias=True"),
        ({"text_cfg": TEXT | {"hf_model_name": "bert-base"}}, r"text_cfg\.width=64"),
        ({"text_cfg": {"hf_model_name": "bert-base"}}, "hf_pooler_type=mean_pooler and hf_proj_type=mlp"),
        ({"text_cfg": {"hf_model_name": "none", "hf_proj_type": "linear"}}, "is no folder of transformers here"),
        ({"quick_gelu": True, "text_cfg": TEXT | {"act_kwargs": {"x": 1}}}, "no activation that is known here"),
    ],
)  # fmt: skip
def test_a_folder_of_another_architecture(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_file(open_clip_model().state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CFG | changes}))
    with pytest.raises(ConfigError, match=message):
        load_model(str(tmp_path))


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="models are not fetched by name"):
        load_model("openai/clip-vit-base-patch32")
    (tmp_path / "x.pt").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"x\.pt cannot be read safely"):
        load_model(str(tmp_path / "x.pt"))
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"x\.safetensors cannot be read"):
        load_model(str(tmp_path / "x.safetensors"))
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no open_clip_model\.safetensors beside it"):
        load_model(str(tmp_path))


class Harm:
    """What a pickle may do."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harmed"),))


def test_a_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": open_clip_model().state_dict(), "harm": Harm()}, "harm.pt")
    with pytest.raises(ConfigError, match="cannot be read safely"):
        load_model("harm.pt")
    assert not Path("harmed").exists()


def test_a_folder_of_another_model_of_transformers(tmp_path: Path) -> None:
    transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=10)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="holds a bert of transformers: a dual encoder is a CLIPModel"):
        load_model(str(tmp_path))


def test_a_folder_that_lacks_a_tensor(tmp_path: Path) -> None:
    text = SIZES | DEMO_TOKENS | {"max_position_embeddings": 12}
    config = transformers.CLIPConfig(text_config=text, vision_config=VIT | {"image_size": 32}, projection_dim=24)
    folder = transformers_folder(transformers.CLIPModel(config), tmp_path)
    state = load_file(folder / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state | {"extra.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"it lacks visual_projection\.weight, and has, .*, extra\.weight"):
        load_model(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no model\.safetensors"):
        load_model(str(folder))


def described(folder: Path, content: Any) -> Path:
    save_file(open_clip_model().state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_null_is_open_clips_own_default(tmp_path: Path) -> None:
    vision = VISION | {"timm_model_name": None, "act_kwargs": None, "pool_type": None}
    cfg = CFG | {"vision_cfg": vision, "text_cfg": TEXT | {"hf_model_name": None}, "init_logit_bias": None}
    ours = load_model(str(described(tmp_path, {"model_cfg": cfg, "preprocess_cfg": None})))
    check_open_clip(open_clip_model(), ours)


def test_a_model_that_cannot_be_built_is_named(tmp_path: Path) -> None:
    cfg = CFG | {"vision_cfg": {"timm_model_name": VIT_TI, "timm_pool": "token", "timm_proj": "none"}}
    message = rf"^{tmp_path} describes a model that cannot be built: .* 192 values is not of model\.embed_dim=24"
    with pytest.raises(ConfigError, match=message):
        load_model(str(described(tmp_path, {"model_cfg": cfg})))


@pytest.mark.parametrize("name", ["visual.positional_embedding", "ln_final.weight", "visual.conv1.weight"])
def test_shapes_that_tell_nothing(name: str, tmp_path: Path) -> None:
    state = open_clip_model().state_dict()
    with pytest.raises(
        ConfigError, match=rf"its shapes are no CLIP's with ViT: it has {re.escape(name)} with shape \[1, 2, 3\]"
    ):
        load_model(str(save_plain(state | {name: torch.zeros(1, 2, 3)}, tmp_path)))
    del state[name]
    with pytest.raises(ConfigError, match=rf"its shapes are no CLIP's with ViT: it lacks {re.escape(name)}; put open_clip's"):
        load_model(str(save_plain(state, tmp_path)))


def test_a_damaged_export(tmp_path: Path) -> None:
    config = small_preset("tiny")
    exported(random_model(config), config, "transformers", tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "scaleclip.json").read_text())
    for content, message in (
        ("[]", "is not what an export writes"),
        (json.dumps({"model": facts["model"] | {"embed_dim": 0}}), r"model that cannot be:\nmodel\.embed_dim=0: "),
    ):
        (tmp_path / "out" / "scaleclip.json").write_text(content)
        with pytest.raises(ConfigError, match=rf"scaleclip\.json .*{message}"):
            open_source(str(tmp_path / "out"))
    (tmp_path / "out" / "scaleclip.json").write_text(json.dumps(facts))
    (tmp_path / "out" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"out: model\.safetensors cannot be read: .*; export or download it again"):
        open_source(str(tmp_path / "out"))
