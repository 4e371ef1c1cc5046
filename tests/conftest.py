"""Shared fixtures: small shards, small configurations."""

import os
from pathlib import Path

import pytest
import yaml

from scaleclip import local_ranks

if os.environ.get("TRITON_INTERPRET") != "0":  # which `make test-gpu` sets
    import triton_interpreter  # noqa: F401  # before anything imports triton

    local_ranks.PRELOADED.insert(0, "triton_interpreter")  # on ranks too

from helpers import make_sample, write_tar
from runs import SPLITS, run
from scaleclip.config import CacheConfig
from scaleclip.data.cache import ShardCache


def write_shards(folder: Path) -> Path:
    """Four shards of 9, 4, 12 and 7 samples."""
    folder.mkdir()
    first = 0
    for number, count in enumerate((9, 4, 12, 7)):
        write_tar(folder / f"{number:05d}.tar", [make_sample(i) for i in range(first, first + count)])
        first += count
    return folder


def write_tiny_config(folder: Path, shards: Path) -> Path:
    """A configuration of a tiny model that trains on `shards` in seconds."""
    tree = {
        "run": {"folder": str(folder / "run")},
        "data": {
            "sources": {"tiny": {"shards": [f"{shards}/*.tar"], "concept": "json:concept"}},
            "cache": {"folder": str(folder / "cache")},
            "canonical_streams": 2,
            "workers": 0,
        },
        "model": {"preset": "tiny"},
        "loss": {"duplicates": "ignore"},
        "optim": {"lr": 1e-3, "warmup_samples": 8},
        "train": {"global_batch": 8, "samples": 96, "precision": "fp32", "zero_stage": 1},
        "checkpoint": {"every_steps": 4, "keep": 2},
        "metrics": {"log_every_steps": 1},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of small shards that the test may damage."""
    return write_shards(tmp_path / "shards")


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    """A cache of the test's own."""
    return ShardCache(CacheConfig(folder=str(tmp_path / "cache")))


@pytest.fixture
def tiny_config(tmp_path: Path, shards: Path) -> Path:
    """A tiny configuration of the test's own, on its `shards`."""
    return write_tiny_config(tmp_path, shards)


@pytest.fixture(scope="session")
def tiny_config_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny configuration that tests share; each gives a run.folder of its own."""
    folder = tmp_path_factory.mktemp("tiny")
    return str(write_tiny_config(folder, write_shards(folder / "shards")))


@pytest.fixture(scope="session")
def undisturbed(tiny_config_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a whole run of the shared configuration, which tests compare theirs with."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    output = run("train", tiny_config_path, f"run.folder={folder}", SPLITS)
    assert "image -> text R@1" in output
    assert str(folder) in output
    return folder
