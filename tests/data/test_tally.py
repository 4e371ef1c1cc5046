"""What is said of the batches between two log steps, and the quarantine."""

import json

import pytest

from scaleclip.checkpoint.state import TrainState
from scaleclip.config import RunConfig
from scaleclip.data.loader import Batch
from scaleclip.data.sample import Fault
from scaleclip.data.tally import Quarantine, Tally, merge, read_quarantine
from scaleclip.errors import RunError
from scaleclip.train_stage import _check_data


def make_batch(**changes):
    empty = dict.fromkeys(Batch._fields[:5]) | {
        "keys": (),
        "faults": (),
        "counts": {},
        "cache": {},
        "stage_s": {},
        "ready_s": 0.0,
    }
    return Batch(**empty | changes)


def fault(number, shard="a.tar", cause="undecodable_image"):
    return Fault("laion", shard, number, cause, "why")


def test_a_tally_of_ranks_adds_up():
    tallies = []
    for rank in range(2):
        tally = Tally(lost_workers=rank)
        counts = {"source/laion": 6, "source/cc": 2, "text/0/caption": 4 + rank, "text/0/recap": 4 - rank}
        stages, fetched = {"read": 1.0, "decode": 3.0}, {"downloads": 1}
        batch = make_batch(faults=(fault(rank),), counts=counts, cache=fetched, stage_s=stages, ready_s=11.0)
        tally.add(batch, asked_s=10.0, received_s=12.0)
        tallies.append(tally)
    whole = merge(tallies)
    assert whole.mix() == {"source/cc": 0.25, "source/laion": 0.75, "text/0/caption": 9 / 16, "text/0/recap": 7 / 16}
    assert whole.shares() == {"read": 0.2, "decode": 0.6, "hand-over": 0.2}
    assert (whole.lost_workers, whole.cache["downloads"], len(whole.faults)) == (1, 2, 2)


@pytest.mark.parametrize(("ready_s", "handed_s"), [(3.0, 2.0), (11.0, 1.0), (99.0, 0.0)])
def test_hand_over_is_the_wait_for_what_was_ready(ready_s, handed_s):
    """From the moment that it was both asked for and ready; a clock that is ahead adds nothing."""
    tally = Tally()
    tally.add(make_batch(ready_s=ready_s), asked_s=10.0, received_s=12.0)
    assert tally.stage_s == {"hand-over": handed_s}


def test_nothing_has_no_shares():
    assert Tally().shares() == Tally().mix() == {}


def test_a_quarantine_lists_each_sample_once_and_names_the_worst_shards(tmp_path):
    quarantine = Quarantine(tmp_path)
    quarantine.add([fault(1), fault(2), fault(7, "b.tar")])
    quarantine.add([fault(1)])
    assert quarantine.worst() == "a.tar (laion): 3, b.tar (laion): 1"
    again = Quarantine(tmp_path)
    again.add([fault(2), fault(3)])
    rows = read_quarantine(tmp_path / "quarantine.jsonl")
    assert [(row["shard"], row["sample"]) for row in rows] == [("a.tar", 1), ("a.tar", 2), ("b.tar", 7), ("a.tar", 3)]
    assert rows[0] == fault(1)._asdict()


def test_a_line_that_a_crash_cut_off_harms_no_later_start(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    Quarantine(tmp_path).add([fault(1)])
    path.write_text(path.read_text() + json.dumps(fault(2)._asdict())[:30])
    for number in (3, 4):
        Quarantine(tmp_path).add([fault(number)])
    assert [row["sample"] for row in read_quarantine(path)] == [1, 3, 4]


def test_ranks_without_a_folder_count_alike(tmp_path):
    quarantine = Quarantine(None)
    quarantine.add([fault(1)])
    assert quarantine.worst() == "a.tar (laion): 1"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("faults", "samples", "lately", "message"),
    [
        (11, 100, (0, 100), "11 of the last 100 samples"),
        (10, 100, (10, 100), None),
        (3000, 10**9, (3000, 20_000), "3,000 of the last 20,000 samples"),
        (3000, 10**9, (2000, 20_000), None),
        (50, 10**9, (50, 100), None),  # of too few to say something
    ],
)
def test_too_many_bad_samples_of_all_or_of_the_last_ones_stop_a_run(faults, samples, lately, message):
    state = TrainState(step=1, samples=samples, faults={"laion/missing_shard": faults})
    quarantine = Quarantine(None)
    quarantine.add([fault(1)])
    if message is None:
        _check_data(*lately, state, RunConfig(), quarantine)
    else:
        with pytest.raises(
            RunError,
            match=rf"{message} .*missing_shard.*max_bad_fraction=0\.1; the worst shards: a\.tar.*fault: undecodable_image: why",
        ):
            _check_data(*lately, state, RunConfig(), quarantine)
