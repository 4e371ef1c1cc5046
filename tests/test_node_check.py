"""What is checked on a node before a job trains there."""

import pytest
import torch

from scaleclip import node_check
from scaleclip.config_io import load_config
from scaleclip.node_check import check_node
from scaleclip.run_folder import open_run


@pytest.fixture
def config(tiny_config):
    return load_config(tiny_config)


def faults(config, ranks=2, local_ranks=2, grace_s=60.0):
    return list(check_node(config, ranks, local_ranks, grace_s))


def test_a_node_in_order_has_no_faults(config, tmp_path):
    assert faults(config) == []
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".probe*"))


def test_data_that_cannot_be_read_is_named(config, shards):
    (shards / "00000.tar").write_bytes(b"no tar")
    [fault] = faults(config)
    assert fault.message.startswith("data.sources.tiny: ")
    assert "00000.tar" in fault.message
    assert not fault.of_node


def test_a_folder_that_cannot_be_written_is_named(config, tmp_path):
    (tmp_path / "run").write_text("a file")
    [fault] = faults(config)
    assert fault.message == f"run.folder={tmp_path}/run cannot be written: Not a directory"


def test_a_folder_of_another_run_is_named_in_one_line(config, tiny_config, tmp_path):
    open_run(load_config(tiny_config, ["optim.lr=0.5"]), 1, ["digest"], "default").close()
    [fault] = faults(config)
    assert fault.message.startswith(f"run.folder={tmp_path}/run holds a run with another configuration:; optim.lr: 0.5 there")
    assert "\n" not in fault.message


def test_a_disk_that_is_too_small_is_said_with_what_is_needed(config, monkeypatch):
    monkeypatch.setattr(node_check.shutil, "disk_usage", lambda path: node_check.shutil._ntuple_diskusage(10, 9, 1))
    [fault] = faults(config)
    assert "has 0.0 GiB free, and 2 checkpoints of 0.0 GiB" in fault.message
    assert "checkpoint.keep" in fault.message


def test_saving_that_takes_longer_than_the_warning_is_said(config):
    [fault] = faults(config, grace_s=0.0)
    assert "SLURM's warning comes 0 s before the end" in fault.message
    assert "SCALECLIP_GRACE_S=" in fault.message


@pytest.mark.parametrize(
    ("in_use", "message"), [([60, 60, 0], None), ([60] * 1000, "GPU 0: 60.0 GiB are in use by another process")]
)
def test_memory_that_the_job_before_still_gives_back_is_waited_for(config, monkeypatch, in_use, message):
    clock, used = iter(range(1000)), iter(in_use)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: ((80 - next(used)) * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.full(size, 1.0))
    monkeypatch.setattr(node_check.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(node_check, "_RELEASE_S", 5)
    monkeypatch.setattr(node_check.time, "monotonic", lambda: next(clock))
    found = list(node_check._check_devices(1))
    assert [fault.message for fault in found] == ([message] if message else [])
    assert all(fault.of_node for fault in found)


def test_gpus_that_torch_does_not_see_are_the_nodes_fault(config, monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    [fault] = faults(config)
    assert fault.of_node
    assert fault.message == "2 ranks and 2 GPUs of SLURM's, but torch sees 0"
