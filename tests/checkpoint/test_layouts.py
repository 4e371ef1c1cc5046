"""A state saved in any layout is loaded in any other, without ranks: each rank's part is written and read in turn."""

import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fake_shards import FROZEN, LAYOUTS, SHAPES, assert_equal, blank, make_whole, scalars_of, write
from scaleclip.checkpoint import loading, snapshot
from scaleclip.checkpoint.background import begin
from scaleclip.checkpoint.folders import newest, write_durable
from scaleclip.checkpoint.rank_file import rank_file, read_pieces
from scaleclip.checkpoint.shard import Shard
from scaleclip.checkpoint.snapshot import Snapshot
from scaleclip.checkpoint.state import STATE, TrainState, read_state
from scaleclip.errors import RunError

WHOLE = make_whole(seed=1)


def read(path: Path, shard: Shard) -> Shard:
    """A shard of this layout, loaded."""
    found = blank(shard)
    loading.fill(found, path, {name: read_pieces(path / name) for name in loading.rank_files(path)})
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_loads_any_other_bit_for_bit(tmp_path, layout, world_size):
    path = write(tmp_path, [LAYOUTS[layout](WHOLE, rank, world_size) for rank in range(world_size)])
    for cut in LAYOUTS.values():
        for size in (1, 2, 3, 4):
            for rank in range(size):
                expected = cut(WHOLE, rank, size)
                assert_equal(read(path, expected), expected)
    weights = loading.load_weights(path)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == SHAPES | FROZEN
    assert all(torch.equal(weights[name], tensors["weight"]) for name, tensors in WHOLE.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_element_is_saved_once_and_by_all_ranks_alike(tmp_path, layout):
    path = write(tmp_path, [LAYOUTS[layout](WHOLE, rank, 3) for rank in range(3)])
    sizes = [sum(piece.length * len(piece.kinds) for piece in read_pieces(path / rank_file(rank))) for rank in range(3)]
    whole = sum(tensor.numel() for tensors in WHOLE.values() for tensor in tensors.values())
    assert sum(sizes) == whole
    # a locked parameter's elements weigh less, and small parameters do not divide
    assert max(sizes) <= whole / 3 + 40


def test_the_buffer_is_made_ready_before_anything_is_copied_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "begin", lambda work: begin(lambda: (time.sleep(0.3), work())))
    fragments = LAYOUTS["replicated"](WHOLE, 0, 1).fragments
    slow = Snapshot(fragments, torch.device("cpu"))
    slow.take(fragments)
    time.sleep(0.4)
    write_durable(tmp_path / "file", slow.blocks())
    assert torch.equal(load_file(tmp_path / "file")["conv[0:54].weight"], WHOLE["conv"]["weight"].flatten())


def test_the_files_are_safetensors(tmp_path):
    path = write(tmp_path, [LAYOUTS["cut each"](WHOLE, rank, 2) for rank in range(2)])
    tensors = load_file(path / rank_file(1))
    assert torch.equal(tensors["body.weight[18:35].exp_avg_sq"], WHOLE["body.weight"]["exp_avg_sq"].flatten()[18:])
    assert "locked.weight[8:15].exp_avg" not in tensors
    with safe_open(path / rank_file(1), "pt") as file:
        assert '["body.weight", [7, 5], 18, 17, ["weight", "exp_avg", "exp_avg_sq"]]' in file.metadata()["pieces"]
    content = (path / rank_file(1)).read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0
    assert torch.equal(load_file(path / "scalars.safetensors")["good_steps"], scalars_of(0)["good_steps"])
    assert newest(tmp_path) == path


def test_a_parameter_that_does_not_fit_is_named(tmp_path):
    path = write(tmp_path, [LAYOUTS["cut together"](WHOLE, rank, 2) for rank in range(2)])

    def load(shapes: dict[str, tuple[int, ...]], frozen: dict[str, tuple[int, ...]] = FROZEN) -> None:
        read(path, LAYOUTS["replicated"](make_whole(0, shapes, frozen), 0, 1))

    load(SHAPES)
    with pytest.raises(RunError, match=r"step_00000004 has no parameter extra: it was saved with other model"):
        load({**SHAPES, "extra": (3,)})
    with pytest.raises(RunError, match=r"has conv with shape \(2, 3, 3, 3\), this model with \(2, 27\)"):
        load({**SHAPES, "conv": (2, 27)})
    with pytest.raises(RunError, match=r"lacks exp_avg of locked\.weight from element 0 on"):
        load({**SHAPES, "locked.weight": (5, 3)}, {"locked.bias": (1,)})
    shard = LAYOUTS["replicated"](WHOLE, 0, 1)
    with pytest.raises(RunError, match=r"has no loss_scale of shape \(\)"):
        read(path, shard._replace(scalars={"loss_scale": torch.tensor(1.0)}))


def test_elements_that_nobody_saved_are_named(tmp_path):
    shards = [LAYOUTS["cut each"](WHOLE, rank, 4) for rank in range(4)]
    path = write(tmp_path, [shards[0], shards[1], shards[3]])
    with pytest.raises(RunError, match=r"lacks weight of body\.weight from element 18 on"):
        read(path, Shard([f for f in LAYOUTS["replicated"](WHOLE, 0, 1).fragments if f.name == "body.weight"], {}))
    with pytest.raises(RunError, match="lacks weight of body"):
        loading.load_weights(path)


def test_a_state_of_another_version_is_refused(tmp_path):
    path = write(tmp_path, [LAYOUTS["replicated"](WHOLE, 0, 1)])
    assert read_state(path) == TrainState(step=4)
    (path / STATE).write_text('{"step": 4, "epoch": 1}')
    with pytest.raises(RunError, match="was written by another version"):
        read_state(path)
