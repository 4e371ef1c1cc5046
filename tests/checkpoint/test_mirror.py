"""Checkpoints at another place: a folder and a real S3 protocol server, whole, cut short, damaged, away."""

import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from fake_shards import assert_equal, load_newest
from object_store import BUCKET, object_store
from scaleclip.checkpoint import checkpointer
from scaleclip.checkpoint import mirror as module
from scaleclip.checkpoint.folders import damage, saved
from scaleclip.checkpoint.state import TrainState
from scaleclip.errors import ConfigError, RunError


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.01)


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    return tmp_path / "mirror"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_checkpoint_is_sent_and_old_ones_deleted(open_run, mirror):
    run = open_run(mirror=str(mirror), keep=2)
    assert load_newest(run.checkpointer) is None
    for step in (1, 2, 3, 4):
        run.save(step)
    assert names(mirror) == ["step_00000003", "step_00000004"]
    for step in (3, 4):
        here = run.path(step)
        assert {path.name: path.read_bytes() for path in here.iterdir()} == {
            path.name: path.read_bytes() for path in (mirror / here.name).iterdir()
        }
    assert run.checkpointer.mirror_failures == 0


@pytest.mark.parametrize("own_steps", [(), (3,)])
def test_a_mirror_with_another_runs_checkpoints_is_refused(open_run, mirror, own_steps):
    """Before anything is taken from there or sent there; what only one of two versions knows of does not count."""
    open_run(mirror=str(mirror), origin={"optim.lr": 1.0, "new.key": 1}).save(1, 2)
    other = {"optim.lr": 2.0, "old.key": 1}
    open_run("other", origin=other).save(*own_steps)
    with pytest.raises(ConfigError, match=r"holds another run's checkpoints \(differing: optim.lr\): name another place"):
        load_newest(open_run("other", mirror=str(mirror), origin=other).checkpointer)
    assert names(mirror) == ["step_00000001", "step_00000002"]
    assert load_newest(open_run("third", mirror=str(mirror), origin={"optim.lr": 1.0}).checkpointer).step == 2


def test_what_a_start_could_not_send_the_next_one_sends(open_run, mirror):
    open_run().save(1)
    second = open_run(mirror=str(mirror))
    assert load_newest(second.checkpointer).step == 1
    second.checkpointer.finish()
    assert names(mirror) == ["step_00000001"]


def test_a_mirror_that_never_answers_does_not_hold_up_a_run_with_checkpoints(open_run, mirror, monkeypatch):
    open_run().save(1)
    monkeypatch.setattr(checkpointer, "STANDSTILL_S", 0.1)
    monkeypatch.setattr(module.Mirror, "fetch_newer", lambda *_: time.sleep(30))
    begin = time.monotonic()
    assert load_newest(open_run(mirror=str(mirror)).checkpointer).step == 1
    assert time.monotonic() - begin < 10


def test_a_lost_run_comes_back_from_its_mirror(open_run, mirror):
    first = open_run(mirror=str(mirror))
    first.save(1, 2)
    shutil.rmtree(first.folder)
    second = open_run(mirror=str(mirror))
    state = load_newest(second.checkpointer)
    assert state is not None
    assert state.step == 2
    assert_equal(second.shard, first.expected(2))
    assert [path.name for path in saved(second.folder)] == ["step_00000002"]
    assert damage(second.path(2)) is None
    assert not list((second.folder / "checkpoints").glob(".*"))


def test_only_a_newer_checkpoint_is_fetched(open_run, mirror):
    run = open_run(mirror=str(mirror))
    run.save(1, 2)
    shutil.rmtree(run.path(2))
    (mirror / "step_00000002").rename(mirror / "step_00000000")
    (mirror / "step_00000001" / "state.json").write_text("{}")
    assert load_step(open_run(mirror=str(mirror))) == 1


def load_step(run) -> int:
    state = load_newest(run.checkpointer)
    assert state is not None
    assert_equal(run.shard, run.expected(state.step))
    return state.step


