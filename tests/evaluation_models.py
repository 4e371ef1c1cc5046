"""A small model with random weights, for evaluations."""

import os
from pathlib import Path

import torch
import yaml

from scaleclip.config_io import load_config
from scaleclip.data.tokenizer import load_tokenizer
from scaleclip.evaluation.encoder import Encoder
from scaleclip.models.dual_encoder import DualEncoder


def tiny_encoder(folder: Path, batch: int = 4) -> Encoder:
    """Always the same weights; `folder` is for its configuration."""
    path = folder / f"model-{os.getpid()}.yaml"  # ranks share the folder
    path.write_text(yaml.safe_dump({"model": {"preset": "tiny"}}))
    config = load_config(path).model
    torch.manual_seed(0)
    tokenizer = load_tokenizer(config.text.tokenizer, config.text.context_length)
    return Encoder(DualEncoder(config).eval(), tokenizer, config.image.size, batch)
