"""Tiny models that the tests of this folder share."""

from pathlib import Path

import pytest
import torch

from captioning_models import tiny_llama, tiny_llava
from scaleclip.captioning.language_model import LanguageModel
from scaleclip.captioning.vision_language_model import VisionLanguageModel

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LlamaForCausalLM of random weights."""
    return tiny_llama(tmp_path_factory.mktemp("llama") / "tiny-llama")


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LlavaForConditionalGeneration of random weights, with its processor."""
    return tiny_llava(tmp_path_factory.mktemp("llava") / "tiny-llava")


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> LanguageModel:
    """The language model, loaded."""
    return LanguageModel(llama_folder, "auto", CPU)


@pytest.fixture(scope="session")
def llava(llava_folder: Path) -> VisionLanguageModel:
    """The vision-language model, loaded."""
    return VisionLanguageModel(llava_folder, "Describe it.", "auto", CPU)
