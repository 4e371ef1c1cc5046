"""Shared fixtures: small shards, small configurations."""

from pathlib import Path

import pytest
import yaml

from helpers import make_sample, write_tar


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder with four shards of 9, 4, 12 and 7 samples."""
    folder = tmp_path / "shards"
    folder.mkdir()
    first = 0
    for number, count in enumerate((9, 4, 12, 7)):
        write_tar(folder / f"{number:05d}.tar", [make_sample(i) for i in range(first, first + count)])
        first += count
    return folder


@pytest.fixture
def tiny_config(tmp_path: Path, shards: Path) -> Path:
    """A configuration of a tiny model on `shards` that trains in seconds."""
    tree = {
        "run": {"folder": str(tmp_path / "run")},
        "data": {"shards": [f"{shards}/*.tar"], "canonical_streams": 2, "workers": 0, "concept_field": "concept"},
        "model": {"preset": "tiny"},
        "loss": {"duplicates": "ignore"},
        "optim": {"lr": 1e-3, "warmup_samples": 8},
        "train": {"global_batch": 8, "samples": 96, "precision": "fp32", "zero_stage": 1},
        "checkpoint": {"every_steps": 4, "keep": 2},
        "metrics": {"log_every_steps": 1},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
