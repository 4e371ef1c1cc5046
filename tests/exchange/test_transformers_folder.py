"""What a folder of transformers says of its images, and what is taken where it does not."""

import json
from pathlib import Path

import pytest
import transformers
from transformers import CLIPImageProcessor, PreTrainedModel

from exchange_cases import DEMO_TOKENS, SIZES, VIT
from scaleclip.config import ImageTowerConfig, ModelConfig
from scaleclip.errors import ConfigError
from scaleclip.exchange.source import open_source
from scaleclip.exchange.transformers_folder import class_config

TEXT = SIZES | DEMO_TOKENS | {"max_position_embeddings": 12}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
VISION = VIT | {"image_size": 32}


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_a_folder_that_does_not_say_how_pixels_are_normalised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
    folder = saved(transformers.CLIPModel(config), tmp_path)
    CLIPImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder)
    assert open_source(str(folder)).config.image.mean == (0.5, 0.5, 0.5)
    assert not caplog.messages
    (folder / "preprocessor_config.json").unlink()
    for _ in range(2):
        assert open_source(str(folder)).config.image.mean == CLIP_MEAN
    assert len(caplog.messages) == 2, "each is said once: the mean, and the deviation"
    assert (
        "has no image_mean in a preprocessor_config.json: taken as [0.48145466, 0.4578275, 0.40821073], which is "
        in caplog.text
    )
    like = ModelConfig(image=ImageTowerConfig(mean=(0.1, 0.2, 0.3)))
    assert open_source(str(folder), like).config.image.mean == (0.1, 0.2, 0.3)
    assert "taken as [0.1, 0.2, 0.3], which is model.image.mean" in caplog.text
    (folder / "preprocessor_config.json").write_text('{"do_normalize": false}')
    assert open_source(str(folder)).config.image.std == (1, 1, 1)


def test_a_siglip_without_a_processor_is_normalised_as_siglip(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
    folder = saved(transformers.SiglipModel(config), tmp_path)
    assert open_source(str(folder)).config.image.mean == (0.5, 0.5, 0.5)
    assert "which is SiglipImageProcessor's; put the file there" in caplog.text


def test_a_folder_that_does_not_say_the_size_of_its_images(tmp_path: Path) -> None:
    text = transformers.BertConfig(**SIZES, vocab_size=4096, max_position_embeddings=12, pad_token_id=0)
    vision = transformers.ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1])
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=24)
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"does not say the size of its images, .* nor crop_size or size of its preprocessor"):
        class_config(tmp_path, str(tmp_path))
    for values in ({"crop_size": {"height": 48, "width": 48}}, {"size": {"shortest_edge": 48}}, {"size": 48}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
        assert class_config(tmp_path, str(tmp_path))[1].image.size == 48
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"height": 48, "width": 64}}')
    with pytest.raises(ConfigError, match="does not say the size of its images, which are square here"):
        class_config(tmp_path, str(tmp_path))
