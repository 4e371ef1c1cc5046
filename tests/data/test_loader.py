"""From a batch's number to its tensors: faults in their place, and resume from any place with any ranks and workers."""

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from conftest import write_tiny_config
from helpers import make_sample, write_tar
from scaleclip.config_io import load_config
from scaleclip.data import batches as loading
from scaleclip.data import loader
from scaleclip.data.batches import TrainBatches
from scaleclip.data.cache import ShardCache
from scaleclip.data.loader import TrainDataset
from scaleclip.data.sample import SampleError
from scaleclip.data.source import open_sources
from scaleclip.data.text_pairs import open_text_pairs
from scaleclip.data.tokenizer import load_tokenizer
from scaleclip.errors import RunError

TOKENIZER = load_tokenizer("demo", 32)


def open_dataset(config_path, overrides=(), *, rank=0, world_size=1, micro_batch=None):
    config = load_config(config_path, overrides)
    cache = ShardCache(config.data.cache)
    sources, pairs = open_sources(config.data.sources, cache), open_text_pairs(config, cache, TOKENIZER)
    return config, TrainDataset(config, sources, cache, TOKENIZER, rank, world_size, micro_batch, pairs)


def read(config, dataset, first, last):
    """Batches by TrainBatches, whose processes end with them."""
    batches = TrainBatches(dataset, first, last, config.data)
    try:
        return list(batches)
    finally:
        batches.close()


def causes(batch):
    return dict(Counter(fault.cause for fault in batch.faults))


def assert_equal(left, right):
    assert left.keys == right.keys
    assert left.faults == right.faults
    for a, b in zip(left.tokens_BT + left[:1] + left[2:5], right.tokens_BT + right[:1] + right[2:5], strict=True):
        assert torch.equal(a, b)


def test_an_epoch_of_batches_holds_every_sample(tiny_config):
    _, dataset = open_dataset(tiny_config)
    batches = [dataset[b] for b in range(4)]
    assert sorted(key for batch in batches for key in batch.keys) == [f"{i:09d}" for i in range(32)]
    for batch in batches:
        assert batch.pixels_BCHW.shape == (8, 3, 32, 32)
        assert batch.pixels_BCHW.dtype == torch.uint8
        assert batch.valid_B.all()
        assert batch.faults == ()
        for slot, key in enumerate(batch.keys):
            assert torch.equal(batch.tokens_BT[0][slot], TOKENIZER([f"a picture of thing {int(key)}"])[0])


def test_ids_mark_the_same_concept(tiny_config):
    _, dataset = open_dataset(tiny_config)
    batch = dataset[0]
    for i, left in enumerate(batch.keys):
        for j, right in enumerate(batch.keys):
            assert (batch.ids_B[i] == batch.ids_B[j]) == (int(left) % 5 == int(right) % 5)
    _, without = open_dataset(tiny_config, ["data.sources.tiny.concept=null", "loss.duplicates=negative"])
    assert len(set(without[0].ids_B.tolist())) == 8


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_and_start_change_nothing(tiny_config, workers):
    config, dataset = open_dataset(tiny_config, [f"data.workers={workers}"])
    batches = read(config, dataset, 5, 9)
    assert len(batches) == 4
    for number, batch in enumerate(batches, start=5):
        assert_equal(batch, dataset[number])


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_out_the_batch_of_one_process(tiny_config, world_size):
    _, whole = open_dataset(tiny_config)
    parts = [open_dataset(tiny_config, rank=rank, world_size=world_size)[1][6] for rank in range(world_size)]
    for field in ("pixels_BCHW", "ids_B", "valid_B", "seeds_B"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts])[:8], getattr(whole[6], field))
    assert sum((part.keys for part in parts), ())[:8] == whole[6].keys
    padding = torch.cat([part.valid_B for part in parts])[8:]
    assert len(padding) == (1 if world_size == 3 else 0)
    assert not padding.any()


def test_augmentation_changes_with_the_epoch_and_the_seed(tiny_config):
    _, dataset = open_dataset(tiny_config, ["data.crop_scale=[0.2, 0.6]"])
    _, other = open_dataset(tiny_config, ["data.crop_scale=[0.2, 0.6]", "run.seed=1"])

    def pictures(data, batches):
        return {key: data[b].pixels_BCHW[slot] for b in batches for slot, key in enumerate(data[b].keys)}

    first, second, seeded = pictures(dataset, range(4)), pictures(dataset, range(4, 8)), pictures(other, range(4))
    assert sum(torch.equal(first[key], second[key]) for key in first) <= 1
    assert sum(torch.equal(first[key], seeded[key]) for key in first) <= 1


