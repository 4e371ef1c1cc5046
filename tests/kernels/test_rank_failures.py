"""A rank that fails or dies ends the loss on every rank, with the first failure's message in every log.

Run as a script, this file is one rank: `python test_rank_failures.py RANK FOLDER FAULT SCHEDULE`.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from scaleclip_kernels import panels, softmax_contrastive_loss

NUM_RANKS, FAULTY = 4, 2
BOUND_S = 60
FAULTS = {
    # what the others must say of it
    "bad_argument": "rank 2: ValueError: ids must be torch.int64",
    "error_in_forward": "rank 2: MemoryError: no room for this block",
    "error_in_backward": "rank 2: MemoryError: no room for this block",
    "killed_in_forward": "RankError: no answer from",
    "killed_in_backward": "RankError: no answer from",
    "killed_before": "RankError: no answer from",
    "killed_before_the_first_call": "RankError: no answer from",
    "killed_with_the_store": "RankError: no answer from",
    "interrupted": "rank 2: KeyboardInterrupt: ",
    "other_batch": "calls the loss with sizes=[",
}

FAST = ("bad_argument", "killed_in_backward")


def _store_in_a_file(folder: Path) -> dist.Store:
    return dist.FileStore(str(folder / "store"), NUM_RANKS)


def _store_on_the_faulty_rank(rank: int, folder: Path) -> dist.Store:
    port = folder / "port"
    if rank == FAULTY:
        store = dist.TCPStore("localhost", 0, NUM_RANKS, is_master=True, wait_for_workers=False)
        (folder / "port.partial").write_text(str(store.port))
        (folder / "port.partial").rename(port)
        return store
    while not port.exists():
        time.sleep(0.01)
    return dist.TCPStore("localhost", int(port.read_text()), NUM_RANKS, is_master=False)


def run_rank(rank: int, folder: Path, fault: str, schedule: str) -> None:
    store = _store_on_the_faulty_rank(rank, folder) if fault == "killed_with_the_store" else _store_in_a_file(folder)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    num_pairs = 7 if fault == "other_batch" and rank == FAULTY else 8
    x, y = (torch.randn(num_pairs, 4, requires_grad=True) for _ in range(2))
    ids, scale = torch.arange(num_pairs), torch.tensor(3.0)

    def loss() -> torch.Tensor:
        return softmax_contrastive_loss(x, y, scale, ids=ids, duplicates="ignore", group=dist.group.WORLD, schedule=schedule)

    dist.barrier()
    if fault == "killed_before_the_first_call" and rank == FAULTY:
        os.kill(os.getpid(), signal.SIGKILL)
    if fault not in ("killed_before_the_first_call", "other_batch"):
        loss().backward()  # a good step first
    if rank == FAULTY:
        if fault == "bad_argument":
            ids = ids.int()
        if fault == "killed_before":
            os.kill(os.getpid(), signal.SIGKILL)
        stage = "softmax_gradients" if fault.endswith("backward") else "fold_softmax"

        def fail(*args: object) -> None:
            if fault.startswith("killed"):
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "interrupted":
                raise KeyboardInterrupt
            raise MemoryError("no room for this block")

        if fault != "other_batch":
            setattr(panels, stage, fail)
    try:
        loss().backward()
    except (Exception, KeyboardInterrupt) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        if rank == FAULTY:
            time.sleep(2 * BOUND_S)  # its process lives on: the others must not depend on its end
        try:
            loss()
        except Exception as again:
            print(f"again: {type(again).__name__}: {again}", flush=True)
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize("schedule", ["ring", pytest.param("gather", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", [fault if fault in FAST else pytest.param(fault, marks=pytest.mark.slow) for fault in FAULTS])
def test_every_rank_ends_with_the_first_message(fault: str, schedule: str, tmp_path: Path) -> None:
    logs = [tmp_path / f"{rank}.log" for rank in range(NUM_RANKS)]
    ranks = []
    for rank, log in enumerate(logs):
        command = [sys.executable, "-W", "ignore", __file__, str(rank), str(tmp_path), fault, schedule]
        with log.open("w") as file:
            ranks.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT))
    others = [rank for rank in range(NUM_RANKS) if rank != FAULTY]
    start = time.monotonic()
    try:
        codes = [ranks[rank].wait(timeout=BOUND_S) for rank in others]
        faulty_log = logs[FAULTY].read_text()
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert codes == [1] * len(others)
    assert time.monotonic() - start < BOUND_S
    texts = [logs[rank].read_text() for rank in others]
    # With no channels yet, or with the store that keeps the first message gone, each says its own.
    if fault in ("killed_before_the_first_call", "killed_with_the_store"):
        assert all(FAULTS[fault] in text for text in texts)
        return
    (first,) = {text.partition("first failure was on ")[2].splitlines()[0] for text in texts if "first failure" in text}
    assert FAULTS[fault] in first
    for text in texts:
        # the first rank to see a death has its own error, the others name that rank and repeat it
        assert first.split(": ", 1)[1] in text
        assert "again: RankError: these ranks cannot go on after a failure" in text
    if not fault.startswith(("killed", "other")):
        assert FAULTS[fault].split(": ", 1)[1] in faulty_log


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
