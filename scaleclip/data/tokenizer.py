"""Texts to token ids: CLIP's byte-pair encoding with its own or the demo's vocabulary, or a tokenizer from a folder.

A shipped vocabulary is a merge a line ("t he</w>"), the most frequent first. Tokens are numbered as CLIP's
(arXiv:2103.00020): 256 bytes, 256 bytes that end a word, the merges, start, end. Every byte is a token, so every text
can be encoded.
"""

import html
import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import ftfy
import numpy as np
import tokenizers
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from scaleclip.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHIPPED = ("clip", "demo")
"""Names of the vocabularies that need no folder."""
TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
"""Patterns of the files that transformers reads of a tokenizer's folder."""
START, END = "<start_of_text>", "<end_of_text>"
WORD_END = "</w>"
# English contractions, letters, single digits, the rest; what lies between words is dropped
WORDS = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
Keep = Literal["first", "random", "block"]
# what `clean` makes of usual texts, as rules for transformers (`fast_tokenizer`): doubled entities first
_ENTITIES = {
    "&amp;amp;": "&amp;",
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
    "&quot;": '"',
    "&apos;": "'",
    "&#39;": "'",
    "&nbsp;": " ",
}
_CHARACTERS = {
    "[\u02bc\u2018-\u201b]": "'", "[\u201c-\u201f]": '"', "\u0132": "IJ", "\u0133": "ij", "\ufb00": "ff", "\ufb01": "fi",
    "\ufb02": "fl", "\ufb03": "ffi", "\ufb04": "ffl",
}  # fmt: skip


class Tokenizer:
    """Texts -> ids (int64), with start and end tokens, cut and padded. Can be pickled.

    The words "<end_of_text>" in a caption are words here; open_clip makes them the end token, and the tower stops reading.
    """

    def __init__(
        self,
        name: str,
        backend: tokenizers.Tokenizer,
        context_length: int,
        start_id: int | None,
        end_id: int,
        pad_id: int,
        clean_texts: bool,
    ) -> None:
        self.name = name
        self.size: int = backend.get_vocab_size()
        self.context_length = context_length
        self.start_id, self.end_id, self.pad_id = start_id, end_id, pad_id
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._clean_texts = clean_texts
        special = backend.encode("a").special_tokens_mask
        self._num_before = special.index(0)
        self._num_after = special[::-1].index(0)

    def __call__(
        self,
        texts: Sequence[str],
        *,
        max_tokens: int | None = None,
        keep: Keep = "first",
        randoms: Sequence[np.random.Generator] | None = None,
    ) -> Tensor:
        """Ids [len(texts), max_tokens].

        Args:
            texts: of any length.
            max_tokens: tokens of a text, the start and end tokens included; none: the context length.
            keep: which tokens between start and end stay of a text that is too long: the first, a random choice in their
                order, or a random block (CLIPS, arXiv:2411.16828).
            randoms: one a text, for what is random; a text that is short enough takes nothing from its own.
        """
        length = max_tokens or self.context_length
        # one by one: encode_batch starts threads, which the loader's processes must not
        rows = [self._backend.encode(clean(text) if self._clean_texts else text).ids for text in texts]
        for i, ids in enumerate(rows):
            if len(ids) > length:
                rows[i] = self._shorten(ids, length, keep, randoms[i] if randoms else None)
            else:
                ids.extend([self.pad_id] * (length - len(ids)))
        return torch.tensor(rows, dtype=torch.int64).view(len(texts), length)

    def texts(self, tokens_BT: Tensor) -> list[str]:
        """The words of ids, without start, end and padding; as this tokenizer writes them, so in lower case for CLIP's."""
        rows = []
        for ids in tokens_BT.tolist():
            ids = ids[1:] if ids[:1] == [self.start_id] else ids
            rows.append(self._backend.decode(ids[: ids.index(self.end_id)] if self.end_id in ids else ids))
        return [row.strip() for row in rows]

    def _shorten(self, ids: list[int], length: int, keep: Keep, random: np.random.Generator | None) -> list[int]:
        room = length - self._num_before - self._num_after
        stop = len(ids) - self._num_after
        start, body, end = ids[: self._num_before], ids[self._num_before : stop], ids[stop:]
        if keep == "first":
            return start + body[:room] + end
        assert random is not None, f"keep={keep} draws from a generator a text"
        if keep == "block":
            first = int(random.integers(len(body) - room + 1))
            return start + body[first : first + room] + end
        chosen = np.sort(random.permutation(len(body))[:room])
        return start + [body[i] for i in chosen] + end