BAD = {
    "undecodable_image": {"jpg": b"\xff\xd8\xffnonsense"},
    "empty_caption": {"txt": b"  \n"},
    "bad_json": {"json": b"{"},
    "no_image": {"jpg": None},
    "bad_json ": {"json": b'{"concept": ["a", "b"]}'},
    "undecodable_image ": {"jpg": b"II*\0" + bytes(range(60))},
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_stays_in_its_place_and_is_counted(tiny_config, shards, case, workers):
    cause = case.strip()
    _, whole = open_dataset(tiny_config)
    expected = [whole[b] for b in range(4)]
    write_tar(shards / "00001.tar", [make_sample(i, **(BAD[case] if i == 11 else {})) for i in range(9, 13)])
    config, dataset = open_dataset(tiny_config, [f"data.workers={workers}"])
    batches = read(config, dataset, 0, 4)
    for batch, good in zip(batches, expected, strict=True):
        slots = [slot for slot, key in enumerate(good.keys) if key == "000000011"]
        assert causes(batch) == ({cause: 1} if slots else {})
        assert batch.valid_B.tolist() == [slot not in slots for slot in range(8)]
        assert [key for key in batch.keys if key] == [key for key in good.keys if key != "000000011"]
        for slot in slots:
            assert batch.pixels_BCHW[slot].count_nonzero() == 0
    assert sum(len(batch.faults) for batch in batches) == 1


def test_a_fault_says_where_the_sample_lies(tiny_config, shards):
    write_tar(shards / "00001.tar", [make_sample(i, **({"txt": b"\xff"} if i == 11 else {})) for i in range(9, 13)])
    _, dataset = open_dataset(tiny_config)
    (fault,) = [fault for b in range(4) for fault in dataset[b].faults]
    assert fault[:4] == ("tiny", str(shards / "00001.tar"), 2, "undecodable_text")


def test_a_truncated_tar_loses_only_what_is_cut_off(tiny_config, shards):
    path = shards / "00002.tar"
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"000000020.jpg") + 600])
    _, dataset = open_dataset(tiny_config)
    epoch = [dataset[b] for b in range(4)]
    assert sum(causes(batch).get("truncated_shard", 0) for batch in epoch) == 5
    assert sum(batch.valid_B.sum().item() for batch in epoch) == 32 - 5


def test_a_wrong_count_makes_invalid_slots(tiny_config, shards):
    (shards / "00003_stats.json").write_text(json.dumps({"successes": 9}))
    _, dataset = open_dataset(tiny_config)
    epoch = [dataset[b] for b in range(5)]
    assert sum(causes(batch).get("missing_sample", 0) for batch in epoch) >= 2


def test_a_shard_that_vanishes_is_counted(tiny_config, shards):
    _, dataset = open_dataset(tiny_config)
    os.unlink(shards / "00001.tar")
    assert sum(causes(dataset[b]).get("missing_shard", 0) for b in range(4)) == 4


def test_half_a_surrogate_pair_is_replaced(tiny_config, shards):
    half = b'{"captions": {"caption": "a \\ud800 b"}, "concept": "\\ud800"}'
    write_tar(shards / "00001.tar", [make_sample(i, json=half) for i in range(9, 13)])
    _, dataset = open_dataset(tiny_config, ["data.sources.tiny.texts.caption=json:captions.caption"])
    batches = [dataset[b] for b in range(4)]
    found = [slot for b in batches for slot, key in enumerate(b.keys) if 9 <= int(key or 0) < 13]
    assert len(found) == 4


def test_views_are_texts_of_their_own_and_their_mix_is_counted(tiny_config):
    views = 'data.views=[{"texts": {"caption": 0.8, "name": 0.2}}, {"texts": ["name"], "max_tokens": 5}]'
    texts = "data.sources.tiny.texts={caption: txt, name: json:captions.name}"
    _, dataset = open_dataset(tiny_config, [views, texts])
    batches = [dataset[b] for b in range(40)]
    assert [tokens.shape for tokens in batches[0].tokens_BT] == [(8, 32), (8, 32)], "as wide as the widest"
    for slot, key in enumerate(batches[0].keys):
        tokens = batches[0].tokens_BT[1][slot]
        assert torch.equal(tokens[:5], TOKENIZER([f"thing {int(key)}"], max_tokens=5)[0])
        assert (tokens[5:] == TOKENIZER.pad_id).all()
    counts = sum((Counter(batch.counts) for batch in batches), Counter())
    assert counts["source/tiny"] == counts["text/1/name"] == 320
    assert 0.14 < counts["text/0/name"] / 320 < 0.27
    assert counts["text/0/name"] + counts["text/0/caption"] == 320


