"""Saves in the background, published, found again, passed over when damaged; on one rank and on several."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoint_rank_jobs import Found, cross, exercise, load, save_on_a_full_disk
from fake_shards import LAYOUTS, assert_equal, blank, load_newest, make_whole, write_step
from scaleclip.checkpoint import checkpointer as module
from scaleclip.checkpoint.checkpointer import Checkpointer
from scaleclip.checkpoint.folders import damage, newest, saved
from scaleclip.checkpoint.loading import load_weights
from scaleclip.checkpoint.shard import Fragment, Shard
from scaleclip.checkpoint.state import TrainState, read_state
from scaleclip.config import CheckpointConfig
from scaleclip.errors import RunError
from scaleclip.local_ranks import run_ranks

MIB = 1 << 20


def names(folder: Path) -> list[str]:
    return [path.name for path in saved(folder)]


def test_a_run_without_checkpoints_has_no_state(open_run):
    run = open_run()
    assert load_newest(run.checkpointer) is None
    run.checkpointer.poll()
    run.checkpointer.finish()


def test_what_is_saved_comes_back(open_run, tmp_path, caplog):
    first = open_run()
    assert load_newest(first.checkpointer) is None
    first.save(3, 7)
    assert (first.folder / "checkpoints" / "latest").read_text() == "step_00000007"
    second = open_run()
    with caplog.at_level("INFO", "scaleclip"):
        assert load_newest(second.checkpointer) == TrainState(step=7, faults={"tiny/missing": 7})
    assert_equal(second.shard, first.expected(7))
    assert "going on from" in caplog.text
    assert newest(first.folder) == first.path(7)
    assert read_state(first.path(3)).step == 3
    assert sorted(path.name for path in first.path(7).iterdir()) == [
        "checksums.json", "rank_00000.safetensors", "scalars.safetensors", "state.json"
    ]  # fmt: skip


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Files of ranks are not written before the event is set."""
    go, write_durable = threading.Event(), module.write_durable

    def wait(path: Path, blocks: object) -> str:
        assert go.wait(60)
        return write_durable(path, blocks)

    monkeypatch.setattr(module, "write_durable", wait)
    return go


def test_training_goes_on_while_a_checkpoint_is_written(open_run, slow_disk):
    run = open_run()
    write_step(run.shard, 1)
    state = TrainState(step=1)
    run.checkpointer.save(state)
    write_step(run.shard, 2)
    state.step = 2
    run.checkpointer.poll()
    assert names(run.folder) == []
    slow_disk.set()
    run.checkpointer.finish()
    assert load_newest(open_run().checkpointer) == TrainState(step=1)
    again = open_run()
    load_newest(again.checkpointer)
    assert_equal(again.shard, run.expected(1))


def test_a_save_waits_for_the_one_before_and_says_how_long(open_run, slow_disk, caplog, monkeypatch):
    monkeypatch.setattr(module, "_LONG_WAIT_S", 0.1)
    run = open_run()
    write_step(run.shard, 1)
    run.checkpointer.save(TrainState(step=1))
    threading.Timer(0.3, slow_disk.set).start()
    with caplog.at_level("INFO", "scaleclip"):
        run.save(2)
    assert float(caplog.text.partition("step_00000002 waited ")[2].split()[0]) > 0.2
    assert names(run.folder) == ["step_00000001", "step_00000002"]
    for step in (1, 2):
        assert damage(run.path(step)) is None


def test_ranks_exchange_nothing_while_no_save_is_under_way(open_run, monkeypatch):
    run = open_run()
    run.save(1)
    for name in ("any_rank", "gather_objects", "raise_together"):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("a collective"))
    run.checkpointer.poll()
    run.checkpointer.finish()


def test_the_newest_are_kept(open_run):
    run = open_run(keep=2)
    run.save(1, 2, 3, 4)
    assert names(run.folder) == ["step_00000003", "step_00000004"]
    assert not list((run.folder / "checkpoints").glob(".*"))


def test_a_newer_damaged_checkpoint_does_not_count_among_those_kept(open_run):
    open_run(keep=2).save(8, 12)
    run = open_run(keep=1)
    (run.path(12) / "state.json").unlink()
    state = load_newest(run.checkpointer)
    assert state is not None
    assert state.step == 8
    run.save(10)
    assert names(run.folder) == ["step_00000010", "step_00000012"]
    run.save(12)
    assert names(run.folder) == ["step_00000012"]
    assert damage(run.path(12)) is None


