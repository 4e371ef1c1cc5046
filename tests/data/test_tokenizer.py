import pickle
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from scaleclip.config import TextTowerConfig
from scaleclip.config_io import load_config, preset_names
from scaleclip.data.tokenizer import Keep, load_tokenizer
from scaleclip.errors import ConfigError
from scaleclip.models.towers import build_text_tower, check_tokenizer

ODD_CAPTIONS = [
    "",
    " \t\n ",
    "a photo of a cat",
    "IT'S  what I'LL say, we've 'SSS don''t \u2019re '\u017f",
    "&amp;lt;b&gt; caf&eacute; &#128512; &amp;amp;amp;",
    "1 < 2 &amp;lt; 3",  # ftfy leaves entities alone where it sees a "<"
    "\u00dcn\u00efc\u00f6de \u0130stanbul \u0152UVRE stra\u00dfe \ufb01ve \u00bd \u00b2 \u216b \u2460 \u0663",
    "e\u0301 decomposed, \u00e9 composed",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea\U0001f44d\U0001f3fd",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \u6f22\u5b57",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u0e01\u0e47 \u0939\u093f\u0928\u094d\u0926\u0940",
    "nul\x00 bell\x07 fs\x1c nel\x85 ls\u2028 bom\ufeff zwsp\u200b nbsp\u00a0",
    "mojibake \u00e2\u20ac\u0153quote\u00e2\u20ac\u009d \u00c3\u00a9",
    "12,345.67$ --- ... _under_score_ C:\\x </w> t</w>",
    "\U0010ffff \U000e0041 \ufffd",
    "x" * 3000,
    "word " * 300,
    "IMG_20190412.jpg http://example.com/?a=1&b=2",
]


def test_clip_ids_are_open_clips() -> None:
    theirs, ours = open_clip.get_tokenizer("ViT-B-32"), load_tokenizer("clip", 77)
    for caption in ODD_CAPTIONS:
        assert torch.equal(ours([caption]), theirs([caption])), ascii(caption)
    assert (ours.size, ours.start_id, ours.end_id, ours.pad_id) == (49408, 49406, 49407, 0)
    short = load_tokenizer("clip", 5)(ODD_CAPTIONS)
    assert torch.equal(short, theirs(ODD_CAPTIONS, context_length=5))


def test_literal_special_tokens_are_text() -> None:
    tokenizer = load_tokenizer("clip", 77)
    ids = tokenizer(["a <end_of_text> b <START_OF_TEXT>"])[0].tolist()
    assert ids.count(tokenizer.end_id) == ids.count(tokenizer.start_id) == 1


@pytest.mark.parametrize("name", ["clip", "demo"])
def test_every_text_keeps_its_shape_and_bytes(name: str) -> None:
    tokenizer = load_tokenizer(name, 64)
    ids = tokenizer(ODD_CAPTIONS)
    assert ids.dtype == torch.int64
    assert ids.shape == (len(ODD_CAPTIONS), 64)
    assert (ids[:, 0] == tokenizer.start_id).all()
    assert ((ids == tokenizer.end_id).sum(1) == 1).all()
    assert ids.max() < tokenizer.size
    distinct = {tuple(row) for row in ids[2:].tolist()}
    assert len(distinct) == len(ODD_CAPTIONS) - 2
    assert tokenizer([]).shape == (0, 64)


def test_demo_vocabulary_is_small_and_fits_its_captions() -> None:
    tokenizer = load_tokenizer("demo", 16)
    assert (tokenizer.size, tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id) == (4096, 4094, 4095, 0)
    assert tokenizer(["grinning face with smiling eyes"])[0].ne(0).sum() == 7


LONG = " ".join(f"{word}{number}" for number in range(30) for word in ("cat", "dog"))
ALL_MANNERS = pytest.mark.parametrize("keep", ["first", "random", "block"])


def generators(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, i]) for i in range(count)]


