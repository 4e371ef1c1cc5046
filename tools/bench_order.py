"""The order of samples at scale: cost of a position, quality of the shuffle, shards that a node reads.

python tools/bench_order.py                           600,000 shards of 9,750 samples: LAION-5B's size
python tools/bench_order.py --shards 41456            LAION-400M's
python tools/bench_order.py --csv order.csv --plot order.png

The quality is compared on 1,000 shards of some 1,000 samples with webdataset's buffers as open_clip sets them (2,000 shards,
then 5,000 samples a worker, which here are five shards) and with MosaicML's py1e (blocks of 262,144 samples, which here are a
stream's whole range). Costs are CPU time of one process; nothing is read from a disk but the manifest.
"""

import argparse
import contextlib
import io
import resource
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from bounds import Row, report
from scaleclip.config import CacheConfig
from scaleclip.config_io import parse_config
from scaleclip.data.batches import TrainBatches
from scaleclip.data.cache import ShardCache
from scaleclip.data.loader import TrainDataset
from scaleclip.data.manifest import write_table
from scaleclip.data.mixture import BatchOrder, rank_slots
from scaleclip.data.source import open_shards, open_sources
from scaleclip.data.tokenizer import load_tokenizer
from scaleclip.data.webdataset import TarReader

Ints = NDArray[np.int64]
GLOBAL_BATCH, STREAMS, SHUFFLE_SHARDS, SEEK_RANKS = 32_768, 128, 4, 64
# of the comparison: small enough to lay out whole
FEW_BATCH = 4096
FEW_COUNTS = np.random.default_rng(0).integers(800, 1200, size=1000)
FEW_SHARDS, FEW_SAMPLES = len(FEW_COUNTS), int(FEW_COUNTS.sum())
RANKS_A_NODE, WORKERS_A_RANK = 8, 4
# open_clip's buffers: size, and how much they hold before the first goes out
SHARD_BUFFER, SAMPLE_BUFFER = (2000, 500), (5000, 1000)
PY1E_BLOCK = 1 << 18  # streaming's default


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=600_000, help="shards of the large data set")
    parser.add_argument("--samples", type=int, default=9_750, help="samples of each of them")
    parser.add_argument("--batches", type=int, default=200, help="batches whose positions are timed")
    parser.add_argument("--csv", type=Path, help="append the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw where the samples of a rank come from")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as a loader process has
    console = Console(width=None if sys.stdout.isatty() else 140)
    with console.status("positions"):
        rows = cost(options.shards, options.samples, options.batches)
    with console.status("a seek"):
        rows.append(seek(options.shards, options.samples))
    with console.status("shards a node reads"):
        rows += [cold_bytes(nodes) for nodes in (2, 4, 8)]
    reads = {}
    for name, order in ORDERS.items():
        with console.status(f"shuffle of {name}"):
            reads[name] = order()
            rows += quality(name, reads[name])
    if options.plot:
        draw(options.plot, reads)
    return report(rows, console, options.csv)


def cost(num_shards: int, num_samples: int, num_batches: int) -> list[Row]:
    """CPU time and memory of start and positions."""
    with tempfile.TemporaryDirectory() as folder:
        write_table(Path(folder), [f"{n:06d}.tar" for n in range(num_shards)], [num_samples] * num_shards)
        start = time.process_time()
        pattern = f"s3://laion/{{000000..{num_shards - 1:06d}}}.tar"
        manifest, _ = open_shards("SHARDS", [pattern], folder, ShardCache(CacheConfig(folder=folder)))
        order = BatchOrder(
            {"laion": manifest.counts},
            {"laion": None},
            seed=0,
            global_batch=GLOBAL_BATCH,
            canonical_streams=STREAMS,
            shuffle_shards=SHUFFLE_SHARDS,
        )
        assert manifest.fingerprint
        started = time.process_time() - start
    last = 3 * manifest.num_samples // GLOBAL_BATCH
    batches = np.random.default_rng(0).integers(last, size=num_batches).tolist()
    within: list[float] = []
    across: list[float] = []
    order.slots(0, 0, GLOBAL_BATCH)
    known = {0}
    for batch in sorted(batches):
        start = time.process_time()
        epochs = set(np.unique(order.slots(batch, 0, GLOBAL_BATCH).epoch_N).tolist())
        (within if epochs <= known else across).append(1000 * (time.process_time() - start))
        known |= epochs
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    size = f"{num_shards:,} shards, {manifest.num_samples:,} samples"
    rows = [
        Row(f"start, {size}", started, "CPU-s", "<= 5"),
        Row(f"positions of a batch of {GLOBAL_BATCH:,}, median", statistics.median(within), "CPU-ms", "<= 50"),
        Row("positions of a batch, slowest", max(within), "CPU-ms", "<= 50"),
        Row("peak memory of the process", peak, "GiB", "<= 1"),
    ]
    if across:
        # an epoch's shards are permuted once, which is part of its first batch
        rows.append(Row("positions of the first batch of an epoch, slowest", max(across), "CPU-ms"))
    return rows