def test_what_is_damaged_or_not_whole_there_is_passed_over(open_run, mirror, caplog):
    run = open_run(mirror=str(mirror), keep=4)
    for step in (1, 2, 3, 4):
        run.save(step)
    (mirror / "step_00000004" / "checksums.json").unlink()
    (mirror / "step_00000003" / "rank_00000.safetensors").write_bytes(b"?")
    (mirror / "step_00000002" / "state.json").unlink()
    shutil.rmtree(run.folder)
    assert load_step(open_run(mirror=str(mirror))) == 1
    assert "step_00000004 is damaged (it has no checksums.json)" in caplog.text
    assert "step_00000003 is damaged (rank_00000.safetensors has changed)" in caplog.text
    assert "step_00000002 is damaged (" in caplog.text
    assert not list((run.folder / "checkpoints").glob(".*"))


def test_a_transfer_that_fails_is_tried_again(open_run, mirror, monkeypatch):
    run = open_run(mirror=str(mirror))
    run.save(1)
    shutil.rmtree(run.folder)
    get_file, failures = LocalFileSystem.get_file, iter((OSError("gone"), TimeoutError("slow")))

    def fail_first(self, there: str, here: str, **kwargs: object) -> None:
        for error in failures:
            raise error
        get_file(self, there, here, **kwargs)

    monkeypatch.setattr(LocalFileSystem, "get_file", fail_first)
    assert load_step(open_run(mirror=str(mirror))) == 1


def test_a_checkpoint_that_is_being_replaced_is_not_whole(open_run, mirror, monkeypatch):
    run = open_run(mirror=str(mirror))
    run.save(1)
    shutil.rmtree(run.folder)

    def refuse(self, here: str, there: str, **kwargs: object) -> None:
        raise OSError("full")

    monkeypatch.setattr(LocalFileSystem, "put_file", refuse)
    monkeypatch.setattr(module, "STANDSTILL_S", 0.3)
    run.shard.scalars["adam_step"].fill_(7)
    run.checkpointer.save(TrainState(step=1))
    run.checkpointer.finish()
    assert not (mirror / "step_00000001" / "checksums.json").exists()


def test_a_newer_one_there_replaces_a_damaged_one_here(open_run, mirror):
    run = open_run(mirror=str(mirror))
    run.save(1)
    run.save(2)
    (run.path(2) / "state.json").unlink()
    assert load_step(open_run(mirror=str(mirror))) == 2
    assert damage(run.path(2)) is None


def test_another_checkpoint_of_the_same_step_takes_the_place(open_run, mirror):
    first = open_run(mirror=str(mirror))
    first.save(1, 2)
    (mirror / "step_00000002" / "rank_00007.safetensors").write_bytes(b"of a start on 8 ranks")
    shutil.rmtree(first.path(2))
    second = open_run()
    assert load_step(second) == 1
    third = open_run(mirror=str(mirror))
    for _, tensor in zip(range(1), third.shard.scalars.values(), strict=False):
        tensor.fill_(99)
    third.checkpointer.save(TrainState(step=2))
    third.checkpointer.finish()
    shutil.rmtree(third.folder)
    fourth = open_run(mirror=str(mirror))
    assert load_newest(fourth.checkpointer) == TrainState(step=2)
    assert fourth.shard.scalars["adam_step"] == 99


def test_a_start_sends_what_the_last_one_did_not(open_run, mirror):
    open_run().save(5)
    run = open_run(mirror=str(mirror))
    assert load_step(run) == 5
    run.checkpointer.finish()
    assert names(mirror) == ["step_00000005"]


def test_what_was_cut_short_there_is_deleted_with_the_old_ones(open_run, mirror):
    (mirror / "step_00000001").mkdir(parents=True)
    (mirror / "step_00000001" / "rank_00000.safetensors").write_bytes(b"half")
    (mirror / "notes").mkdir()
    run = open_run(mirror=str(mirror), keep=2)
    run.save(2)
    assert names(mirror) == ["notes", "step_00000002"]


def test_a_mirror_that_fails_stops_nothing_and_is_caught_up(open_run, mirror, caplog):
    mirror.write_text("no folder")
    run = open_run(mirror=str(mirror / "run"), keep=2)
    for step in (1, 2, 3):
        run.checkpointer.save(TrainState(step=step))
        run.checkpointer._settle()
    until(lambda: run.checkpointer.mirror_failures >= 3)
    assert "cannot be sent to" in caplog.text
    mirror.unlink()
    until(lambda: run.checkpointer._mirror.missing is None)
    assert names(mirror / "run") == ["step_00000003"]


