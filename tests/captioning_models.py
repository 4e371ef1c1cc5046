"""The tiny models of tools/tiny_captioners.py, one that says nothing, and one with a tokenizer like LLaMA's."""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AddedToken, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from tiny_captioners import (  # found by the line above
    END,
    IMAGE,
    START,
    VARIED,
    byte_tokenizer,
    demo_captions,
    tiny_llama,
    tiny_llava,
)

__all__ = [
    "END",
    "IMAGE",
    "START",
    "byte_tokenizer",
    "demo_captions",
    "lines_llama",
    "pieces_llama",
    "silent_llama",
    "tiny_llama",
    "tiny_llava",
]


def silent_llama(folder: Path) -> Path:
    """A folder with a model that ends every text at once."""
    tiny_llama(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    torch.nn.init.zeros_(model.lm_head.weight)  # all logits are alike, and the first token is the likeliest
    model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    return folder


def lines_llama(folder: Path) -> Path:
    """A folder with a tokenizer that adds line ends as tokens of their own, as Gemma's do."""
    tiny_llama(folder)
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(lines, normalized=False, special=False) for lines in ("\n", "\n\n")])
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pieces_llama(folder: Path) -> Path:
    """A folder with a tokenizer like LLaMA's: a space before all, line ends and rare characters as bytes, no padding token."""
    vocabulary = {token: number for number, token in enumerate(("<unk>", START, END))}
    letters = "\u2581abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:-=><'"
    for token in (*(f"<0x{byte:02X}>" for byte in range(256)), *letters):
        vocabulary[token] = len(vocabulary)
    merges = [
        ("\u2581", "a"),
        ("\u2581", "d"),
        ("o", "g"),
        ("\u2581d", "og"),
        ("u", "t"),
        ("O", "ut"),
        ("p", "ut"),
        ("Out", "put"),
    ]
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=START, eos_token=END, unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=VARIED, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
