"""The pipelines and their parts, each measured in the process that calls these functions.

All of them get the same shards, the same batch and one thread. What is imported here is imported inside functions, so that a
process carries the pipeline that it measures and no other.
"""

import itertools
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import active_children
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from data_bench.points import CONTEXT_LENGTH, OPEN_CLIP, OURS, STREAMING, WEBDATASET, Answer, Cost, Job
from data_bench.shards import Made, tars

Samples = Iterator[int]
"""Goes over all shards again and again; yields how many samples came, batch by batch or one by one."""

_PROCESS_CLOCK = 2  # CPUCLOCK_SCHED of Linux's clock numbers


def measure(job: Job, made: Made) -> Answer:
    """What a job's point costs."""
    torch.set_num_threads(1)
    point = job.point
    if point.task == "stages":
        return _our_stages(job, made) if point.pipeline == OURS else _open_clip_stages(job, made)
    makers: dict[tuple[str, str], Callable[[Job, Made], Samples]] = {
        ("reader", OURS): _our_reader,
        ("reader", WEBDATASET): _webdataset_reader,
        ("reader", STREAMING): _streaming_reader,
        ("whole", OURS): _our_loader,
        ("whole", OPEN_CLIP): _open_clip_loader,
        ("views", OURS): _our_loader,
    }
    samples = makers[point.task, point.pipeline](job, made)
    return {"whole": _timed(samples, job.least_cpu_s, made.samples)}


def _timed(samples: Samples, least_cpu_s: float, num_samples: int) -> Cost:
    """The cost of whole passes, from the first batch of one to the first batch of a later one."""
    next(samples)
    came, cpu_s, wall_s = 0, _cpu_s(), time.perf_counter()
    while came == 0 or came % num_samples or _cpu_s() - cpu_s < least_cpu_s:
        came += next(samples)
    return Cost(came, _cpu_s() - cpu_s, time.perf_counter() - wall_s)


def _cpu_s() -> float:
    """Of this process and of its loader processes so far."""
    children = [time.clock_gettime(~child.pid << 3 | _PROCESS_CLOCK) for child in active_children() if child.pid]
    return time.process_time() + sum(children)


class _Laps:
    """Processor seconds by part, of a process with one thread."""

    def __init__(self) -> None:
        self.cpu_s: dict[str, float] = {}
        self._last = time.process_time()

    def lap(self, part: str) -> None:
        """Count the time since the last lap to a part."""
        now = time.process_time()
        self.cpu_s[part] = self.cpu_s.get(part, 0.0) + now - self._last
        self._last = now

    def answer(self, samples: int) -> Answer:
        return {part: Cost(samples, cpu_s, cpu_s) for part, cpu_s in self.cpu_s.items()}


def _our_dataset(job: Job, made: Made) -> tuple[Any, Any]:
    """A TrainDataset and its configuration."""
    from scaleclip.config_io import parse_config
    from scaleclip.data.cache import ShardCache
    from scaleclip.data.loader import TrainDataset
    from scaleclip.data.source import open_sources
    from scaleclip.data.tokenizer import load_tokenizer

    shards = tars(job.shards, made.shards) if job.point.format == "tar" else [str(job.shards / "mds" / "index.json")]
    config = parse_config(
        {
            "data": {
                "sources": {"bench": {"shards": shards}},
                "cache": {"folder": str(job.shards / "cache")},
                "workers": job.point.workers,
                "canonical_streams": min(128, job.batch),
            },
            "model": {
                "image": {"size": job.crop},
                "text": {"context_length": CONTEXT_LENGTH},
                "projector": {} if job.point.task == "views" else None,  # which the loader makes further views for
            },
            "train": {"global_batch": job.batch, "samples": made.samples},
        }
    )
    cache = ShardCache(config.data.cache)
    tokenizer = load_tokenizer("clip", CONTEXT_LENGTH)
    sources = open_sources(config.data.sources, cache)
    return TrainDataset(config, sources, cache, tokenizer, rank=0, world_size=1), config