def until(seen) -> None:
    deadline = time.monotonic() + 30
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_end_does_not_wait_for_a_mirror_that_stands_still(open_run, mirror, monkeypatch, caplog):
    monkeypatch.setattr(module, "STANDSTILL_S", 0.3)
    mirror.write_text("no folder")
    run = open_run(mirror=str(mirror / "run"))
    run.save(1)
    assert "step_00000001 is not in checkpoint.mirror=" in caplog.text
    assert damage(run.path(1)) is None
    mirror.unlink()
    until(lambda: run.checkpointer._mirror.missing is None)


def test_what_is_being_sent_is_not_deleted_and_the_newest_comes_next(open_run, mirror, monkeypatch):
    go, is_sending, put_file, sent = threading.Event(), threading.Event(), LocalFileSystem.put_file, []

    def slow(self, here: str, there: str, **kwargs: object) -> None:
        sent.append(Path(here).parent.name)
        is_sending.set()
        assert go.wait(30)
        put_file(self, here, there, **kwargs)

    monkeypatch.setattr(LocalFileSystem, "put_file", slow)
    run = open_run(mirror=str(mirror), keep=1)
    run.checkpointer.save(TrainState(step=1))
    run.checkpointer._settle()
    assert is_sending.wait(30)
    for step in (2, 3):
        run.checkpointer.save(TrainState(step=step))
        run.checkpointer._settle()
    assert [path.name for path in saved(run.folder)] == ["step_00000001", "step_00000003"]
    go.set()
    run.checkpointer.finish()
    assert list(dict.fromkeys(sent)) == ["step_00000001", "step_00000003"]
    assert names(mirror) == ["step_00000003"]
    run.save(4)
    assert [path.name for path in saved(run.folder)] == ["step_00000004"]


def test_a_mirror_that_cannot_be_read_matters_only_without_a_checkpoint_here(open_run, mirror, monkeypatch, caplog):
    def refuse(self, path: str, **kwargs: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(LocalFileSystem, "ls", refuse)
    with pytest.raises(RunError, match=r"mirror cannot be read \(PermissionError: no\), and no whole checkpoint is here"):
        load_newest(open_run(mirror=str(mirror)).checkpointer)
    open_run().save(1)
    assert load_step(open_run(mirror=str(mirror))) == 1
    assert "cannot be read (no): going on without it" in caplog.text


def test_a_place_that_fsspec_does_not_know(open_run):
    with pytest.raises(ConfigError, match=r"checkpoint\.mirror=nowhere://run: .*name a folder, or a URL"):
        open_run(mirror="nowhere://run")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch):
    with object_store() as store:
        for name, value in (store.environment() | {"AWS_MAX_ATTEMPTS": "1"}).items():
            monkeypatch.setenv(name, value)
        if "s3fs" in sys.modules:
            sys.modules["s3fs"].S3FileSystem.clear_instance_cache()
        yield store


def test_a_bucket_is_a_mirror(open_run, store):
    first = open_run(mirror=f"s3://{BUCKET}/run", keep=2)
    assert load_newest(first.checkpointer) is None
    for step in (1, 2, 3):
        first.save(step)
    sent = [request.key for request in store.requests if request.method == "PUT" and "step_00000003" in request.key]
    assert len(sent) == 4
    assert sent[-1] == "run/step_00000003/checksums.json"
    shutil.rmtree(first.folder)
    # one answer is an error, one is cut short, one file is gone for good
    store.fail("run/step_00000003/state.json", 503)
    store.cut("run/step_00000003/rank_00000.safetensors", after=100)
    second = open_run(mirror=f"s3://{BUCKET}/run")
    assert load_step(second) == 3
    shutil.rmtree(first.folder)
    store.fail("run/step_00000003/state.json", 404, times=2)  # when it is asked whose it is, and fetched
    assert load_step(open_run(mirror=f"s3://{BUCKET}/run")) == 2
    assert not [request for request in store.requests if request.method == "GET" and "step_00000001/rank" in request.key]


def test_a_bucket_that_is_away(open_run, store, monkeypatch, caplog):
    monkeypatch.setattr(module, "STANDSTILL_S", 1.0)
    run = open_run(mirror="s3://other-bucket/run")
    run.save(1)
    assert run.checkpointer.mirror_failures >= 1
    assert "step_00000001 is not in checkpoint.mirror=s3://other-bucket/run" in caplog.text
