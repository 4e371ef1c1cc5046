"""The gather schedule over gloo ranks: parameter gradients averaged over ranks equal one process's.

Run as a script, this file is one rank (`python test_gather.py RANK FOLDER`): the test starts one process a rank.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from scaleclip_kernels import softmax_contrastive_loss

GLOBAL_BATCH, DIM = 24, 16
NUM_RANKS = 3
GROUPS = {2: [1, 2], 3: [0, 1, 2]}  # by size; in the pair, a rank's number in the group is not its own
CASES = {
    "plain": {"duplicates": "negative"},
    "validity": {"duplicates": "negative", "valid": True},
    "last_rank_invalid": {"duplicates": "ignore", "valid": True},
    "positive": {"duplicates": "positive"},
    "bf16": {"duplicates": "negative", "valid": True},
}
RANK_TIMEOUT_S = 120


def valid_slots(case: str) -> Tensor | None:
    """bool (24,) or None: some slots everywhere invalid, or all of the last rank's, be it of two or of three."""
    if not CASES[case].get("valid"):
        return None
    slot = torch.arange(GLOBAL_BATCH)
    return slot < GLOBAL_BATCH // 2 if case == "last_rank_invalid" else slot % 5 != 1


def step(case: str, part: slice, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """One forward and backward of a toy model on `part` of the global batch: the loss and each parameter's gradient."""
    torch.manual_seed(0)
    towers = nn.ModuleDict({"image": nn.Linear(DIM, 8), "text": nn.Linear(DIM, 8)})
    logit_scale = nn.Parameter(torch.tensor([14.3]))
    image, text = torch.randn(GLOBAL_BATCH, DIM), torch.randn(GLOBAL_BATCH, DIM)
    valid, ids = valid_slots(case), torch.arange(GLOBAL_BATCH) % 10
    x, y = (nn.functional.normalize(towers[name](t[part])) for name, t in (("image", image), ("text", text)))
    if case == "bf16":
        x, y = x.bfloat16(), y.bfloat16()
    loss = softmax_contrastive_loss(
        x,
        y,
        logit_scale,
        valid=None if valid is None else valid[part],
        ids=ids[part],
        duplicates=CASES[case]["duplicates"],
        group=group,
    )
    loss.backward()
    gradients = {name: p.grad for name, p in towers.named_parameters()}
    return {"loss": loss.detach(), "logit_scale": logit_scale.grad, **gradients}


def run_rank(rank: int, folder: Path) -> None:
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    store = dist.FileStore(str(folder / "store"), NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    results = {}
    for ranks in GROUPS.values():
        group = dist.new_group(ranks)
        if rank in ranks:
            num_local = GLOBAL_BATCH // len(ranks)
            start = ranks.index(rank) * num_local
            part = slice(start, start + num_local)
            results[len(ranks)] = {case: step(case, part, group) for case in CASES}
    torch.save(results, folder / f"rank_{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def rank_results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, Any]]:
    """Every rank's results of all groups and cases, from one start of the ranks."""
    folder = tmp_path_factory.mktemp("gather")
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)]) for rank in range(NUM_RANKS)]
    try:
        codes = [rank.wait(timeout=RANK_TIMEOUT_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * NUM_RANKS
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(NUM_RANKS)]


@pytest.mark.parametrize("world_size", GROUPS)
@pytest.mark.parametrize("case", CASES)
def test_mean_over_ranks_is_one_process(rank_results: list[dict[int, Any]], case: str, world_size: int) -> None:
    ranks = [rank_results[rank][world_size][case] for rank in GROUPS[world_size]]
    expected = step(case, slice(None), None)
    assert all(torch.equal(rank["loss"], ranks[0]["loss"]) for rank in ranks)
    assert all(torch.equal(rank["logit_scale"], ranks[0]["logit_scale"]) for rank in ranks)
    for name, true in expected.items():
        mean = torch.stack([rank[name] for rank in ranks]).mean(dim=0)
        # In bf16, W times a feature's gradient is rounded once more unless W is a power of two.
        unit = 2**-7 if case == "bf16" else 2**-20
        torch.testing.assert_close(mean, true, rtol=0, atol=unit * true.abs().max().item())


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
