"""What a step makes of captions; tests/test_equivalence.py takes whole steps."""

import torch

from scaleclip.distributed import World
from scaleclip.losses.objective import CAPTION
from scaleclip.models.dual_encoder import Features
from scaleclip.step import _Captions


def test_a_batch_without_a_caption_adds_nothing_and_leaves_gradients_finite() -> None:
    captions = _Captions([torch.zeros(4, dtype=torch.int64)], World(0, 1, 0, torch.device("cpu")))
    weight = torch.ones((), requires_grad=True)
    one = torch.ones(4, 2)
    features = Features(one, (one,), logit_scale=torch.ones(()), logit_bias=None, caption_loss=weight * 0)
    term = captions.term(features)[CAPTION]
    term.backward()
    assert term == 0
    assert weight.grad == 0
    assert captions.total() == {CAPTION: torch.zeros(())}
