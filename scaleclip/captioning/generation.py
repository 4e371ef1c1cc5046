"""How a model of transformers makes texts, a batch at a time."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad as pad_with
from transformers import GenerationConfig

from scaleclip.errors import RunError

_BETWEEN_LEAVES = 16  # tokens


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 0.9
    """0: the likeliest token each time."""
    top_p: float = 0.95
    """Tokens are drawn among the likeliest that have this probability together."""
    max_tokens: int = 77
    """Of a text."""

    def as_json(self) -> dict[str, Any]:
        """Of a greedy choice the number of tokens alone matters."""
        return asdict(self) if self.temperature else {"temperature": 0, "max_tokens": self.max_tokens}


class Written(NamedTuple):
    """A text of a model."""

    text: str
    """Without white space at its ends."""
    tokens: int
    """Made, the one that ended it included."""
    ended: bool
    """Whether the model ended it, and not `max_tokens`."""


def generate(
    model: Any,
    inputs: Mapping[str, Any],
    sampling: Sampling,
    seed: int,
    ends: Sequence[int],
    pad: int,
    criteria: Sequence[Any] = (),
    stops: Set[int] = frozenset(),
) -> list[list[int]]:
    """Ids of each new text, what follows its end included.

    Args:
        model: of transformers.
        inputs: what it takes, [B, T] `input_ids` among it. With `past_key_values`, a DynamicCache, texts that have ended leave
            the batch now and then, so that a long one does not keep all of them.
        sampling: of the tokens.
        seed: of their draw.
        ends: tokens that end a text.
        pad: the token behind it.
        criteria: what else ends a text, as transformers has it.
        stops: tokens at which `criteria` end one.

    Raises:
        RunError: the GPU's memory is full.
    """
    torch.manual_seed(seed)
    rows = list(range(len(inputs["input_ids"])))
    made = [list[int]() for _ in rows]
    left = sampling.max_tokens
    while rows:
        num_new = min(_BETWEEN_LEAVES, left) if "past_key_values" in inputs else left
        out = _go_on(model, inputs, sampling, num_new, ends, pad, criteria)
        new = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        for row, ids in zip(rows, new, strict=True):
            made[row] += ids
        left -= num_new
        stay = [place for place, ids in enumerate(new) if left and stops.isdisjoint(ids) and not set(ends) & set(ids)]
        rows = [rows[place] for place in stay]
        if rows:
            chosen = torch.tensor(stay, device=out.sequences.device)
            out.past_key_values.batch_select_indices(chosen)
            inputs = {
                "input_ids": out.sequences[chosen], "past_key_values": out.past_key_values,
                "attention_mask": pad_with(inputs["attention_mask"][chosen], (0, num_new), value=1),
            }  # fmt: skip
    return made


def _go_on(
    model: Any,
    inputs: Mapping[str, Any],
    sampling: Sampling,
    num_new: int,
    ends: Sequence[int],
    pad: int,
    criteria: Sequence[Any],
) -> Any:
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=num_new, eos_token_id=list(ends) or None, pad_token_id=pad, use_cache=True, return_dict_in_generate=True,
        **(drawn if sampling.temperature else {"do_sample": False}),
    )  # fmt: skip
    try:
        # the folder's own settings, such as a penalty of repetitions, would be nobody's choice
        return model.generate(**inputs, generation_config=config, stopping_criteria=list(criteria), use_model_defaults=False)
    except torch.cuda.OutOfMemoryError as error:
        raise RunError(
            f"the GPU's memory does not hold a batch of {len(inputs['input_ids'])}: lower --batch; {error}"
        ) from error


def written(tokenizer: Any, ids: Sequence[int], ends: Sequence[int], ends_line: set[int]) -> Written:
    """A text from its ids, up to the first that ends it, or that ends a line."""
    stop = next((place for place, token in enumerate(ids) if token in ends or token in ends_line), None)
    kept = ids if stop is None else ids[: stop + 1]
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Written(text.strip(" "), len(kept), stop is not None)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a text of this model."""
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def pad_token(tokenizer: Any, ends: Sequence[int]) -> int:
    """A token to fill with; any will do, it is masked."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return ends[0] if ends else 0
