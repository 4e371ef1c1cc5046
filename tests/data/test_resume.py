"""Exact resume: keys, pixels and tokens of every later batch, whatever the ranks, the workers and the kind of shards."""

import random
from pathlib import Path

import pytest
import torch
import yaml

from conftest import write_shards, write_tiny_config
from helpers import make_sample, write_tar
from scaleclip.config import CacheConfig, RunConfig
from scaleclip.config_io import load_config
from scaleclip.data.batches import TrainBatches
from scaleclip.data.cache import ShardCache
from scaleclip.data.convert import to_mds
from scaleclip.data.loader import Batch, TrainDataset
from scaleclip.data.mixture import rank_slots
from scaleclip.data.source import open_sources
from scaleclip.data.subset import Choice, write_subset
from scaleclip.data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("demo", 32)
NUM_BATCHES, GLOBAL_BATCH = 40, 8
KINDS = ("tar", "mds", "mixture", "subset")
RANKS, WORKERS = (1, 2, 4, 3), (0, 4, 1)


def write_config(folder: Path, kind: str) -> Path:
    """A run's configuration over shards of a kind, with everything random that a loader has."""
    shards, cache = write_shards(folder / "shards"), ShardCache(CacheConfig(folder=str(folder / "cache")))
    tars = {"shards": f"{shards}/*.tar", "texts": {"caption": "txt", "name": "json:captions.name"}, "concept": "json:concept"}
    mds = {**tars, "shards": f"{folder}/mds/index.json"}
    paths = [str(path) for path in sorted(shards.glob("*.tar"))]
    if kind in ("mds", "mixture"):
        list(to_mds(paths, folder / "mds", cache, workers=1, compression="zstd", hashes=("sha1",)))
    if kind == "subset":
        list(write_subset(paths, None, cache, folder / "part", Choice(where="concept != 'c2'"), workers=1))
    sources = {
        "tar": {"only": tars},
        "mds": {"only": mds},
        "subset": {"only": {**tars, "manifest": str(folder / "part")}},
        "mixture": {"first": {**tars, "weight": 1.0}, "second": {**mds, "weight": 2.0}},
    }[kind]
    path = write_tiny_config(folder, shards)
    tree = yaml.safe_load(path.read_text())
    tree["data"] |= {
        "sources": sources,
        "views": [{"texts": {"caption": 0.6, "name": 0.4}}, {"texts": ["caption"], "max_tokens": 5, "keep": "random"}],
        "crop_scale": [0.2, 0.9],
        "flip_probability": 0.5,
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def open_rank(config: RunConfig, rank: int, world_size: int) -> TrainDataset:
    cache = ShardCache(config.data.cache)
    return TrainDataset(config, open_sources(config.data.sources, cache), cache, TOKENIZER, rank, world_size)


def read(path: Path, first: int, last: int, world_size: int, workers: int) -> list[list[Batch]]:
    """Batches [first, last) of every rank, by fresh processes."""
    config = load_config(path, [f"data.workers={workers}"])
    found = []
    for rank in range(world_size):
        batches = TrainBatches(open_rank(config, rank, world_size), first, last, config.data)
        found.append(list(batches))
        batches.close()
    return found


def assert_same(parts: list[Batch], whole: Batch) -> None:
    """The ranks' shares are the global batch."""
    assert sum((part.keys for part in parts), ())[:GLOBAL_BATCH] == whole.keys
    for name in ("pixels_BCHW", "ids_B", "valid_B", "seeds_B"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts])[:GLOBAL_BATCH], getattr(whole, name)), name
    for view, tokens in enumerate(whole.tokens_BT):
        assert torch.equal(torch.cat([part.tokens_BT[view] for part in parts])[:GLOBAL_BATCH], tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_exactly_after_20_stops(tmp_path, kind):
    path = write_config(tmp_path, kind)
    (undisturbed,) = read(path, 0, NUM_BATCHES, 1, 0)
    stops = sorted(random.Random(kind).sample(range(1, NUM_BATCHES), 20))
    for number, (first, last) in enumerate(zip([0, *stops], [*stops, NUM_BATCHES], strict=True)):
        # processes that are forked cost a second, so three of the stops change their number
        workers = WORKERS[number % 3] if number in (4, 11, 17) else 0
        ranks = read(path, first, last, RANKS[number % 4], workers)
        for batch in range(first, last):
            assert_same([found[batch - first] for found in ranks], undisturbed[batch])


def test_mds_has_the_batches_of_the_tars_it_was_made_from(tmp_path):
    tars, mds = (write_config(tmp_path / kind, kind) for kind in ("tar", "mds") if not (tmp_path / kind).mkdir())
    for left, right in zip(read(tars, 0, 12, 1, 0)[0], read(mds, 0, 12, 1, 0)[0], strict=True):
        assert_same([left], right)


def test_a_mixture_counts_its_sources_and_faults_by_name(tmp_path):
    path = write_config(tmp_path, "mixture")
    write_tar(tmp_path / "shards" / "00001.tar", [make_sample(i, jpg=b"\xff\xd8\xffno") for i in range(9, 13)])
    (batches,) = read(path, 0, NUM_BATCHES, 1, 0)
    for batch in batches:
        faults = [fault.source for fault in batch.faults]
        assert set(faults) <= {"first"}, "the copy in MDS is whole"
        assert batch.counts.get("source/first", 0) + len(faults) == 2
        assert batch.counts["source/second"] == 6
    assert sum(len(batch.faults) for batch in batches) >= 4


def test_ranks_read_their_own_streams_only(tmp_path):
    """Two ranks share no shard but the one in which their ranges meet."""
    config = load_config(write_config(tmp_path, "tar"))
    touched = []
    for rank in range(2):
        dataset = open_rank(config, rank, 2)
        assert rank_slots(GLOBAL_BATCH, rank, 2) == (4 * rank, 4 * rank + 4)
        touched.append({int(shard) for batch in range(4) for shard in dataset.slots(batch).shard_N})
    assert len(touched[0] & touched[1]) <= 1
