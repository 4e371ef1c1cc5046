"""`train.micro_batch=auto`: the largest micro batch that memory holds. Runs with it are in test_train.py."""

import pytest
import torch

from scaleclip import fit
from scaleclip.config_io import load_config
from scaleclip.distributed import World
from scaleclip.errors import ConfigError
from scaleclip.fit import choose_micro_batch
from scaleclip.planning.memory import step_memory

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def config(tiny_config_path):
    return load_config(tiny_config_path, ["train.global_batch=100", "train.micro_batch=auto", "data.canonical_streams=1"])


def chosen(config, monkeypatch, needed_bytes):
    monkeypatch.setattr(fit, "_free_bytes", lambda _: needed_bytes / fit._USABLE["cpu"] + 1)
    return choose_micro_batch(config, ALONE)


@pytest.mark.parametrize(
    ("room", "micro_batch"), [(1000, 100), (100, 100), (99, 50), (50, 50), (49, 34), (33, 25), (20, 20), (16, 15)]
)
def test_a_share_is_cut_into_the_fewest_chunks_that_fit_all_about_equal(config, monkeypatch, room, micro_batch):
    assert chosen(config, monkeypatch, step_memory(config, 1, min(room, 100), "cpu").total) == micro_batch


def test_no_room_for_a_single_pair_is_said(config, monkeypatch):
    with pytest.raises(ConfigError, match=r"train\.micro_batch=auto: not even one pair at once fits .* GiB a rank; "):
        chosen(config, monkeypatch, step_memory(config, 1, 1, "cpu").total - 2)


def test_a_number_is_taken_as_it_is_up_to_the_share(config):
    for number, expected in ((7, 7), (100, 100), (4096, 100)):
        train = config.train.model_copy(update={"micro_batch": number})
        assert choose_micro_batch(config.model_copy(update={"train": train}), ALONE) == expected