def test_a_projector_gets_two_further_views_that_a_seed_decides(tiny_config):
    plain = open_dataset(tiny_config)[1][3]
    assert plain.augmented_BCHW == ()
    batch, again = (open_dataset(tiny_config, ["model.projector={}"])[1][3] for _ in range(2))
    first, second = batch.augmented_BCHW
    assert first.shape == second.shape == (8, 3, 32, 32)
    assert first.dtype == torch.uint8
    assert all((first[slot] != second[slot]).any() for slot in range(8))
    assert torch.equal(batch.pixels_BCHW, plain.pixels_BCHW), "what was drawn before stays"
    for view, same in zip(batch.augmented_BCHW, again.augmented_BCHW, strict=True):
        assert torch.equal(view, same)
    other = open_dataset(tiny_config, ["model.projector={}", "run.seed=1"])[1]
    assert not any(torch.equal(other[b].augmented_BCHW[0], first) for b in range(4))


def test_a_caption_to_write_comes_with_its_length(tiny_config, shards):
    write_tar(shards / "00000.tar", [make_sample(i, txt=b"! one thing after another" if i else None) for i in range(9)])
    overrides = ["model.caption_decoder={queries: 5}", "data.caption={texts: [caption]}", "data.views=[{texts: [name]}]"]
    overrides += ["data.sources.tiny.texts={caption: txt, name: json:captions.name}"]
    _, dataset = open_dataset(tiny_config, overrides)
    lengths = Counter()
    for number in range(4):
        batch = dataset[number]
        assert batch.captions_BS.shape == (8, 6)
        for slot, key in enumerate(batch.keys):
            length = int(batch.caption_lengths_B[slot])
            lengths[length] += 1
            if not key:
                assert not batch.valid_B[slot]
                assert length == 0
                continue
            text = "! one thing after another" if int(key) < 9 else f"a picture of thing {int(key)}"
            whole = TOKENIZER([text])[0]
            wanted = whole[: int((whole == TOKENIZER.end_id).int().argmax()) + 1]
            assert length == min(len(wanted) - 1, 5), "without the start token, with the end"
            assert batch.captions_BS[slot, 0] == TOKENIZER.start_id
            assert batch.captions_BS[slot, length] == TOKENIZER.end_id
    assert lengths[0] == 1, "the sample without a caption"
    assert open_dataset(tiny_config)[1][0].captions_BS is None


def test_batches_of_texts_are_cut_like_those_of_images(tiny_config, tmp_path):
    rows = [{"query": f"what {i}", "positive": f"that {i}", "negatives": [f"no {i}", f"not {i}"]} for i in range(20)]
    rows[3]["query"] = " "
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"data.text_pairs.sources.rows={{files: {tmp_path}/rows.jsonl, negatives: negatives}}"
    overrides = [source, "data.text_pairs.num_negatives=2", "data.views=[{max_tokens: 8}]"]
    whole = open_dataset(tiny_config, overrides)[1]
    ranks = [open_dataset(tiny_config, overrides, rank=rank, world_size=3, micro_batch=2)[1] for rank in range(3)]
    faults = []
    for number in range(6):
        batch = whole[number]
        assert len(batch.pairs_BT) == 4
        assert {tokens.shape for tokens in (*batch.pairs_BT, *batch.tokens_BT)} == {(8, 32)}, "one width for the text tower"
        chunks = [dataset[number * dataset.num_chunks + chunk] for dataset in ranks for chunk in range(dataset.num_chunks)]
        for place, tokens_BT in enumerate(batch.pairs_BT):
            assert torch.equal(torch.cat([chunk.pairs_BT[place] for chunk in chunks])[:8], tokens_BT)
        pairs_valid_B = torch.cat([chunk.pairs_valid_B for chunk in chunks])
        assert torch.equal(pairs_valid_B[:8], batch.pairs_valid_B)
        assert not pairs_valid_B[8:].any()
        faults += batch.faults
        assert batch.counts["text_pairs/rows"] == batch.pairs_valid_B.sum() == len(list(filter(None, batch.pairs_keys)))
    assert {(fault.source, fault.cause, fault.sample) for fault in faults} == {("text_pairs/rows", "empty_caption", 3)}


def test_the_loader_says_where_its_time_goes(tiny_config):
    _, dataset = open_dataset(tiny_config)
    assert list(dataset[0].stage_s) == ["collate", "fetch", "read", "caption", "decode", "resize", "tokenize"]


def worker_pids(batches):
    return [worker.pid for worker in batches._batches._workers]


def test_what_a_failure_took_counts_to_its_stage(tiny_config, monkeypatch):
    _, dataset = open_dataset(tiny_config)
    now = [0.0]
    monkeypatch.setattr(loader.time, "perf_counter", lambda: now[0])

    def fetch(shard):
        now[0] += 5
        raise SampleError("unreachable_shard", "after five seconds")

    monkeypatch.setattr(dataset.sources[0].reader, "fetch", fetch)
    batch = dataset[0]
    assert causes(batch) == {"unreachable_shard": 8}
    assert {stage: spent for stage, spent in batch.stage_s.items() if spent} == {"fetch": 40.0}