def seek(num_shards: int, num_samples: int) -> Row:
    """From nothing to the first batch of rank 0 of 64 in the middle of the data set, whose shards are all one real tar."""
    with tempfile.TemporaryDirectory() as folder:
        picture = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)).save(picture, "JPEG")
        with webdataset_tar(Path(folder) / "real.tar") as add:
            for number in range(num_samples):
                add(f"{number:09d}.jpg", picture.getvalue())
                add(f"{number:09d}.txt", f"picture {number}".encode())
        names = [f"{number:06d}.tar" for number in range(num_shards)]
        write_table(Path(folder), names, [num_samples] * num_shards)
        config = parse_config(
            {
                "data": {
                    "sources": {"laion": {"shards": f"{folder}/{{000000..{num_shards - 1:06d}}}.tar", "manifest": folder}},
                    "cache": {"folder": f"{folder}/cache"},
                    "workers": 0,
                },
                "train": {"global_batch": GLOBAL_BATCH, "samples": num_shards * num_samples},
            }
        )
        start = time.process_time()
        cache = ShardCache(config.data.cache)
        (source,) = open_sources(config.data.sources, cache)
        # every shard is the same file under another name, without 600,000 links
        source.reader = TarReader([f"{folder}/real.tar"] * num_shards, cache)
        dataset = TrainDataset(config, [source], cache, load_tokenizer("clip", 77), 0, SEEK_RANKS)
        middle = num_shards * num_samples // GLOBAL_BATCH // 2
        batches = TrainBatches(dataset, middle, middle + 1, config.data)
        batch = next(batches)
        spent = time.process_time() - start
    assert batch.valid_B.all()
    return Row(f"first batch of rank 0 of {SEEK_RANKS} after a seek to the middle, start included", spent, "CPU-s", "<= 5")


@contextlib.contextmanager
def webdataset_tar(path: Path) -> Iterator[Callable[[str, bytes], None]]:
    """A tar; the value adds a file to it."""
    with tarfile.open(path, "w") as tar:

        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

        yield add


def _few(global_batch: int = FEW_BATCH) -> BatchOrder:
    return BatchOrder(
        {"few": FEW_COUNTS},
        {"few": None},
        seed=0,
        global_batch=global_batch,
        canonical_streams=STREAMS,
        shuffle_shards=SHUFFLE_SHARDS,
    )


