"""What the tests of embedding run on ranks of their own."""

import os
from pathlib import Path
from typing import Any

import torch

from report_runs import tiny_config
from scaleclip import distributed
from scaleclip.config import CacheConfig
from scaleclip.data.cache import ShardCache
from scaleclip.data.tokenizer import load_tokenizer
from scaleclip.distributed import World
from scaleclip.embedding.chunks import Wanted
from scaleclip.embedding.embed import Embedder, embed
from scaleclip.embedding.folder import FeatureFolder, Summary
from scaleclip.models.dual_encoder import DualEncoder


def make_embedder(seed: int = 0, activation: str | None = None) -> Embedder:
    """A model of random weights."""
    config = tiny_config().model
    if activation:
        image = config.image.model_copy(update={"config": {**config.image.config, "hidden_act": activation}})
        config = config.model_copy(update={"image": image})
    torch.manual_seed(seed)
    model = DualEncoder(config).eval()
    tokenizer = load_tokenizer(config.text.tokenizer, config.text.context_length)
    return Embedder("random weights", None, config, model, tokenizer)


def embed_shards(wanted: Wanted, out: Path, **settings: Any) -> Summary:
    """What the command does, without a command."""
    shown = settings.get("shown", [])
    cache = ShardCache(CacheConfig(folder=str(out.parent / "cache")))
    embedder = make_embedder(settings.get("seed", 0), settings.get("activation"))
    world = distributed.init() if "RANK" in os.environ else World(0, 1, 0, torch.device("cpu"))
    return embed(embedder, wanted, cache, out, settings.get("dtype", "float32"), world, lambda *news: shown.append(news))


def embed_and_tell(wanted: Wanted, out: Path) -> tuple[Summary, list[str]]:
    """The summary, and the shards that this rank wrote."""
    written, write = list[str](), FeatureFolder.write

    def noting(folder: FeatureFolder, name: str, *arguments: Any) -> None:
        written.append(name)
        write(folder, name, *arguments)

    FeatureFolder.write = noting
    return embed_shards(wanted, out), written
