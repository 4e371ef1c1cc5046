"""From what a user names to a model that encodes."""

from pathlib import Path
from typing import NamedTuple

import torch

from scaleclip.checkpoint.folders import newest_whole
from scaleclip.checkpoint.loading import load_weights
from scaleclip.checkpoint.state import STATE, read_state
from scaleclip.config import ModelConfig, RunConfig
from scaleclip.data.tokenizer import Tokenizer, load_tokenizer
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

    @property
    def model_config(self) -> ModelConfig:
        """Of the model."""
        return self.config.model


def load_model(reference: str) -> TrainedModel:
    """The model of a run's newest whole checkpoint, or of a checkpoint's folder.

    Raises:
        ConfigError: there is no run, or no whole checkpoint.
    """
    path = Path(reference)
    if (path / STATE).exists():
        return load_checkpoint(path.absolute().parent.parent, path)
    return load_newest(path)


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
