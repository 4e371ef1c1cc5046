"""A run with a model of random weights, and a split that it is shown on."""

import json
import math
from pathlib import Path

import pytest
import torch

from helpers import make_sample, write_tar
from report_runs import ATTACK, NUM_CONCEPTS, NUM_IMAGES, make_row, make_run, tiny_config, write_evaluations
from scaleclip.data.tokenizer import load_tokenizer
from scaleclip.evaluation.encoder import Encoder
from scaleclip.evaluation.results import Figure, write_results
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.report import page
from scaleclip.trained_model import TrainedModel


@pytest.fixture
def split(tmp_path) -> Path:
    """Nine concepts of which five have two images and one has two texts; one text attacks."""
    samples = [make_sample(number) for number in range(NUM_IMAGES)]
    write_tar(tmp_path / "held-00000.tar", samples)
    concepts = {key: f"c{number % NUM_CONCEPTS}" for number, (key, _) in enumerate(samples)}
    gallery = [{"concept": f"c{number}", "text": f"thing {number}"} for number in range(NUM_CONCEPTS)]
    gallery[0]["text"] = ATTACK
    gallery.append({"concept": "c1", "text": "another word for thing 1"})
    path = tmp_path / "held.json"
    path.write_text(json.dumps({"name": "held", "about": "nothing & all", "gallery": gallery, "concepts": concepts}))
    return path


@pytest.fixture
def encoder() -> Encoder:
    config = tiny_config().model
    torch.manual_seed(0)
    tokenizer = load_tokenizer(config.text.tokenizer, config.text.context_length)
    return Encoder(DualEncoder(config).eval(), tokenizer, config.image.size, 4)


@pytest.fixture
def run(tmp_path, split, encoder, monkeypatch) -> Path:
    """A whole run with a model of random weights, several stages and starts, and faults."""
    rows = [
        make_row(
            step, stage=int(step > 12), loss=None if step == 7 else 5 / step, grad_norm=math.nan if step == 7 else 1.0,
            terms={"contrastive": 1 / step, "captioning": 2 / step}, bad_steps=int(step > 6),
            invalid={"laion/400m/no_image": 3, "cc/empty_caption": 12},
        )
        for step in range(1, 21)
    ]  # fmt: skip
    folder = make_run(tmp_path / "run", rows, (str(split),), starts=(0, 4, 4, 16, 20))
    (folder / "bad_steps.jsonl").write_text(json.dumps({"step": 7, "keys": ["key-of-a-bad-step", ""]}) + "\n")
    quarantine = [{"shard": "worst.tar"}] * 3 + [{"shard": "other.tar"}]
    (folder / "quarantine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in quarantine))
    write_evaluations(folder, {10: [Figure("held", "image -> text R@1", 0.125, 0.0625)]})
    figures = [
        Figure("held", "image -> text R@1", 0.1234, 0.0625, None, 0.1, 0.15),
        Figure("held", "zero-shot x", 0.5, 0.1, 0.25),
    ]
    write_results(folder, 20, figures)
    config = tiny_config()
    trained = TrainedModel("run", config.model, encoder.model, encoder.tokenizer, 20, config)
    monkeypatch.setattr(page, "load_model", lambda reference: trained)
    return folder
