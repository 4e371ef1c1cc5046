"""What ranks set up before they talk to each other."""

import os

import pytest

from scaleclip import distributed

NAMES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE")


@pytest.fixture
def environment(monkeypatch):
    """Without NCCL's flight recorder."""
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name not in NAMES})
    return os.environ


def test_collectives_are_recorded_into_the_runs_log(environment, tmp_path):
    distributed._record_collectives(tmp_path / "log")
    assert [environment[name] for name in NAMES] == ["2000", "1", f"{tmp_path}/log/nccl_rank_"]


def test_what_the_user_says_of_the_recorder_is_kept(environment, tmp_path):
    environment["TORCH_FR_BUFFER_SIZE"] = "0"
    distributed._record_collectives(tmp_path / "log")
    assert environment["TORCH_FR_BUFFER_SIZE"] == "0"
    assert environment["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
