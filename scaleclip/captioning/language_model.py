"""A causal language model that writes lines: left padding, a prefix that all of a batch share, a stop at the line's end.

Dimensions: B texts, P tokens of a prefix, T tokens of all, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from scaleclip.captioning.chat import turn
from scaleclip.captioning.generation import Sampling, Written, end_tokens, generate, pad_token, written
from scaleclip.captioning.prefix_cache import prefix_cache
from scaleclip.captioning.pretrained import DType, load, load_model
from scaleclip.errors import ConfigError

_MARKS = frozenset("<>[]{}|")
_ANCHOR = "a"  # what a text that goes on is put behind
_PLACE = "CAPTION-PROMPT-GOES-HERE"


class LanguageModel:
    """A causal language model and its tokenizer.

    Args:
        folder: of transformers.
        dtype: of the weights; `auto` is bfloat16 on a GPU, else float32.
        device: where it runs.
        chat: whether prompts are a turn of a chat; None: where the tokenizer has a template for one.

    Raises:
        ConfigError: the folder holds no such model, or no chat template that was asked for.
    """

    def __init__(self, folder: Path, dtype: DType, device: torch.device, *, chat: bool | None = None) -> None:
        self.tokenizer = load(AutoTokenizer, folder)
        self.model = load_model(AutoModelForCausalLM, folder, dtype, device)
        self.chat = bool(self.tokenizer.chat_template) if chat is None else chat
        if self.chat and not self.tokenizer.chat_template:
            raise ConfigError(
                f"{folder} has no chat template: leave out --chat, or put a chat_template.jinja beside its tokenizer"
            )
        self.frame: tuple[Sequence[int], Sequence[int]]
        self.frame = _chat_frame(self.tokenizer) if self.chat else (_start_tokens(self.tokenizer), [])
        # some tokenizers add line ends, letters or words of a field, which are no structure
        added = self.tokenizer.added_tokens_decoder.items()
        self._special = {token for token, word in added if word.special or not _is_text(word.content)}
        self._ends = end_tokens(self.model, self.tokenizer)
        self._pad = pad_token(self.tokenizer, self._ends)
        lines = self.tokenizer.batch_decode([[token] for token in range(self._size)])
        ends_line = [_has_line_end(text) for text in lines]
        self._line_ends = {token for token, ends in enumerate(ends_line) if ends}
        self._ends_line_V = torch.tensor(ends_line, device=device)

    @property
    def dtype(self) -> str:
        """Of the weights."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def max_positions(self) -> int | None:
        """Tokens of prompt and text that the model can take, where it says so."""
        positions: int | None = getattr(self.model.config, "max_position_embeddings", None)
        return positions

    @property
    def _size(self) -> int:
        """Logits, of which there may be more than tokens."""
        return int(max(len(self.tokenizer), self.model.get_output_embeddings().weight.shape[0]))

    def plain(self, text: str) -> list[int]:
        """Ids of a text of which nothing is a special token; what a tokenizer cannot but read as one is left out."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [token for token in ids if token not in self._special]

    def read(self, ids: Sequence[int]) -> str:
        """The text of some ids."""
        text: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    def going_on(self, text: str) -> list[int]:
        """Ids of a text behind another one: no tokenizer then takes its start for that of a word or of all."""
        anchor, whole = self.plain(_ANCHOR), self.plain(_ANCHOR + text)
        return whole[len(anchor) :] if whole[: len(anchor)] == anchor else self.plain(text)

    @torch.inference_mode()
    def write_lines(
        self,
        prefix: Sequence[int],
        endings: Sequence[Sequence[int]],
        sampling: Sampling,
        seed: int,
        *,
        share_prefix: bool = True,
    ) -> list[Written]:
        """A line for each ending, as they follow the prefix.

        Args:
            prefix: [P] ids.
            endings: [B] ids of texts of any length.
            sampling: of the tokens.
            seed: of their draw.
            share_prefix: compute the prefix once, where the model's cache can be repeated; the texts are the same.
        """
        device = self.model.device
        longest = max(map(len, endings))
        cache = prefix_cache(self.model, prefix) if share_prefix and prefix else None
        # positions count what is not masked: padding may lie before a prefix, or behind one that all share
        before, head = ([], list(prefix)) if cache is None else (list(prefix), [])
        rows, masks = [], []
        for ending in endings:
            num_padding = longest - len(ending)
            rows.append([*before, *[self._pad] * num_padding, *head, *ending])
            masks.append([*[1] * len(before), *[0] * num_padding, *[1] * (len(head) + len(ending))])
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor(rows, device=device), "attention_mask": torch.tensor(masks, device=device),
        }  # fmt: skip
        if cache is not None:
            inputs["past_key_values"] = cache
        end_of_line = [_EndOfLine(self._ends_line_V)]
        made = generate(self.model, inputs, sampling, seed, self._ends, self._pad, end_of_line, self._line_ends)
        return [_first_line(written(self.tokenizer, ids, self._ends, self._line_ends)) for ids in made]


class _EndOfLine:
    """Stops a text at the token that has a line end; a criterion of transformers."""

    def __init__(self, ends_line_V: Tensor) -> None:
        self._ends_line_V = ends_line_V

    def __call__(self, ids_BT: Tensor, scores: Any, **_: Any) -> Tensor:
        return self._ends_line_V[ids_BT[:, -1]]


def _first_line(written: Written) -> Written:
    return written._replace(text=next(iter(written.text.splitlines()), "").strip())


def _is_text(added: str) -> bool:
    """Whether an added token is no markup, as `<think>` or `[INST]` are."""
    return not _MARKS.intersection(added)


def _has_line_end(text: str) -> bool:
    return len(f"{text}x".splitlines()) > 1


def _start_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text."""
    made = tokenizer(_ANCHOR, return_special_tokens_mask=True)
    special = made["special_tokens_mask"]
    return list(made["input_ids"][: special.index(0) if 0 in special else 0])


def _chat_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What stands before and after what a user says, up to where the assistant is to speak."""
    before, place, after = turn(tokenizer, _PLACE, "give --no-chat, or take another model").partition(_PLACE)
    if not place:
        raise ConfigError("the chat template leaves out what the user says: give --no-chat")
    first, last = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))
    return first, last
