"""Cross-entropy of tokens under a linear head, without the logits of all tokens ever lying in memory together.

At 65,536 tokens and CLIP's 49,408 words the logits are 13 GB in fp32. Here they are made for a chunk of tokens at a time, and
their gradients are carried back to states and head at once, as Liger (arXiv:2410.10989) does: each logit is computed once, and
what waits for the backward pass is as large as the inputs.

Dimensions: N tokens, n tokens of a chunk, V words of the vocabulary, D values of a state.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# 0.2 GB of fp32 logits under CLIP's vocabulary
CHUNK = 1024


def token_loss(states_ND: Tensor, head_VD: Tensor, targets_N: Tensor, counted_N: Tensor, chunk: int = CHUNK) -> Tensor:
    """Sum of -log softmax(states_ND @ head_VD.T)[n, targets_N[n]] over the tokens that count. ().

    Args:
        states_ND: of any floating-point type. Where a token does not count they may be NaN.
        head_VD: logits are computed in autocast's type, or in that of the states without it.
        targets_N: int64. Where a token does not count they may be anything.
        counted_N: bool, the tokens that count.
        chunk: tokens whose logits lie in memory together.

    Returns:
        fp32, in which sums are taken too (fp64 for fp64). It can be differentiated once, by states and head.
    """
    # within the function below autograd is always off
    differentiable = torch.is_grad_enabled()
    loss: Tensor = _TokenLoss.apply(states_ND, head_VD, targets_N, counted_N, chunk, differentiable)
    return loss


def best_tokens(states_ND: Tensor, head_VD: Tensor, chunk: int = CHUNK) -> Tensor:
    """int64 [N], the word of the largest logit for each state; arguments as those of `token_loss`."""
    return torch.cat([F.linear(states_nD, head_VD).argmax(1) for states_nD in torch.split(states_ND, chunk)])


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states_ND: Tensor, head_VD: Tensor, targets_N: Tensor, counted_N: Tensor, chunk: int, differentiable: bool
    ) -> Tensor:
        device_type = states_ND.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else states_ND.dtype
        exact = torch.promote_types(dtype, torch.float32)
        by_states, by_head = (differentiable and needed for needed in ctx.needs_input_grad[:2])

        loss = torch.zeros((), dtype=exact, device=states_ND.device)
        states_grad_ND = torch.empty_like(states_ND) if by_states else None
        head_grad_VD = torch.zeros_like(head_VD, dtype=exact) if by_head else None
        # the head is cast once, not once a chunk
        words_VD = head_VD.to(dtype)
        with torch.autocast(device_type, enabled=False):
            for start in range(0, len(states_ND), chunk):
                part = slice(start, start + chunk)
                states_grad_nD = None if states_grad_ND is None else states_grad_ND[part]
                states_nD, targets_n, counted_n = states_ND[part].to(dtype), targets_N[part], counted_N[part]
                loss += _chunk(states_nD, words_VD, targets_n, counted_n, states_grad_nD, head_grad_VD)
        ctx.save_for_backward(states_grad_ND, None if head_grad_VD is None else head_grad_VD.to(head_VD.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states_grad_ND, head_grad_VD = (None if saved is None else saved * grad for saved in ctx.saved_tensors)
        return states_grad_ND, head_grad_VD, None, None, None, None


def _chunk(
    states_nD: Tensor,
    words_VD: Tensor,
    targets_n: Tensor,
    counted_n: Tensor,
    states_grad_nD: Tensor | None,
    head_grad_VD: Tensor | None,
) -> Tensor:
    """The loss of a chunk. Where given, `states_grad_nD` is filled with its gradient, and to `head_grad_VD` it is added."""
    dtype = states_nD.dtype
    counted_n1 = counted_n.unsqueeze(1)
    states_nD = states_nD.masked_fill(~counted_n1, 0)
    targets_n1 = targets_n.masked_fill(~counted_n, 0).unsqueeze(1)
    # one tensor, in place, from logits to their gradients
    logits_nV = (states_nD @ words_VD.T).to(torch.promote_types(dtype, torch.float32))
    logits_nV -= logits_nV.amax(1, keepdim=True)
    target_logits_n1 = logits_nV.gather(1, targets_n1)
    sums_n1 = logits_nV.exp_().sum(1, keepdim=True)
    loss = (sums_n1.log() - target_logits_n1).masked_fill(~counted_n1, 0).sum()
    if states_grad_nD is not None or head_grad_VD is not None:
        logits_nV *= counted_n1 / sums_n1
        logits_nV.scatter_add_(1, targets_n1, -counted_n1.to(logits_nV.dtype))
        grads_nV = logits_nV.to(dtype)
        if states_grad_nD is not None:
            states_grad_nD.copy_(grads_nV @ words_VD)
        if head_grad_VD is not None:
            head_grad_VD += grads_nV.T @ states_nD
    return loss