def load_tokenizer(name: str, context_length: int) -> Tokenizer:
    """The tokenizer of `model.text.tokenizer`: `clip`, `demo` or a folder that transformers' AutoTokenizer reads.

    Raises:
        ConfigError: no such tokenizer, or it has no token for the end of a text or for padding.
    """
    if name in SHIPPED:
        backend = _shipped_backend(name)
        end_id = backend.get_vocab_size() - 1
        return Tokenizer(name, backend, context_length, start_id=end_id - 1, end_id=end_id, pad_id=0, clean_texts=True)
    return _load_folder(name, context_length)


def fast_tokenizer(name: str, context_length: int) -> "PreTrainedTokenizerFast":
    """The same tokenizer for transformers, with the same ids.

    A shipped one cleans texts as `clean` does, by rules that a tokenizer.json can hold: the usual HTML entities, curly quotes,
    ligatures, composed characters, lower case. What ftfy alone mends, wrongly decoded text, it does not.

    Raises:
        ConfigError: see `load_tokenizer`.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    ours = load_tokenizer(name, context_length)
    if name not in SHIPPED:
        tokenizer = AutoTokenizer.from_pretrained(str(Path(name).expanduser()), local_files_only=True)
        tokenizer.model_max_length, tokenizer.padding_side, tokenizer.truncation_side = context_length, "right", "right"
        return tokenizer
    backend = _shipped_backend(name)
    replaced = [*_ENTITIES.items(), *((Regex(characters), plain) for characters, plain in _CHARACTERS.items())]
    steps = [normalizers.Replace(found, plain) for found, plain in replaced]
    backend.normalizer = normalizers.Sequence([*steps, normalizers.NFC(), normalizers.Lowercase()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=START,
        eos_token=END,
        pad_token=backend.id_to_token(ours.pad_id),
        model_max_length=context_length,
        # the names of special tokens are words in a caption
        split_special_tokens=True,
    )


def clean(text: str) -> str:
    """A caption as CLIP reads it: mended encoding, HTML entities (even doubled) resolved, single spaces, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def base_tokens() -> list[str]:
    """The 512 tokens below the merges: bytes in CLIP's order, written as printable characters, then the word endings."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return characters + [character + WORD_END for character in characters]


def byte_pair_backend(merges: Sequence[tuple[str, str]]) -> tokenizers.Tokenizer:
    """A byte-pair tokenizer without truncation and padding."""
    tokens = [*base_tokens(), *(left + right for left, right in merges), START, END]
    ids = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(ids, list(merges), end_of_word_suffix=WORD_END))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(WORDS, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # the byte-level alphabet's sign for a space
    backend.decoder = decoders.Sequence([decoders.Replace(WORD_END, "Ġ"), decoders.ByteLevel()])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, ids[START]), (END, ids[END])]
    )
    return backend


def _shipped_backend(name: str) -> tokenizers.Tokenizer:
    path = importlib.resources.files("scaleclip").joinpath(f"data/vocabularies/{name}_merges.txt")
    merges = [(left, right) for left, right in (line.split(" ") for line in path.read_text(encoding="utf-8").splitlines())]
    return byte_pair_backend(merges)


def _load_folder(name: str, context_length: int) -> Tokenizer:
    # seconds to import, and the shipped vocabularies need none of it
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"model.text.tokenizer={name!r} is neither a folder nor one of {', '.join(SHIPPED)}")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        # without them transformers guesses a tokenizer from the folder's name
        if not (folder / file).is_file():
            raise ConfigError(f"model.text.tokenizer={name}: no {file} in it; save it with a fast tokenizer of transformers")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.text.tokenizer={name}: transformers cannot read it: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(f"model.text.tokenizer={name}: its class has no fast variant in transformers")
    start_id = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    end_id = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if end_id is None or tokenizer.pad_token_id is None:
        raise ConfigError(f"model.text.tokenizer={name}: its config needs a pad_token and an eos_token (or sep_token)")
    backend, pad_id = tokenizer.backend_tokenizer, tokenizer.pad_token_id
    backend.no_padding()  # which sentence encoders' files have, and which would hide the end token
    if backend.encode("a").ids[-1:] != [end_id]:
        raise ConfigError(
            f"model.text.tokenizer={name}: its texts do not end in token {end_id}; give tokenizer.json a post_processor"
        )
    return Tokenizer(name, backend, context_length, start_id, end_id, pad_id, clean_texts=False)