def body(row: torch.Tensor) -> list[int]:
    """The tokens between start and end."""
    ids = [int(i) for i in row]
    return ids[1 : ids.index(4095)]


@ALL_MANNERS
@pytest.mark.parametrize("budget", [3, 20, None])
def test_a_budget_keeps_start_and_end(keep: Keep, budget: int | None) -> None:
    tokenizer = load_tokenizer("demo", 40)
    texts = ["", "cat", LONG, "a b c d e f g h i j k l m n o p q r s", LONG]
    ids = tokenizer(texts, max_tokens=budget, keep=keep, randoms=generators(5))
    length = budget or 40
    assert ids.shape == (5, length)
    assert (ids[:, 0] == tokenizer.start_id).all()
    assert ((ids == tokenizer.end_id).sum(1) == 1).all()
    whole = load_tokenizer("demo", 1000)(texts)
    for row, full in zip(ids, whole, strict=True):
        assert len(body(row)) == min(len(body(full)), length - 2)
        if len(body(full)) <= length - 2:
            assert torch.equal(row, full[:length])


def test_the_first_tokens_are_those_of_a_shorter_context() -> None:
    tokenizer = load_tokenizer("clip", 77)
    assert torch.equal(tokenizer(ODD_CAPTIONS, max_tokens=9), load_tokenizer("clip", 9)(ODD_CAPTIONS))


def test_a_block_starts_anywhere_with_equal_chance() -> None:
    tokenizer = load_tokenizer("demo", 40)
    text = "a b c d e f g h i j k l"
    full = body(load_tokenizer("demo", 1000)([text])[0])
    assert len(set(full)) == 12
    rows = tokenizer([text] * 4000, max_tokens=10, keep="block", randoms=generators(4000))
    starts = torch.tensor([full.index(body(row)[0]) for row in rows])
    assert all(body(row) == full[start : start + 8] for row, start in zip(rows, starts, strict=True))
    counts = torch.bincount(starts, minlength=5)
    # five standard deviations
    assert len(counts) == 5
    assert ((counts - 800).abs() < 5 * (4000 * 0.2 * 0.8) ** 0.5).all()


def test_a_random_choice_takes_every_token_with_equal_chance_and_in_order() -> None:
    tokenizer = load_tokenizer("demo", 40)
    text = "a b c d e f g h i j k l"
    full = body(load_tokenizer("demo", 1000)([text])[0])
    rows = tokenizer([text] * 4000, max_tokens=5, keep="random", randoms=generators(4000))
    places = [[full.index(token) for token in body(row)] for row in rows]
    assert all(len(set(each)) == 3 and each == sorted(each) for each in places)
    counts = torch.bincount(torch.tensor(places).flatten(), minlength=12)
    assert ((counts - 1000).abs() < 5 * (4000 * 0.25 * 0.75) ** 0.5).all()
    assert len({tuple(each) for each in places}) == 220, "of 12 tokens, every choice of 3 comes up"


@pytest.mark.parametrize("keep", ["random", "block"])
def test_what_is_random_comes_from_the_texts_own_generators(keep: Keep) -> None:
    tokenizer = load_tokenizer("demo", 12)
    alone = torch.cat([tokenizer([LONG], keep=keep, randoms=[random]) for random in generators(3)])
    assert torch.equal(tokenizer([LONG] * 3, keep=keep, randoms=generators(3)), alone)
    assert not torch.equal(tokenizer([LONG] * 3, keep=keep, randoms=generators(3, seed=1)), alone)
    short, reference = generators(1), generators(1)
    tokenizer(["cat"], keep=keep, randoms=short)
    assert short[0].random() == reference[0].random()


