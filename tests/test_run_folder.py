"""The run's folder: who may open it, and what it says of the run."""

import json

import pytest

from scaleclip import run_folder
from scaleclip.config_io import load_config
from scaleclip.errors import ConfigError
from scaleclip.files import write_atomic
from scaleclip.run_folder import open_run, read_config


@pytest.fixture
def config(tiny_config):
    return load_config(tiny_config)


def test_two_starts_are_one_run(config, tmp_path):
    for world_size in (1, 2):
        open_run(config, world_size, ["digest"], "default").close()
    starts = json.loads((tmp_path / "run" / "provenance.json").read_text())["starts"]
    assert [start["world_size"] for start in starts] == [1, 2]
    assert read_config(tmp_path / "run") == config
    assert run_folder.wandb_id(tmp_path / "run") == starts[0]["id"] != starts[1]["id"]


def test_a_run_that_is_being_written_is_not_opened_again(config, monkeypatch):
    monkeypatch.setattr(run_folder, "_LOCK_WAIT_S", 0.3)
    held = open_run(config, 1, ["digest"], "default")
    with pytest.raises(ConfigError, match=r"is being written by another run \(process \d+ on "):
        open_run(config, 1, ["digest"], "default")
    held.close()
    open_run(config, 1, ["digest"], "default").close()


def test_other_data_are_refused(config):
    open_run(config, 1, ["digest"], "default").close()
    with pytest.raises(ConfigError, match="was trained on other data"):
        open_run(config, 1, ["other digest"], "default")


def test_moved_data_are_the_same_run(config, tiny_config):
    open_run(config, 1, ["digest"], "default").close()
    open_run(load_config(tiny_config, ["data.sources.tiny.shards=/elsewhere/*.tar"]), 1, ["digest"], "default").close()


def test_checkpoints_of_an_unknown_run_are_refused(config, tmp_path):
    (tmp_path / "run" / "checkpoints" / "step_00000004").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"has checkpoints, but no config\.yaml"):
        open_run(config, 1, ["digest"], "default")


def test_an_atomic_write_leaves_the_old_text_or_the_new(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "old")
    with pytest.raises(TypeError):
        write_atomic(path, None)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
    other = tmp_path / "plain"
    other.write_text("")
    assert path.stat().st_mode == other.stat().st_mode
