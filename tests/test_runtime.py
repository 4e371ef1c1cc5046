"""What training asks of the interpreter and of torch."""

import contextlib
import os
from dataclasses import replace

import pytest
import torch

import scaleclip.train
from scaleclip.config_io import load_config
from scaleclip.runtime import fixed_order_kernels


@pytest.fixture
def _no_workspace_setting(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


@pytest.mark.usefixtures("_no_workspace_setting")
def test_operations_add_in_a_fixed_order_only_inside():
    with contextlib.suppress(ZeroDivisionError), fixed_order_kernels(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        1 / 0  # noqa: B018
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    with fixed_order_kernels(False):
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("_no_workspace_setting")
def test_a_run_trains_with_the_kernels_it_asks_for(tiny_config, tmp_path, monkeypatch):
    seen = []
    # a start leaves its rank in the environment: gone before, and after
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def no_steps(run, stage, data, state, found):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return replace(state, step=run.total_steps)

    monkeypatch.setattr(scaleclip.train, "train_stage", no_steps)
    config = load_config(tiny_config, [f"run.folder={tmp_path}/run", "eval.splits=[]", "train.deterministic=true"])
    scaleclip.train.train(config)
    assert seen == [True]