def own_mib(pids):
    """Memory of processes that they do not share with others."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


@pytest.mark.slow
def test_memory_of_eight_workers_stays_flat_over_1000_batches(tmp_path):
    """Over 16 epochs of 200 shards of which each comes and goes. Every sixth batch kept would add 12 MiB."""
    (tmp_path / "shards").mkdir()
    for shard in range(200):
        write_tar(tmp_path / "shards" / f"{shard:05d}.tar", [make_sample(10 * shard + i) for i in range(10)])
    path = write_tiny_config(tmp_path, tmp_path / "shards")
    config, dataset = open_dataset(path, ["data.workers=8", "train.global_batch=32", "data.canonical_streams=16"])
    batches = TrainBatches(dataset, 0, 1000, config.data)
    at = {}
    for number, _ in enumerate(batches, start=1):
        if number in (250, 500, 750, 980):
            at[number] = own_mib([os.getpid(), *worker_pids(batches)])
    batches.close()
    assert max(at.values()) < at[250] + 12, at


@pytest.mark.parametrize("killed_at", [0, 3])
def test_a_killed_worker_loses_nothing(tiny_config, killed_at):
    config, dataset = open_dataset(tiny_config, ["data.workers=2"])
    batches = TrainBatches(dataset, 0, 12, config.data)
    found = []
    for number in range(12):
        if number == killed_at:
            for pid in worker_pids(batches):
                os.kill(pid, signal.SIGKILL)
        found.append(next(batches))
    assert batches.lost_workers >= 1
    for number, batch in enumerate(found):
        assert_equal(batch, dataset[number])
    with pytest.raises(StopIteration):
        next(batches)


def test_a_worker_that_dies_while_it_holds_a_lock_is_replaced(tiny_config):
    config, dataset = open_dataset(tiny_config, ["data.workers=1"])
    batches = TrainBatches(dataset, 0, 4, config.data)
    # as if the process had been killed while it asked whether to end
    batches._batches._workers_done_event._event._cond.acquire()
    os.kill(worker_pids(batches)[0], signal.SIGKILL)
    for number in range(4):
        assert_equal(next(batches), dataset[number])
    assert batches.lost_workers >= 1
    batches.close()


def hang_at_start(started, worker):
    time.sleep(600)


def test_a_worker_that_hangs_at_its_start_is_replaced(tiny_config, monkeypatch):
    config, dataset = open_dataset(tiny_config, ["data.workers=2"])
    start = loading._start_worker
    monkeypatch.setattr(loading, "_START_S", 0.5)
    monkeypatch.setattr(loading, "_start_worker", hang_at_start)

    def next_ones_start(reason):
        monkeypatch.setattr(loading, "_start_worker", start)
        monkeypatch.setattr(loading, "_START_S", 30.0)

    monkeypatch.setattr(loading._log, "warning", next_ones_start)
    batches = TrainBatches(dataset, 0, 12, config.data)
    assert batches.lost_workers == 1
    for number, batch in enumerate(batches):
        assert_equal(batch, dataset[number])


def test_workers_that_hang_at_every_start_end_the_run(tiny_config, monkeypatch):
    config, dataset = open_dataset(tiny_config, ["data.workers=1"])
    monkeypatch.setattr(loading, "_MOST_DEATHS", 1)
    monkeypatch.setattr(loading, "_START_S", 0.2)
    monkeypatch.setattr(loading, "_start_worker", hang_at_start)
    with pytest.raises(RunError, match=r"lost 2 times at batch 7 \(a loader process did not start within"):
        TrainBatches(dataset, 7, 12, config.data)
    for child in multiprocessing.active_children():
        child.kill()


@pytest.mark.slow
def test_workers_that_die_at_every_start_end_the_run(tiny_config, monkeypatch):
    config, dataset = open_dataset(tiny_config, ["data.workers=1"])
    monkeypatch.setattr(loading, "_MOST_DEATHS", 1)
    monkeypatch.setattr(TrainDataset, "__getitem__", lambda self, batch: os.kill(os.getpid(), signal.SIGKILL))
    batches = TrainBatches(dataset, 7, 12, config.data)
    with pytest.raises(RunError, match=r"loader processes were lost 2 times at batch 7 .*data\.workers=0"):
        next(batches)
    batches.close()


def test_an_error_in_a_worker_is_no_death(tiny_config, monkeypatch):
    config, dataset = open_dataset(tiny_config, ["data.workers=1"])

    def fail(self, batch):
        raise RuntimeError("a bug")

    monkeypatch.setattr(TrainDataset, "__getitem__", fail)
    batches = TrainBatches(dataset, 0, 4, config.data)
    with pytest.raises(RuntimeError, match="a bug"):
        next(batches)
    assert batches.lost_workers == 0
    batches.close()
