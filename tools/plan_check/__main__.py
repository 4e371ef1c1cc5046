"""One rank of tools/check_plan.py: trains a few steps on made-up pairs and prints how much memory they took.

Arguments: a folder for the ranks to meet in, the micro batch, overrides of the demo's configuration as JSON.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from check_plan import CONFIG, STEPS
from loss_bench.memory import added_bytes
from scaleclip import distributed
from scaleclip.config_io import load_config
from scaleclip.engine import Engine
from scaleclip.equivalence.batches import global_batch, share_chunks
from scaleclip.files import resolve_path
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.step import TrainStep


def main() -> None:
    """Print the bytes that building and training take together at their peak."""
    folder, micro_batch, overrides = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), num_ranks)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    world = distributed.init()
    config = load_config(resolve_path(CONFIG), overrides)
    _load_libraries()

    def train() -> None:
        engine = Engine(config, world)
        step = TrainStep(engine, config, world, micro_batch)
        for number in range(STEPS):
            batch = global_batch(config, engine.model, number)
            step(iter(share_chunks(batch, rank, num_ranks, micro_batch)), number, 1e-4)

    print(added_bytes(train, torch.device("cpu")), flush=True)
    # DeepSpeed and gloo may wait for each other at the interpreter's end
    os._exit(0)


def _load_libraries() -> None:
    """What a first forward and backward pass loads is no part of the model."""
    tiny = load_config(resolve_path(CONFIG), ["model=tiny"])
    model = DualEncoder(tiny.model)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            features = model(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), (torch.ones(8, 32, dtype=torch.int64),))
        (features.image_BE.sum() + features.texts_BE[0].sum()).backward()


if __name__ == "__main__":
    main()
