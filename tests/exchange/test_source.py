"""The files that decide what a model from elsewhere computes."""

import json
from pathlib import Path

import pytest

from exchange_cases import exported, random_model, small_preset
from scaleclip.errors import ConfigError
from scaleclip.exchange.source import files_of


def test_the_files_that_a_model_is_made_of(tmp_path: Path) -> None:
    config = small_preset("tiny")
    exported(random_model(config), config, "open_clip", tmp_path / "out")
    weights = tmp_path / "out" / "open_clip_model.safetensors"
    beside = {path.name for path in files_of(str(weights))}
    assert {weights.name, "scaleclip.json", "open_clip_config.json", "tokenizer.json", "tokenizer_config.json"} <= beside
    assert "README.md" not in beside
    assert files_of(str(tmp_path / "out")) == sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    with pytest.raises(ConfigError, match="there is no such model"):
        files_of(str(tmp_path / "nowhere"))


def test_the_folders_that_a_configuration_of_open_clips_names_belong_to_a_model(tmp_path: Path) -> None:
    for name in ("bert/config.json", "words/tokenizer.json", "words/notes.txt", "model/x.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    text = {"hf_model_name": str(tmp_path / "bert"), "hf_tokenizer_name": str(tmp_path / "words"), "hf_proj_type": "linear"}
    (tmp_path / "model" / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"embed_dim": 8, "vision_cfg": {}} | {"text_cfg": text}})
    )
    expected = ["bert/config.json", "model/open_clip_config.json", "model/x.pt", "words/tokenizer.json"]
    for reference in ("model", "model/x.pt"):
        assert files_of(str(tmp_path / reference)) == [tmp_path / name for name in expected]