def _our_reader(job: Job, made: Made) -> Samples:
    dataset, _ = _our_dataset(job, made)
    for batch in itertools.count():
        slots = dataset.slots(batch)
        for number, shard, index in zip(slots.source_N, slots.shard_N.tolist(), slots.index_N.tolist(), strict=True):
            source = dataset.sources[number]
            source.reader.fetch(shard)
            sample = source.reader(shard, source.manifest.ordinal(shard, index))
            assert "jpg" in sample.members
            yield 1


def _webdataset_reader(job: Job, made: Made) -> Samples:
    import webdataset

    dataset = webdataset.WebDataset(tars(job.shards, made.shards), shardshuffle=False)
    while True:
        for sample in dataset:
            assert "jpg" in sample
            yield 1


def _streaming_reader(job: Job, made: Made) -> Samples:
    from streaming import LocalDataset

    dataset = LocalDataset(str(job.shards / "mds"))
    while True:
        for number in range(made.samples):
            assert "jpg" in dataset[number]
            yield 1


def _our_loader(job: Job, made: Made) -> Samples:
    from scaleclip.data.batches import TrainBatches

    dataset, config = _our_dataset(job, made)
    for batch in TrainBatches(dataset, 0, sys.maxsize, config.data):
        yield int(batch.valid_B.sum())


def _open_clip_loader(job: Job, made: Made) -> Samples:
    import open_clip

    # which its data sets in CSV need, and nothing here
    with patch.dict(sys.modules, pandas=ModuleType("pandas")):
        from open_clip_train import data as open_clip_data
    # webdataset 1.0 marks the end of a tar with an empty entry, which open_clip, written for 0.2, does not expect
    open_clip_data.tar_file_expander = partial(open_clip_data.tar_file_expander, eof_value=None)

    arguments = Namespace(
        train_data="::".join(tars(job.shards, made.shards)),
        train_num_samples=made.samples,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=job.batch,
        world_size=1,
        workers=job.point.workers,
    )
    transform = open_clip.image_transform(job.crop, is_train=True)
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH)
    loader = open_clip_data.get_wds_dataset(arguments, transform, is_train=True, floor=True, tokenizer=tokenizer).dataloader
    while True:
        for images, _ in loader:
            yield len(images)


def _our_stages(job: Job, made: Made) -> Answer:
    """The loader's own laps, counted in processor time."""
    dataset, _ = _our_dataset(job, made)
    dataset[0]
    spent: dict[str, float] = {}
    with patch.object(time, "perf_counter", time.process_time):
        for number in range(made.samples // job.batch):
            for part, seconds in dataset[number].stage_s.items():
                spent[part] = spent.get(part, 0.0) + seconds
    return {part: Cost(made.samples, seconds, seconds) for part, seconds in spent.items()}


def _open_clip_stages(job: Job, made: Made) -> Answer:
    """What its pipeline does, part after part, a batch at a time."""
    import open_clip
    import webdataset
    from webdataset.autodecode import Decoder, imagehandler
    from webdataset.filters import default_collation_fn

    transform = open_clip.image_transform(job.crop, is_train=True)
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH)
    decode = Decoder([imagehandler("pilrgb")])
    samples = iter(webdataset.WebDataset(tars(job.shards, made.shards), shardshuffle=False))
    laps = _Laps()
    for number in range(made.samples // job.batch):
        batch = [sample for _, sample in zip(range(job.batch), samples, strict=False)]
        laps.lap("read")
        decoded = [decode(sample) for sample in batch]
        laps.lap("decode")
        images = [transform(sample["jpg"]) for sample in decoded]
        laps.lap("resize")
        texts = [tokenizer(sample["txt"])[0] for sample in decoded]
        laps.lap("tokenize")
        default_collation_fn(list(zip(images, texts, strict=True)))
        laps.lap("collate")
        if number == 0:
            # the first batch pays for tables and imports
            laps = _Laps()
    return laps.answer(made.samples - job.batch)
