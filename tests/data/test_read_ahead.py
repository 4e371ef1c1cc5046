"""Loader processes that read shards ahead of a model."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from scaleclip.data.read_ahead import ReadAhead, default_workers

# chunks are larger than what a pipe takes, so that the loader process waits for someone to read them
_READS = """
import multiprocessing, sys, time
from test_read_ahead import ahead
from scaleclip.data.read_ahead import Piece
chunks = ahead(1).chunks([Piece(0, 0, 1)] * 20, pin_memory=False)
next(chunks)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(60)
"""

_LOSES = """
import multiprocessing, os, signal, time
from test_read_ahead import ahead, is_there
from scaleclip.data.read_ahead import Piece
from scaleclip.errors import RunError
handler = signal.getsignal(signal.SIGCHLD)
chunks = ahead(1).chunks([Piece(0, 0, 1)] * 20, pin_memory=False)
assert signal.getsignal(signal.SIGCHLD) == handler
next(chunks)
assert signal.getsignal(signal.SIGCHLD) == handler
time.sleep(0.5)  # it writes the next chunk by now, and waits
(worker,) = multiprocessing.active_children()
os.kill(worker.pid, signal.SIGKILL)
while is_there(worker.pid):  # nothing is raised here
    time.sleep(0.05)
try:
    list(chunks)
except RunError as error:
    print(error)
"""


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}


class OneShard:
    names = ("a.tar",)

    def ordinal(self, shard: int, index: int) -> int:
        return index

    def fetch(self, shard: int) -> None:
        pass

    def __call__(self, shard: int, ordinal: int) -> SimpleNamespace:
        return SimpleNamespace(key=str(ordinal))


def ahead(workers: int) -> ReadAhead:
    return ReadAhead(OneShard(), OneShard(), lambda *_: "x" * 500_000, list, workers)


def is_there(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_loader_processes_end_with_their_job_however_that_ends(end):
    """One that is left holds the locks of what was open when it was started, and the next start is refused."""
    process = subprocess.Popen([sys.executable, "-c", _READS], stdout=subprocess.PIPE, text=True, env=environment())
    (worker,) = map(int, process.stdout.readline().split())
    assert is_there(worker)
    process.send_signal(end)
    process.wait()
    deadline = time.monotonic() + 10
    while is_there(worker):
        assert time.monotonic() < deadline, "the loader process is still there"
        time.sleep(0.05)


def test_nothing_to_read_starts_nothing():
    assert list(ahead(1).chunks([], pin_memory=False)) == []
    assert not multiprocessing.active_children()


def test_a_dead_loader_process_is_noticed_where_chunks_are_taken():
    """Also where it has left half a chunk in the pipe, to whose end nobody comes."""
    told = subprocess.run(
        [sys.executable, "-c", _LOSES], capture_output=True, text=True, env=environment(), timeout=60, check=True
    )
    assert told.stdout.startswith("a loader process died: look for an out-of-memory kill")


@pytest.mark.parametrize(
    ("cpus", "allowed", "local_ranks", "by_torchrun", "workers"),
    [(128, 12, 1, False, 12), (128, 128, 8, False, 16), (4, 4, 8, False, 1), (64, 16, 4, True, 4), (64, 16, 4, False, 16)],
)
def test_loader_processes_are_a_ranks_share_of_what_it_may_use(cpus, allowed, local_ranks, by_torchrun, workers, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if by_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(allowed)))
    assert default_workers(local_ranks) == workers
