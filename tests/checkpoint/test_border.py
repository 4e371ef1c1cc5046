"""A stage's model filled from the checkpoint of the stage before: any layout from any other, and a run's own calls."""

import itertools
import logging

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fake_shards import FROZEN, LAYOUTS, SHAPES, Whole, assert_equal, blank, load_newest, make_whole, write
from scaleclip.checkpoint.border import Border, Changes, fill_across, merge
from scaleclip.checkpoint.loading import Reader, rank_files
from scaleclip.checkpoint.rank_file import read_pieces
from scaleclip.checkpoint.shard import Shard
from scaleclip.errors import RunError

BEFORE = make_whole(1, {**SHAPES, "positions": (5, 3)})
# `none` and `locked.bias` are gone, `head` is new, `pair` is locked and `locked.weight` learns, `positions` are more
SHAPES_AFTER = {name: shape for name, shape in SHAPES.items() if name not in ("none", "pair")}
SHAPES_AFTER |= {"positions": (8, 3), "head": (3, 5), "locked.weight": FROZEN["locked.weight"]}
FRESH = make_whole(2, SHAPES_AFTER, {"pair": (2,), "locked.head": (4,)})


def fit(name: str, whole: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Positions alone; the interpolation overshoots, as a bicubic one may."""
    if name != "positions":
        return None
    return 3 * interpolate(whole.T[None], shape[0], mode="linear").squeeze(0).T - 1


def expected(keeps_optimizer: bool) -> Whole:
    """The state after the border."""
    after = {name: {kind: tensor.clone() for kind, tensor in tensors.items()} for name, tensors in FRESH.items()}
    for name, tensors in after.items():
        for kind, tensor in tensors.items():
            found = BEFORE.get(name, {}).get(kind)
            if kind != "weight" and (found is None or not keeps_optimizer):
                tensor.zero_()
            elif found is not None:
                tensor.copy_(found if name != "positions" else fit(name, found, (8, 3)))
    after["positions"]["exp_avg_sq"].clamp_(min=0)
    return after


def cross_border(path, shard: Shard, border: Border, fresh: dict[str, Tensor] | None = None) -> Changes:
    pieces = {name: read_pieces(path / name) for name in rank_files(path)}
    return fill_across(shard, path, pieces, border, {} if fresh is None else fresh)


def live(shard: Shard) -> Shard:
    """A copy that has trained: its moments and scalars are not those of a start."""
    fragments = [
        fragment._replace(
            tensors={kind: tensor.clone() if kind == "weight" else tensor * 0 + 7 for kind, tensor in fragment.tensors.items()}
        )
        for fragment in shard.fragments
    ]
    return Shard(fragments, {"adam_step": torch.tensor(9.0), "good_steps": torch.tensor([9, 9])})


def check_scalars(shard: Shard, keeps_optimizer: bool) -> None:
    assert shard.scalars["adam_step"] == (0.5 if keeps_optimizer else 0)
    assert shard.scalars["good_steps"].tolist() == [0, -1]


@pytest.mark.parametrize("keeps_optimizer", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_goes_on_from_any_other(tmp_path, layout, keeps_optimizer):
    path = write(tmp_path, [LAYOUTS[layout](BEFORE, rank, 3) for rank in range(3)])
    for cut, size in itertools.product(LAYOUTS.values(), (1, 2, 3, 4)):
        found = []
        for rank in range(size):
            shard = live(cut(FRESH, rank, size))
            found.append(cross_border(path, shard, Border(4, keeps_optimizer, fit)))
            assert_equal(shard._replace(scalars={}), cut(expected(keeps_optimizer), rank, size)._replace(scalars={}))
            check_scalars(shard, keeps_optimizer)
        changes = merge(found)
        assert changes.present == FRESH.keys()
        assert changes.resized == {"positions"}
        assert changes.fresh == {"head", "locked.head"}
        assert changes.new_moments == ({"locked.weight"} if keeps_optimizer else set())


def test_only_what_is_resized_is_read_whole(tmp_path, monkeypatch):
    path = write(tmp_path, [LAYOUTS["cut each"](BEFORE, 0, 1)])
    read, whole = [], Reader.whole
    monkeypatch.setattr(Reader, "whole", lambda self, name, kind: read.append((name, kind)) or whole(self, name, kind))
    cross_border(path, live(LAYOUTS["cut each"](FRESH, 0, 1)), Border(4, True, fit))
    assert sorted(read) == [("positions", kind) for kind in ("exp_avg", "exp_avg_sq", "weight")]


def test_a_shape_that_cannot_be_resized_is_named(tmp_path):
    path = write(tmp_path, [LAYOUTS["cut together"](BEFORE, 0, 1)])
    shard = LAYOUTS["replicated"](make_whole(0, {**SHAPES, "conv": (2, 27)}), 0, 1)
    with pytest.raises(RunError, match=r"has conv with shape \(2, 3, 3, 3\), this model with \(2, 27\): it was saved with"):
        cross_border(path, shard, Border(4, True, fit))


def test_moments_that_cannot_be_resized_are_zero(tmp_path):
    path = write(tmp_path, [LAYOUTS["replicated"](BEFORE, 0, 1)])
    answers = iter([fit("positions", BEFORE["positions"]["weight"], (8, 3)), None, None])
    shard = LAYOUTS["replicated"](make_whole(0, {"positions": (8, 3)}, {}), 0, 1)
    changes = cross_border(path, shard, Border(4, True, lambda *_: next(answers)))
    [fragment] = shard.fragments
    assert torch.equal(fragment.tensors["weight"], expected(True)["positions"]["weight"].flatten())
    assert not fragment.tensors["exp_avg"].any()
    assert not fragment.tensors["exp_avg_sq"].any()
    assert changes.new_moments == {"positions"}


def test_elements_that_nobody_saved_are_named(tmp_path):
    shards = [LAYOUTS["cut each"](BEFORE, rank, 4) for rank in range(4)]
    path = write(tmp_path, [shards[0], shards[1], shards[3]])
    with pytest.raises(RunError, match=r"lacks weight of body\.weight from element 18 on"):
        cross_border(path, live(LAYOUTS["replicated"](FRESH, 0, 1)), Border(4, True, fit))


def test_what_the_checkpoint_lacks_is_fresh_again_after_a_roll_back(tmp_path):
    path = write(tmp_path, [LAYOUTS["replicated"](BEFORE, 0, 1)])
    shard, fresh = live(LAYOUTS["cut each"](FRESH, 0, 1)), {}
    # the stage before had another precision
    shard.scalars["loss_scale"] = torch.tensor(65536.0)
    for _ in range(2):
        cross_border(path, shard, Border(4, True, fit), fresh)
        assert_equal(shard._replace(scalars={}), LAYOUTS["cut each"](expected(True), 0, 1)._replace(scalars={}))
        assert shard.scalars["loss_scale"] == 65536
        for fragment in shard.fragments:
            for tensor in fragment.tensors.values():
                tensor.add_(1)
        shard.scalars["loss_scale"].fill_(2)


def test_changes_are_told_in_a_line():
    changes = Changes(frozenset("abc"), frozenset("a"), frozenset(f"c{number}" for number in range(5)), frozenset())
    assert changes.told(["a", "b", "x"]) == "resized: a; left fresh: c0, c1, c2 and 2 more; dropped: x"
    assert Changes(frozenset("a")).told(["a"]) == "same parameters"


@pytest.mark.parametrize("step", [7, 8])
def test_only_the_borders_own_step_is_lenient(open_run, caplog, step):
    first = open_run()
    first.save(step)
    second = open_run()
    second.shard = blank(LAYOUTS["cut together"](make_whole(0, {**SHAPES, "conv": (5,)}), 0, 1))
    border = Border(7, False, lambda name, whole, shape: whole.flatten()[:5])
    if step == 8:
        with pytest.raises(RunError, match=r"has conv with shape \(2, 3, 3, 3\), this model with \(5,\)"):
            load_newest(second.checkpointer, border=border)
        return
    with caplog.at_level(logging.INFO, "scaleclip"):
        state = load_newest(second.checkpointer, border=border)
    assert state is not None
    assert (state.step, state.faults) == (7, {"tiny/missing": 7})
    assert "a stage begins at step 7: optimizer state reset; resized: conv" in caplog.text
    before = {fragment.name: fragment for fragment in first.expected(7).fragments}
    for fragment in second.shard.fragments:
        moments = [tensor for kind, tensor in fragment.tensors.items() if kind != "weight"]
        assert torch.equal(fragment.tensors["weight"], before[fragment.name].tensors["weight"][: fragment.length])
        assert not any(tensor.any() for tensor in moments)
    with pytest.raises(RunError, match="has conv with shape"):
        load_newest(second.checkpointer)


def test_a_checkpoint_that_the_stage_itself_saved_at_the_border_loads_too(open_run):
    """As a stop right after it leaves behind."""
    first = open_run()
    first.save(7)
    second = open_run()
    assert load_newest(second.checkpointer, border=Border(7, True, fit)) is not None
    assert_equal(second.shard, first.expected(7))
