"""Small dual encoders, pictures and texts for tests of what leaves and what comes in."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scaleclip.config import ModelConfig, RunConfig
from scaleclip.config_io import named_architecture
from scaleclip.config_tree import deep_update
from scaleclip.data.tokenizer import Tokenizer
from scaleclip.equivalence.shrink import shrink
from scaleclip.exchange.export import Format, check_target, prepare, write
from scaleclip.exchange.source import Source, open_source
from scaleclip.exchange.weights import in_memory
from scaleclip.models.dual_encoder import DualEncoder

LIMIT = 1e-5
TEXTS = [
    "a photo of a dog",
    "",
    "A Dog's   LIFE\n\t2024!!",
    "caf\u00e9 cafe\u0301 na\u00efve \u00dcBER \ufb01ne",
    "\U0001f600\U0001f468\u200d\U0001f469 \u4e2d\u6587 \u0421\u043b\u043e\u0432\u043e",
    "Tom &amp; Jerry &lt;3 &amp;amp; &quot;x&quot; &#39;s",
    "\u201cquoted\u201d it\u2019s",
    "<end_of_text> hi <start_of_text> !",
    "hi! !!a 3.14 we've I'LL x__y",
    "word " * 100,
]
CLIP_TOKENS = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 0}
DEMO_TOKENS = {"vocab_size": 4096, "bos_token_id": 4094, "eos_token_id": 4095, "pad_token_id": 0}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VIT = SIZES | {"patch_size": 8}


class Loaded(NamedTuple):
    """An export as its own card's code loads it."""

    encode_images: Callable[[Sequence[Image.Image]], Tensor]
    encode_texts: Callable[[Sequence[str]], Tensor]


def small_preset(name: str, tokenizer: str = "demo") -> ModelConfig:
    """A preset with its options and tiny widths, but with the whole vocabulary of a tokenizer, so that real texts fit."""
    small = shrink(RunConfig(model=named_architecture(name))).config.model
    tokens = DEMO_TOKENS if tokenizer == "demo" else CLIP_TOKENS
    values = {key: tokens[key] for key in tokens if key in small.text.config}
    special = {"cls_token_id": tokens["bos_token_id"], "sep_token_id": tokens["eos_token_id"]}
    values |= {key: special[key] for key in special if key in small.text.config}
    return ModelConfig.model_validate(deep_update(small.model_dump(), {"text": {"tokenizer": tokenizer, "config": values}}))


def random_model(config: ModelConfig, seed: int = 0) -> DualEncoder:
    """With values everywhere, where a fresh model has zeros and ones too."""
    torch.manual_seed(seed)
    model = DualEncoder(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (parameter.ndim < 2 or "norm" in name):
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def source_of(model: DualEncoder, config: ModelConfig) -> Source:
    """A model in memory as an opened one."""
    with torch.device("meta"):
        shapes = DualEncoder(config)
    return Source("memory", config, shapes, in_memory(model.state_dict()))


def exported(model: DualEncoder, config: ModelConfig, to: Format, folder: Path) -> str:
    """Write a model into a folder; the kind of it."""
    source = source_of(model, config)
    export = prepare(source, to)
    check_target(folder, force=False)
    write(export, source, folder)
    return export.kind


def loaded_by_card(folder: Path) -> Loaded:
    """Run the code of a folder's model card; the working folder has to be that one."""
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(code) == 1
    names: dict[str, Any] = {}
    exec(code[0], names)
    return Loaded(names["encode_images"], names["encode_texts"])


def pictures(size: int, number: int = 3) -> list[Image.Image]:
    """Random, of the model's size: nothing is resized."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(number)]


@torch.no_grad()
def image_features(model: DualEncoder, images: Sequence[Image.Image]) -> Tensor:
    """Our own."""
    return model.encode_image(torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]))


@torch.no_grad()
def text_features(model: DualEncoder, tokenizer: Tokenizer, texts: Sequence[str] = TEXTS) -> Tensor:
    """Our own."""
    return model.encode_text(tokenizer(texts))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Features that are the same but for rounding, and differ from sample to sample."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= LIMIT
    assert ours.std(0).max() > 1e-3, "features that are all alike show nothing"


def reopened(folder: Path) -> Source:
    """What an export is read back as."""
    return open_source(str(folder))
