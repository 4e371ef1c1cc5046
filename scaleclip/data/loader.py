"""From a batch's number to its tensors: order, read, caption, transform, tokenize.

A batch is a pure function of (config, batch number, rank, world size): loader processes hold no state, augmentation and
caption choice are seeded by (seed, epoch, sample), so a run resumes by asking for the next number. A sample that cannot be
used stays in its place, marked invalid, and is counted by cause.
"""

import hashlib
import os
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from scaleclip.config import RunConfig
from scaleclip.data.captions import choose_text
from scaleclip.data.manifest import Manifest
from scaleclip.data.order import SampleOrder, hash64, rank_slots
from scaleclip.data.tokenizer import Tokenizer
from scaleclip.data.transform import cut, decode, random_crop
from scaleclip.data.webdataset import Sample, SampleError, TarReader

# what a sample's random numbers are for; the number is part of the contract with existing runs
_AUGMENT, _PATCHES = 0, 1


_GRACE_S = 60


class Batch(NamedTuple):
    """A rank's share of a global batch: B slots, in the global batch's order."""

    pixels_BCHW: Tensor
    """uint8; zeros where invalid."""
    tokens_BT: tuple[Tensor, ...]
    """int64, one a text view."""
    ids_B: Tensor
    """int64; equal ones mark pairs of the same concept."""
    valid_B: Tensor
    """bool; False for a sample that could not be used and for slots past the end of the global batch."""
    seeds_B: Tensor
    """int64; a sample's own seed for what the model draws (patch dropout)."""
    keys: tuple[str, ...]
    """Keys of the samples; empty where invalid."""
    faults: dict[str, int]
    """Samples that could not be used, by cause."""


class TrainDataset(Dataset[Batch]):
    """Item b is a rank's share of global batch b."""

    def __init__(self, config: RunConfig, manifest: Manifest, tokenizer: Tokenizer, rank: int, world_size: int) -> None:
        self._data, self._seed, self._size = config.data, config.run.seed, config.model.image.size
        self._manifest, self._tokenizer = manifest, tokenizer
        self._slots = rank_slots(config.train.global_batch, rank, world_size)
        self._read = TarReader(manifest)
        self._order = SampleOrder(
            np.array(manifest.counts),
            seed=config.run.seed,
            global_batch=config.train.global_batch,
            canonical_streams=config.data.canonical_streams,
            shuffle_shards=config.data.shuffle_shards,
        )

    def __getitem__(self, batch: int) -> Batch:
        epoch_B, shard_B, index_B = self._order.positions(batch, *self._slots)
        num_slots = len(shard_B)
        sample_B = self._manifest.first_sample[shard_B] + index_B
        augment_seed_B = hash64(self._seed, _AUGMENT, epoch_B, sample_B)
        pixels_BCHW = torch.zeros(num_slots, 3, self._size, self._size, dtype=torch.uint8)
        # a pair is its own concept unless the data says otherwise
        ids_B = torch.from_numpy(sample_B.copy())
        texts, keys, valid_B = [""] * num_slots, [""] * num_slots, torch.zeros(num_slots, dtype=torch.bool)
        faults: Counter[str] = Counter()
        for slot in np.flatnonzero(shard_B >= 0):
            try:
                sample = self._read(int(shard_B[slot]), int(index_B[slot]))
                random = np.random.Generator(np.random.PCG64(int(augment_seed_B[slot])))
                texts[slot] = choose_text(sample.texts, self._data.texts, random.random())
                image = decode(sample.image)
                height, width = image.shape[1:]
                pixels_BCHW[slot] = cut(image, random_crop(height, width, self._data, random), self._size)
                ids_B[slot] = self._concept(sample, int(ids_B[slot]))
                keys[slot], valid_B[slot] = sample.key, True
            except SampleError as error:
                faults[error.cause] += 1
        seeds_B = torch.from_numpy(hash64(self._seed, _PATCHES, epoch_B, sample_B).astype(np.int64))
        return Batch(pixels_BCHW, (self._tokenizer(texts),), ids_B, valid_B, seeds_B, tuple(keys), dict(faults))

    def _concept(self, sample: Sample, own: int) -> int:
        field = self._data.concept_field
        if field is None or sample.fields.get(field) is None:
            return own
        return _concept_id(str(sample.fields[field]))


def train_batches(dataset: TrainDataset, first: int, last: int, config: RunConfig, *, pin_memory: bool) -> Iterator[Batch]:
    """Batches `first` to `last` - 1 in order, prepared ahead by `data.workers` processes."""
    workers = config.data.workers
    return iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=range(first, last),
            collate_fn=_as_is,
            num_workers=workers,
            prefetch_factor=config.data.prefetch_batches if workers else None,
            worker_init_fn=_start_worker,
            pin_memory=pin_memory,
        )
    )


def _concept_id(name: str) -> int:
    """A string as 63 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()) >> 1


def _as_is(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    # Signals that stop a run are for the training process; srun and a terminal send them to its children too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    # time for the training process to save; then the alarm ends a worker that nobody needs any more
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_GRACE_S))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