@pytest.mark.parametrize(("kind", "pooling"), [("clip_text_model", "eos"), ("clip_text_model", "pooler"), ("bert", "mean")])
def test_a_tower_sees_the_same_text_in_fewer_columns(kind: str, pooling: str) -> None:
    tokenizer = load_tokenizer("demo", 40)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 4096, "bos_token_id": 4094, "eos_token_id": 4095, "pad_token_id": 0}
    tower = build_text_tower(
        TextTowerConfig(type=kind, pooling=pooling, context_length=40, config=sizes | tokens), False
    ).eval()
    texts = ["a cat", "grinning face with smiling eyes"]
    narrow, wide = tower(tokenizer(texts, max_tokens=16)), tower(tokenizer(texts))
    torch.testing.assert_close(narrow.pooled_BD, wide.pooled_BD)


@pytest.mark.parametrize("name", ["clip", "demo"])
def test_ids_are_words_again(name: str) -> None:
    tokenizer = load_tokenizer(name, 40)
    texts = ["a photo of a cat, isn't it", "café ☕ in münchen", "", "one"]
    assert tokenizer.texts(tokenizer(texts)) == ["a photo of a cat , isn 't it", "café ☕ in münchen", "", "one"]
    assert tokenizer.texts(tokenizer(["cut off"])[:, 1:3]) != [""], "without start and end token"


def test_pickling_keeps_the_ids() -> None:
    tokenizer = load_tokenizer("demo", 20)
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(ODD_CAPTIONS), tokenizer(ODD_CAPTIONS))


@pytest.mark.parametrize("name", preset_names())
def test_presets_fit_their_tokenizers(name: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"model: {name}")
    text = load_config(tmp_path / "run.yaml").model.text
    tokenizer = load_tokenizer(text.tokenizer, text.context_length)
    check_tokenizer(text, tokenizer.size, tokenizer.end_id, tokenizer.pad_id)


def save_folder(folder: Path, ends: bool = True, **special: str) -> str:
    ids = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "cat": 4, "a": 5}
    backend = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        special_tokens = [("[CLS]", 1), ("[SEP]", 2)]
        backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special_tokens)
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special).save_pretrained(str(folder))
    return str(folder)


def test_a_folder_of_transformers(tmp_path: Path) -> None:
    name = save_folder(tmp_path, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    tokenizer = load_tokenizer(name, 6)
    assert (tokenizer.size, tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id) == (6, 1, 2, 0)
    assert tokenizer(["a cat", "a a a a dog cat"]).tolist() == [[1, 5, 4, 2, 0, 0], [1, 5, 5, 5, 5, 2]]
    assert tokenizer(["a a cat", "dog"], max_tokens=4).tolist() == [[1, 5, 5, 2], [1, 3, 2, 0]]
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(["a cat"]), tokenizer(["a cat"]))


def test_a_folder_that_pads_and_cuts_by_itself(tmp_path: Path) -> None:
    """As those of sentence encoders do."""
    name = save_folder(tmp_path, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    backend = Tokenizer.from_file(f"{name}/tokenizer.json")
    backend.enable_padding(length=8)
    backend.enable_truncation(max_length=3)
    backend.save(f"{name}/tokenizer.json")
    assert load_tokenizer(name, 6)(["a cat a"]).tolist() == [[1, 5, 4, 5, 2, 0]]


def test_faults_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'clop' is neither a folder nor one of clip, demo"):
        load_tokenizer("clop", 77)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json in it"):
        load_tokenizer(str(tmp_path / "empty"), 77)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "empty" / file).write_text('{"tokenizer_class": "NoSuchTokenizer"}')
    with pytest.raises(ConfigError, match="transformers cannot read it"):
        load_tokenizer(str(tmp_path / "empty"), 77)
    with pytest.raises(ConfigError, match="needs a pad_token"):
        load_tokenizer(save_folder(tmp_path / "no_pad", sep_token="[SEP]"), 77)
    with pytest.raises(ConfigError, match="needs a pad_token and an eos_token"):
        load_tokenizer(save_folder(tmp_path / "no_end", pad_token="[PAD]"), 77)
    with pytest.raises(ConfigError, match="do not end in token 2"):
        load_tokenizer(save_folder(tmp_path / "no_template", ends=False, pad_token="[PAD]", sep_token="[SEP]"), 77)
