"""Tiny models of the real architectures, to try the caption jobs without a download: what they write is nonsense.

python tools/tiny_captioners.py rewriter FOLDER     a LlamaForCausalLM that has seen the demo's captions for some seconds
python tools/tiny_captioners.py captioner FOLDER    a LlavaForConditionalGeneration of random weights, with its processor
"""

import argparse
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from arguments import natural
from scaleclip.files import resolve_path

START, END, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
WORDS = ("a picture of a thing", "the red and blue dog on the cat tree", "house with sun and moon in other words", "one line")
VARIED = 0.4  # spread of random weights at which texts differ
CHAT = (
    "{% for m in messages %}<s>[{{ m['role'] }}]{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in "
    "m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}\n{{ c['text'] }}{% endif %}{% endfor %}{% endif %}</s>"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["rewriter", "captioner"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=natural, default=200, help="that the rewriter is taught for (default: 200)")
    options = parser.parse_args(arguments)
    if options.kind == "rewriter":
        lines = demo_captions()
        tiny_llama(options.folder, lines=lines, steps=options.steps, width=64)
    else:
        tiny_llava(options.folder)
    print(f"{options.folder}: writes nonsense")


def demo_captions(number: int = 1000) -> list[str]:
    """Keywords of some of the demo's pictures, of one word to a dozen."""
    found: list[str] = []
    for path in sorted(Path(resolve_path("package:scaleclip/data/demo/train")).glob("*.tar")):
        with tarfile.open(path) as tar:
            members = (tar.extractfile(member) for member in tar if member.name.endswith(".json"))
            fields = (json.loads(file.read())["captions"] for file in members if file)
            found += [captions["keywords"] for captions in fields if captions.get("keywords")]
        if len(found) >= number:
            break
    return found[:number]


def byte_tokenizer(texts: Sequence[str] = WORDS, vocabulary: int = 400, *, chat: bool = False) -> Any:
    """Byte pairs over some texts, with tokens that start, end, pad, and stand for an image."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [START, END, PAD, IMAGE]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([f" {text}" for text in texts], trainer)
    backend.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=START, eos_token=END, pad_token=PAD, additional_special_tokens=[IMAGE],
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


def tiny_llama(
    folder: Path,
    *,
    lines: Sequence[str] = (),
    steps: int = 0,
    chat: bool = False,
    width: int = 32,
    layers: int = 2,
    heads: int = 2,
    seed: int = 0,
) -> Path:
    """Make a folder with a LlamaForCausalLM of random weights; `steps` of training on `lines` teach it to end them.

    `heads` of its four attention heads have keys and values of their own.
    """
    tokenizer = byte_tokenizer(lines or WORDS, chat=chat)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=heads, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1,
        pad_token_id=2, initializer_range=0.02 if steps else VARIED,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    _teach(model, tokenizer, lines, steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_llava(folder: Path, *, chat: bool = False, seed: int = 0) -> Path:
    """Make a folder with a LlavaForConditionalGeneration of random weights and its processor, for images of 28 px."""
    tokenizer = byte_tokenizer(chat=chat)
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=VARIED,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14,
        initializer_range=VARIED,
    )  # fmt: skip
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(LlavaConfig(vision, text, image_token_index=image, image_seq_length=4))
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT if chat else None,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _teach(model: Any, tokenizer: Any, lines: Sequence[str], steps: int) -> None:
    """A few steps on lines, each behind a label and with its end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(lines), (16,), generator=generator).tolist()
        batch = tokenizer([f"\nOutput: {lines[place]}\n" for place in chosen], return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
