"""A vision-language model that writes about images."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from scaleclip.captioning.chat import turn
from scaleclip.captioning.generation import Sampling, Written, end_tokens, generate, pad_token, written
from scaleclip.captioning.pretrained import DType, load, load_model
from scaleclip.errors import ConfigError


class VisionLanguageModel:
    """An image-text-to-text model and its processor.

    Args:
        folder: of transformers.
        prompt: what is asked of every image.
        dtype: of the weights; `auto` is bfloat16 on a GPU, else float32.
        device: where it runs.

    Raises:
        ConfigError: the folder holds no such model, or the prompt cannot be asked of one image.
    """

    def __init__(self, folder: Path, prompt: str, dtype: DType, device: torch.device) -> None:
        self.processor = load(AutoProcessor, folder)
        self.model = load_model(AutoModelForImageTextToText, folder, dtype, device)
        tokenizer = getattr(self.processor, "tokenizer", None)
        if tokenizer is None or getattr(self.processor, "image_processor", None) is None:
            raise ConfigError(
                f"{folder} has no processor of images and texts: put preprocessor_config.json and a tokenizer there"
            )
        tokenizer.padding_side = "left"
        self.asked = _ask(self.processor, prompt, folder)
        """The prompt as the model reads it, with its token of an image."""
        self._ends = end_tokens(self.model, tokenizer)
        self._pad = pad_token(tokenizer, self._ends)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(self._pad)

    @property
    def dtype(self) -> str:
        """Of the weights."""
        return str(self.model.dtype).removeprefix("torch.")

    def inputs(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What the model takes for some images; whatever the processor raises of one that it cannot take."""
        # some processors take a flat list for the images of one text
        each_its_own = [[image] for image in images]
        made = self.processor(text=[self.asked] * len(images), images=each_its_own, return_tensors="pt", padding=True)
        # which some tokenizers make, and few models take
        unused = {"token_type_ids"} - inspect.signature(self.model.forward).parameters.keys()
        return {name: value for name, value in made.items() if name not in unused}

    @torch.inference_mode()
    def write(self, inputs: Mapping[str, Tensor], sampling: Sampling, seed: int) -> list[Written]:
        """A text for each image of some inputs."""
        device, dtype = self.model.device, self.model.dtype
        placed = {
            name: value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
            for name, value in inputs.items()
        }
        made = generate(self.model, placed, sampling, seed, self._ends, self._pad)
        texts = (written(self.processor.tokenizer, ids, self._ends, set()) for ids in made)
        return [each._replace(text=each.text.strip()) for each in texts]


def _ask(processor: Any, prompt: str, folder: Path) -> str:
    token = _content(getattr(processor, "image_token", None) or getattr(processor.tokenizer, "image_token", None))
    # Gemma 3's templates have the one, and its processor puts in the others
    begins = _content(getattr(processor, "boi_token", None))
    for stands_for_image in (token, begins):
        if stands_for_image and stands_for_image in prompt:
            raise ConfigError(
                f"--prompt={prompt!r} has {stands_for_image}, which stands for an image: leave it out, each image is put in"
            )
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    if getattr(processor, "chat_template", None):
        asked = turn(processor, content, "take another model")
    elif token and processor.tokenizer.chat_template:
        asked = _by_tokenizer(processor.tokenizer, token, content, prompt)
    elif token:
        asked = f"USER: {token}\n{prompt} ASSISTANT:"  # LLaVA-1.5's
    else:
        raise ConfigError(f"{folder} has no chat template and no token of an image: put a chat_template.jinja there")
    if begins and begins in asked:
        token = begins
    if token and asked.count(token) != 1:
        raise ConfigError(f"{folder}: its chat template makes {asked.count(token)} images of one: {asked!r}")
    start = processor.tokenizer.bos_token
    # which many a template has, and the tokenizer puts there again
    if start and processor.tokenizer("a")["input_ids"][0] == processor.tokenizer.bos_token_id:
        asked = asked.removeprefix(start)
    return asked


def _by_tokenizer(tokenizer: Any, token: str, content: Any, prompt: str) -> str:
    """By a template that lies with the tokenizer: it takes parts, as a processor's does, or text alone."""
    way_out = "put a chat_template.jinja for its processor into the folder"
    try:
        asked = turn(tokenizer, content, way_out)
    except ConfigError:
        asked = ""
    # one for text writes the parts down as Python has them
    return asked if token in asked else turn(tokenizer, f"{token}\n{prompt}", way_out)


def _content(token: Any) -> str | None:
    """Of a token that a processor may hold as text or, as BLIP-2's, as an AddedToken."""
    return None if token is None else str(getattr(token, "content", token))
