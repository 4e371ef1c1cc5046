"""The benchmark of the rewriting job, made small."""

import csv
import json
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

import bench_captions
import tiny_captioners
from captioning_models import pieces_llama


@pytest.mark.slow
def test_the_ways_take_turns_and_are_recorded(tmp_path: Path) -> None:
    record = tmp_path / "record.csv"
    small = ("--captions", "24", "--batch", "8", "--rounds", "1", "--width", "32", "--layers", "2", "--steps", "40")
    for _ in range(2):
        bench_captions.main([*small, "--csv", str(record)])
    rows = list(csv.DictReader(record.open()))
    assert [row["way"] for row in rows] == ["loop", "batches", "job"]
    assert all(float(row["texts_per_s_p50"]) > 0 and float(row["tokens_per_s_p50"]) > 0 for row in rows)
    assert float(rows[0]["times_loop"]) == 1


@pytest.mark.slow
def test_a_model_of_ones_own_may_have_no_padding_token_and_two_ends(tmp_path: Path) -> None:
    folder = pieces_llama(tmp_path / "pieces")
    model = LlamaForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = [2, 5]
    model.save_pretrained(folder)
    record = tmp_path / "record.csv"
    small = ("--captions", "4", "--batch", "2", "--rounds", "1", "--max-tokens", "8", "--csv", str(record))
    bench_captions.main(["--model", str(folder), *small])
    assert [row["way"] for row in csv.DictReader(record.open())] == ["loop", "batches", "job"]


def test_tiny_models_are_made_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, architecture in (("rewriter", "LlamaForCausalLM"), ("captioner", "LlavaForConditionalGeneration")):
        tiny_captioners.main([kind, str(tmp_path / kind), "--steps", "2"])
        assert json.loads((tmp_path / kind / "config.json").read_text())["architectures"] == [architecture]
    assert "writes nonsense" in capsys.readouterr().out