def overwrite(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


FILES = ("rank_00000.safetensors", "scalars.safetensors", "state.json", "checksums.json")
DAMAGES: dict[str, Callable[[Path], None]] = {
    f"{how.__name__} {name}": (lambda folder, how=how, name=name: how(folder / name))
    for name in FILES
    for how in (flip, truncate, Path.unlink)
} | {
    "list": lambda folder: overwrite(folder / "checksums.json", b"[]"),
    "nothing": lambda folder: overwrite(folder / "checksums.json", b"{}"),
    "no text": lambda folder: overwrite(folder / "checksums.json", b"\xff\xfe"),
    "all": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("spoil", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(open_run, caplog, spoil):
    first = open_run()
    first.save(1, 2)
    DAMAGES[spoil](first.path(2))
    second = open_run()
    state = load_newest(second.checkpointer)
    assert state is not None
    assert state.step == 1
    assert_equal(second.shard, first.expected(1))
    assert "step_00000002 is damaged (" in caplog.text
    assert newest(first.folder) == first.path(1)
    second.save(2)
    assert damage(first.path(2)) is None


def test_a_file_outside_the_checkpoint_is_not_read(open_run):
    run = open_run()
    run.save(1)
    digests = json.loads((run.path(1) / "checksums.json").read_text())
    (run.path(1) / "checksums.json").write_text(json.dumps({**digests, "../latest": "0"}))
    assert damage(run.path(1)) == "checksums.json is none"


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(open_run):
    run = open_run()
    run.save(1, 2)
    for step in (1, 2):
        truncate(run.path(step) / "state.json")
    with pytest.raises(RunError, match=r"all checkpoints in .* are damaged, .* delete them to start afresh"):
        load_newest(open_run().checkpointer)


def test_what_a_killed_save_left_is_deleted(open_run):
    run = open_run()
    run.save(1)
    left = run.folder / "checkpoints" / ".partial-step_00000002"
    left.mkdir()
    (left / "rank_00003.safetensors").write_bytes(b"x")
    state = load_newest(open_run().checkpointer)
    assert state is not None
    assert state.step == 1
    assert not left.exists()


def test_a_roll_back_waits_for_the_save_under_way(open_run):
    run = open_run()
    write_step(run.shard, 5)
    run.checkpointer.save(TrainState(step=5))
    write_step(run.shard, 6)
    assert load_newest(run.checkpointer) == TrainState(step=5)
    assert_equal(run.shard, run.expected(5))


def test_a_layout_that_changes_is_our_fault(open_run):
    run = open_run()
    run.shard = blank(LAYOUTS["cut together"](make_whole(0, {"other": (3,)}), 0, 1))
    with pytest.raises(AssertionError, match="layout"):
        run.checkpointer.save(TrainState())


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Found]]:
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run_ranks(exercise, 2, folder)


def test_ranks_load_what_another_number_of_ranks_saved(two_ranks):
    folder, _ = two_ranks
    (path,) = saved(folder / "whole")
    assert len(list(path.glob("rank_*.safetensors"))) == 2
    assert run_ranks(load, 3, folder / "whole", "cut together", 3) == [TrainState(step=9, world_size=2)] * 3


def test_ranks_go_on_with_another_model_at_a_border(two_ranks):
    folder, _ = two_ranks
    told = run_ranks(cross, 3, folder / "whole", 3, 9)
    # each parameter lies on one rank or two, and every rank says what became of all
    assert told == ["a stage begins at step 9: optimizer state kept; resized: conv; left fresh: extra; dropped: pair"] * 3


def test_each_file_is_hashed_by_one_rank(two_ranks):
    _, found = two_ranks
    assert [len(rank.hashed) for rank in found] == [2, 2]
    assert sorted(found[0].hashed + found[1].hashed) == [
        "rank_00000.safetensors", "rank_00001.safetensors", "scalars.safetensors", "state.json"
    ]  # fmt: skip


def test_a_rank_may_have_nothing_to_save(two_ranks):
    folder, found = two_ranks
    assert newest(folder / "small") is not None
    assert [rank.one_element for rank in found] == [5.0, 5.0]


def check_full_disk(folder: Path, found: list[tuple[str, bool]]) -> None:
    for error, is_intact in found:
        assert error.startswith("RunError: ")
        assert "step_00000002: [Errno 27] File too large" in error
        assert "the run goes on from step_00000001, which is whole" in error
        assert is_intact
    assert [path.name for path in (folder / "checkpoints").glob("*step*")] == ["step_00000001"]
    assert newest(folder) is not None


def test_a_full_disk_on_one_rank_is_an_error_on_all_and_harms_nothing(two_ranks):
    folder, found = two_ranks
    check_full_disk(folder / "full", [rank.full_disk for rank in found])


@pytest.mark.slow
def test_a_full_disk_on_rank_0(tmp_path):
    check_full_disk(tmp_path, run_ranks(save_on_a_full_disk, 2, tmp_path, 0))


def test_memory_is_bounded(world, tmp_path):
    num_elements = 40_000_000
    whole = torch.ones(num_elements)
    shard = Shard([Fragment("large", (num_elements,), 0, {"weight": whole}, replicated=False)], {})
    checkpointer = Checkpointer(tmp_path, world, CheckpointConfig(), {}).attach(lambda: shard)
    checkpointer.save(TrainState(step=1))  # which waits until the buffer is touched
    assert added_bytes(checkpointer.finish) < 24 * MIB
    assert added_bytes(lambda: load_newest(checkpointer)) < 24 * MIB
    assert 4 * num_elements < added_bytes(lambda: load_weights(saved(tmp_path)[0])) < 4 * num_elements + 24 * MIB


def added_bytes(work: Callable[[], object]) -> int:
    """Highest growth of the memory that the process must have for itself, while it works."""
    before, peak, is_done = private_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_done.wait(0.0005):
            peak = max(peak, private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = work()
    is_done.set()
    watcher.join()
    peak = max(peak, private_bytes())
    del kept
    return peak - before


def private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])