def cold_bytes(nodes: int) -> Row:
    """What the busiest node reads in an epoch, in samples of the shards it touches, as a multiple of its share."""
    order, world_size = _few(), nodes * RANKS_A_NODE
    touched: list[set[int]] = [set() for _ in range(nodes)]
    for batch in range(FEW_SAMPLES // FEW_BATCH):
        for node, shards in enumerate(touched):
            first, _ = rank_slots(FEW_BATCH, node * RANKS_A_NODE, world_size)
            _, last = rank_slots(FEW_BATCH, (node + 1) * RANKS_A_NODE - 1, world_size)
            shards |= set(np.unique(order.slots(batch, first, last).shard_N).tolist())
    most = max(int(FEW_COUNTS[list(shards)].sum()) for shards in touched)
    return Row(f"cold bytes of a node, {nodes} nodes", most * nodes / FEW_SAMPLES, "x data set / nodes", "<= 1.1")


def ours() -> Ints:
    """Number in the data set of each sample of an epoch, [batches, FEW_BATCH]."""
    order, first = _few(), np.cumsum(FEW_COUNTS) - FEW_COUNTS
    slots = [order.slots(batch, 0, FEW_BATCH) for batch in range(FEW_SAMPLES // FEW_BATCH)]
    return np.stack([first[slot.shard_N] + slot.index_N for slot in slots])


def webdatasets_buffer() -> Ints:
    """As open_clip trains on 8 ranks x 4 workers: whole batches of a rank come from one worker after the other."""
    import webdataset

    first, ranks = np.cumsum(FEW_COUNTS) - FEW_COUNTS, []
    size, initial = SHARD_BUFFER
    # the same in every worker, which then takes every 32nd
    shards = list(webdataset.detshuffle(size, initial=initial, seed=0).run(iter(range(FEW_SHARDS))))
    size, initial = SAMPLE_BUFFER
    for rank in range(RANKS_A_NODE):
        workers = []
        for worker in range(WORKERS_A_RANK):
            mine = shards[rank * WORKERS_A_RANK + worker :: RANKS_A_NODE * WORKERS_A_RANK]
            samples = (int(first[shard]) + index for shard in mine for index in range(FEW_COUNTS[shard]))
            shuffle = webdataset.shuffle(size, initial=initial, seed=rank * 100 + worker)
            workers.append(np.array(list(shuffle(samples))))
        share = FEW_BATCH // RANKS_A_NODE
        whole = min(len(each) for each in workers) // share
        batches = np.stack([each[: whole * share].reshape(whole, share) for each in workers], axis=1)
        ranks.append(batches.reshape(-1, share))
    fewest = min(len(each) for each in ranks)
    return np.concatenate([each[:fewest] for each in ranks], axis=1)


def py1e() -> Ints:
    """streaming's own permutation for 128 canonical nodes, a batch taking as many from each."""
    from streaming.base.shuffle import get_shuffle

    ids = get_shuffle("py1e", FEW_COUNTS, STREAMS, 0, 0, PY1E_BLOCK)
    starts = np.arange(STREAMS + 1) * FEW_SAMPLES // STREAMS
    share = FEW_BATCH // STREAMS
    batches = FEW_SAMPLES // FEW_BATCH
    return np.concatenate([ids[start : start + batches * share].reshape(batches, share) for start in starts[:-1]], axis=1)


ORDERS: dict[str, Callable[[], Ints]] = {
    "scaleclip": ours,
    "webdataset's buffer (open_clip's settings)": webdatasets_buffer,
    "streaming's py1e": py1e,
}


def quality(name: str, reads: Ints) -> list[Row]:
    """How well an order mixes: shards in a batch, and how far apart neighbours in a shard are read."""
    shard_of = np.repeat(np.arange(FEW_SHARDS), FEW_COUNTS)
    shards = np.mean([len(np.unique(shard_of[batch])) for batch in reads])
    batch_of = np.full(FEW_SAMPLES, -1)
    batch_of[reads] = np.arange(len(reads))[:, None]
    left, right = batch_of[:-1], batch_of[1:]
    near = (left >= 0) & (right >= 0) & (shard_of[:-1] == shard_of[1:])
    apart = np.abs(left - right)[near]
    return [
        Row(f"{name}: shards in a batch of {FEW_BATCH:,}", float(shards), f"of {FEW_SHARDS:,}"),
        Row(f"{name}: batches between neighbours in a shard, median", float(np.median(apart)), f"of {len(reads)}"),
        Row(f"{name}: neighbours in one batch", 100 * float(np.mean(apart == 0)), f"% (by chance {100 / len(reads):.2g})"),
    ]


def draw(path: Path, reads: dict[str, Ints]) -> None:
    """Place in the data set of the samples that rank 0 of 8 reads, over the epoch."""
    import matplotlib.pyplot as plt

    shard_of = np.repeat(np.arange(FEW_SHARDS), FEW_COUNTS)
    figure, axes = plt.subplots(1, len(reads), figsize=(13, 4), sharey=True, layout="constrained")
    for axis, (name, order) in zip(axes, reads.items(), strict=True):
        mine = order[:, : FEW_BATCH // RANKS_A_NODE]
        batch = np.repeat(np.arange(len(mine)), mine.shape[1])
        some = np.random.default_rng(0).permutation(batch.size)[:20_000]
        axis.plot(batch[some], shard_of[mine.ravel()[some]], ",", color="black")
        axis.set(title=name, xlabel="global batch")
    axes[0].set_ylabel("shard that a sample of rank 0 lies in")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
