"""The code in a model card that loads an export: it runs as it is, beside the folder, with the named library alone."""

from scaleclip.exchange.source import Source
from scaleclip.exchange.transformers_folder import IMAGE, PROJECTION, TEXT
from scaleclip.models.towers import PREFIX_TOKENS, UNMASKED

_CLASS = """\
import torch
from transformers import AutoProcessor, {kind}

folder = "."  # where this file lies
model = {kind}.from_pretrained(folder).eval()
processor = AutoProcessor.from_pretrained(folder)


@torch.no_grad()
def encode_images(images):  # of PIL
    features = model.get_image_features(pixel_values=processor.image_processor(images, return_tensors="pt").pixel_values)
    return torch.nn.functional.normalize(features, dim=-1)


@torch.no_grad()
def encode_texts(texts):
    ids = processor.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return torch.nn.functional.normalize(model.get_text_features({arguments}), dim=-1)
"""

_TOWERS = """\
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPImageProcessor, {classes}

folder = "."  # where this file lies
image = {image}.from_pretrained(f"{{folder}}/{image_folder}").eval()
text = {text}.from_pretrained(f"{{folder}}/{text_folder}").eval()
projection = load_file(f"{{folder}}/{projection}")
processor, tokenizer = CLIPImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def encode_images(images):  # of PIL
    outputs = image(pixel_values=processor(images, return_tensors="pt").pixel_values)
    pooled = {pooled_image}
    return normalize({projected_image}, dim=-1)


@torch.no_grad()
def encode_texts(texts):
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    outputs = text({arguments})
    pooled = {pooled_text}
    return normalize(pooled @ projection["text_projection.weight"].T, dim=-1)
"""

_OPEN_CLIP = """\
import open_clip
import torch

folder = "."  # where this file lies
model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
model.eval()
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")


@torch.no_grad()
def encode_images(images):  # of PIL
    return model.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)


@torch.no_grad()
def encode_texts(texts):
    return model.encode_text(tokenizer(texts), normalize=True)
"""


def loader(kind: str, source: Source) -> str:
    """Code that defines `encode_images(images)` and `encode_texts(texts)`, which give features of unit length.

    Args:
        kind: the class that the export is of; `open_clip`; `two towers`.
        source: what it is of.
    """
    if kind == "open_clip":
        return _OPEN_CLIP
    text, body = source.config.text, source.model.text.body
    pad_id = body.config.pad_token_id
    masked = text.type not in UNMASKED
    arguments = f"input_ids=ids, attention_mask=(ids != {pad_id}).long()" if masked else "input_ids=ids"
    if kind != "two towers":
        return _CLASS.format(kind=kind, arguments=arguments)
    image_class, text_class = type(source.model.image.body).__name__, type(body).__name__
    states = "outputs.last_hidden_state"
    weights = f"(ids != {pad_id}).unsqueeze(-1).float()"
    text_poolings = {
        "pooler": "outputs.pooler_output",
        "cls": f"{states}[:, 0]",
        "eos": f"{states}[torch.arange(len(ids)), (ids == {body.config.eos_token_id}).int().argmax(1)]",
        "mean": f"({states} * {weights}).sum(1) / {weights}.sum(1)",
    }
    return _TOWERS.format(
        classes=", ".join(sorted({image_class, text_class})),
        image=image_class,
        text=text_class,
        image_folder=IMAGE,
        text_folder=TEXT,
        projection=PROJECTION,
        pooled_image=_image_pooling(source, states),
        projected_image='pooled @ projection["image_projection.weight"].T' if source.config.image.projection else "pooled",
        pooled_text=text_poolings[text.pooling],
        arguments=arguments,
    )


def _image_pooling(source: Source, states: str) -> str:
    image = source.config.image
    if image.pooling == "pooler":
        return "outputs.pooler_output.flatten(1)"
    if image.pooling == "cls":
        return f"{states}[:, 0]"
    patches = f"{states}[:, -{source.model.image.num_patches}:].mean(1)"  # class tokens stand in front
    if image.type in PREFIX_TOKENS:
        return patches
    return f"{states}.mean((-2, -1)) if {states}.dim() == 4 else {patches}"
