"""From what a user names to a model that encodes."""

from typing import NamedTuple

import torch

from scaleclip.config import ModelConfig, RunConfig
from scaleclip.data.tokenizer import Tokenizer, load_tokenizer
from scaleclip.exchange.initial_weights import fill
from scaleclip.exchange.source import Source, open_source
from scaleclip.models.dual_encoder import DualEncoder


class TrainedModel(NamedTuple):
    """A dual encoder, ready to encode."""

    name: str
    """As the user named it."""
    model_config: ModelConfig
    model: DualEncoder
    """In evaluation mode, on a GPU if there is one."""
    tokenizer: Tokenizer
    step: int | None = None
    """Optimizer steps of the run that made it; None for another project's."""
    config: RunConfig | None = None
    """Of the stage that saved it; None for another project's."""


def load_model(reference: str, architecture: ModelConfig | None = None) -> TrainedModel:
    """The model that `reference` names: a run, a checkpoint, or a model of transformers, open_clip or OpenAI.

    Args:
        reference: a path; see scaleclip/exchange/source.py.
        architecture: of a file of weights that does not say it.

    Raises:
        ConfigError: nothing is there, or what no tower here computes.
    """
    source = open_source(reference, architecture)
    heads: dict[str, object] = {}
    if source.checkpoint is not None:  # with the heads that it has
        model = source.checkpoint.config.model
        heads = {"projector": model.projector, "caption_decoder": model.caption_decoder}
    return _built(source, source.config.model_copy(update=heads))


def _built(source: Source, config: ModelConfig) -> TrainedModel:
    model = DualEncoder(config)
    fill(model, source, config)
    tokenizer = load_tokenizer(config.text.tokenizer, config.text.context_length)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = source.checkpoint
    step, run_config = (checkpoint.state.step, checkpoint.config) if checkpoint else (None, None)
    return TrainedModel(source.reference, config, model.to(device).eval(), tokenizer, step, run_config)
