"""What a run's caption decoder writes of samples that it was trained on."""

from pathlib import Path
from typing import NamedTuple

from scaleclip.data.cache import ShardCache
from scaleclip.data.loader import TrainDataset
from scaleclip.data.source import open_sources
from scaleclip.errors import ConfigError
from scaleclip.trained_model import load_model


class Written(NamedTuple):
    """A sample and its captions."""

    key: str
    read: str
    """The first text view, which the decoder reads beside the image."""
    wanted: str
    """The caption that it learns to write."""
    written: str
    """What it writes, greedily."""


def written_captions(run: Path, number: int) -> list[Written]:
    """Of the first samples of the run's order, those that can be used, with the newest whole checkpoint.

    Raises:
        ConfigError: no run, no checkpoint, no caption decoder, or fewer samples in a batch.
    """
    trained = load_model(str(run))
    config, model, tokenizer = trained.config, trained.model, trained.tokenizer
    if config is None or config.model.caption_decoder is None or tokenizer.start_id is None:
        raise ConfigError(f"{run} has no model.caption_decoder: train one with a decoder, for example configs/demo/clips.yaml")
    if number > config.train.global_batch:
        raise ConfigError(f"--number={number} is more than train.global_batch={config.train.global_batch}")
    cache = ShardCache(config.data.cache)
    sources = open_sources(config.data.sources, cache)
    batch = TrainDataset(config, sources, cache, tokenizer, rank=0, world_size=1, micro_batch=number)[0]
    device = model.logit_scale.device
    written = model.write_captions(
        batch.pixels_BCHW.to(device), batch.tokens_BT[0].to(device), tokenizer.start_id, tokenizer.end_id
    )
    assert batch.captions_BS is not None, "there is a decoder"
    columns = (tokenizer.texts(batch.tokens_BT[0]), tokenizer.texts(batch.captions_BS), tokenizer.texts(written.cpu()))
    return [Written(key, *row) for key, *row in zip(batch.keys, *columns, strict=True) if key]
