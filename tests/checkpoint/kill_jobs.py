"""Runs that save without a pause and are killed again and again; each start must find what was whole.

python tests/checkpoint/kill_jobs.py FOLDER SEED KILLS RANKS MIRROR

A start is forked, which is a hundred times faster than an interpreter with torch. The run's folder is lost after every third
kill, so that the mirror's copies are what is left. Prints what the kills met.
"""

import mmap
import os
import random
import shutil
import signal
import struct
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist

from fake_shards import LAYOUTS, assert_equal, blank, load_newest, make_whole, write_step
from scaleclip.checkpoint.checkpointer import Checkpointer
from scaleclip.checkpoint.folders import damage
from scaleclip.checkpoint.state import TrainState
from scaleclip.config import CheckpointConfig
from scaleclip.distributed import World
from scaleclip.errors import RunError

SHAPES = {"body.weight": (500, 500), "body.bias": (301,)}
LOST_A_RANK = 3


class Notes:
    """What ranks say before they are killed: the step that was loaded, and the last one whose save has begun."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 16)

    def write(self, loaded: int, begun: int) -> None:
        self._memory[:] = struct.pack("qq", loaded, begun)

    def read(self) -> tuple[int, int]:
        loaded, begun = struct.unpack("qq", self._memory[:])
        return loaded, begun


def main() -> None:
    folder, seed, kills, num_ranks, mirror = Path(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5]
    moments, notes, met = random.Random(seed), Notes(), Counter[str]()
    least, is_lost, longest_s = 0, False, 0.5
    if mirror.startswith("s3://"):
        import s3fs  # noqa: F401  # here, not after each fork

        longest_s = 1.5
    for number in range(kills + 1):
        notes.write(-1, -1)
        # while it fetches, or while it saves and sends
        delay_s = moments.uniform(0.0, longest_s / 5 if is_lost and moments.random() < 0.7 else longest_s)
        fork_ranks(folder, num_ranks, mirror, notes, is_last=number == kills, delay_s=delay_s)
        loaded, begun = notes.read()
        met["before it had loaded"] += loaded < 0
        met["with a part of a checkpoint left"] += bool(list((folder / "run" / "checkpoints").glob(".partial-*")))
        if loaded >= 0:
            assert loaded >= least, f"start {number} went on from {loaded}, {least} was whole"
            met["and came back from the mirror"] += is_lost and loaded > 0
            # when a save begins, the one before is published
            least, is_lost = max(loaded, begun - 1), False
        if number % 3 == 2 and number < kills:
            shutil.rmtree(folder / "run", ignore_errors=True)
            least, is_lost = newest_there(mirror), True
    print(dict(met))


def newest_there(mirror: str) -> int:
    """The newest step that a folder holds whole; 0 for a bucket, which is not looked into."""
    steps = [int(path.name[5:]) for path in Path(mirror).glob("step_*") if damage(path) is None]
    return max(steps, default=0)


def fork_ranks(folder: Path, num_ranks: int, mirror: str, notes: Notes, is_last: bool, delay_s: float) -> None:
    """Start the ranks and kill them after `delay_s`, one a little before the others; the last start ends by itself."""
    store = folder / "store"
    store.unlink(missing_ok=True)
    ranks = []
    for rank in range(num_ranks):
        process = os.fork()
        if process == 0:
            os._exit(run_rank(folder / "run", World(rank, num_ranks, rank, torch.device("cpu")), store, mirror, notes, is_last))
        ranks.append(process)
    if not is_last:
        time.sleep(delay_s)
        for process in ranks:
            os.kill(process, signal.SIGKILL)
            time.sleep(0.005)
    for process in ranks:
        _, status = os.waitpid(process, 0)
        expected = {0} if is_last else {-signal.SIGKILL, LOST_A_RANK}
        assert os.waitstatus_to_exitcode(status) in expected, "a start failed by itself"


def run_rank(folder: Path, world: World, store: Path, mirror: str, notes: Notes, is_last: bool) -> int:
    """The exit code of a rank that is not killed."""
    try:
        run(folder, world, store, mirror, notes, is_last)
    except BaseException as error:
        is_ours = isinstance(error, (AssertionError, RunError)) or world.size == 1
        if is_ours:
            traceback.print_exc()
        return 1 if is_ours else LOST_A_RANK
    return 0


def run(folder: Path, world: World, store: Path, mirror: str, notes: Notes, is_last: bool) -> None:
    """A start: load, check every value, then save step after step."""
    dist.init_process_group("gloo", store=dist.FileStore(str(store), world.size), rank=world.rank, world_size=world.size)
    expected = LAYOUTS["cut together"](make_whole(0, SHAPES), world.rank, world.size)
    shard = blank(expected)
    checkpointer = Checkpointer(folder, world, CheckpointConfig(keep=2, mirror=mirror), {}).attach(lambda: shard)
    state = load_newest(checkpointer) or TrainState()
    if state.step:
        write_step(expected, state.step)
        assert_equal(shard, expected)
        assert state.samples == 10 * state.step
    if world.is_main:
        notes.write(state.step, state.step)
    loaded = state.step
    while not is_last:
        state.step += 1
        state.samples += 10
        write_step(shard, state.step)
        checkpointer.save(state)
        if world.is_main:
            notes.write(loaded, state.step)
        checkpointer.poll()
    checkpointer.finish()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
