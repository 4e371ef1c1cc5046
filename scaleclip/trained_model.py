"""From what a user names to a model that encodes."""

from pathlib import Path
from typing import NamedTuple

import torch

from scaleclip.checkpoint.folders import damage, newest, saved
from scaleclip.checkpoint.loading import load_weights
from scaleclip.checkpoint.state import read_state
from scaleclip.config import RunConfig
from scaleclip.data.tokenizer import Tokenizer, load_tokenizer
from scaleclip.errors import ConfigError
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.run_folder import read_config
from scaleclip.stages import stage_before, stages_of


class TrainedModel(NamedTuple):
    """A checkpoint's model, ready to encode."""

    step: int
    config: RunConfig
    """Of the stage that saved it."""
    model: DualEncoder
    """In evaluation mode, on a GPU if there is one."""
    tokenizer: Tokenizer


def load_newest(run: Path) -> TrainedModel:
    """The model of a run's newest whole checkpoint.

    Raises:
        ConfigError: no run, or no whole checkpoint.
    """
    return load_checkpoint(run, newest_whole(run))


def load_checkpoint(run: Path, path: Path) -> TrainedModel:
    """The model of a checkpoint whose checksums hold. Raises ConfigError where the folder holds no run."""
    whole, step = read_config(run), read_state(path).step
    config = stage_before(stages_of(whole), step).config
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = DualEncoder(config.model.without_pretrained()).to(device)
    # persistent buffers, which some towers have, are constants and not in a checkpoint
    model.load_state_dict(model.state_dict() | load_weights(path))
    tokenizer = load_tokenizer(config.model.text.tokenizer, config.model.text.context_length)
    return TrainedModel(step, config, model.eval(), tokenizer)


def newest_whole(run: Path) -> Path:
    """A run's newest whole checkpoint. Raises ConfigError where there is none."""
    path = newest(run)
    if path is None and (found := saved(run)):
        raise ConfigError(f"{run}: all checkpoints are damaged, the newest one by this: {damage(found[-1])}")
    if path is None:
        raise ConfigError(f"{run} has no checkpoint to evaluate: train first")
    return path
