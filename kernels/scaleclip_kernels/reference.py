"""The losses in plain PyTorch: the definition that every other backend is tested against. Stores the N x M logits.

Softmax: CLIP, arXiv 2103.00020; several positives: L_out of SupCon, arXiv 2004.11362. Sigmoid: SigLIP, arXiv 2303.15343.

Shapes: N pairs, V views, M columns, D feature dims; L columns of one view.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

if TYPE_CHECKING:
    from scaleclip_kernels.arguments import Pairs


def softmax_contrastive_loss(
    x_ND: Tensor, y_MD: Tensor, logit_scale: Tensor, pairs: "Pairs", weights: tuple[float, float], compute_dtype: torch.dtype
) -> Tensor:
    """What `scaleclip_kernels.softmax_contrastive_loss` returns, in fp32, or in fp64 for fp64 features."""
    losses = []
    for logits_NL, matched_NL, valid_NL, duplicate_NL in _views(x_ND, y_MD, logit_scale, None, pairs, compute_dtype):
        counted_N = (matched_NL & valid_NL).any(dim=1)
        # What is invalid keeps its match as its only candidate: a finite loss, which the mean then leaves out.
        candidate_NL = valid_NL | matched_NL
        if pairs.duplicates == "ignore":
            candidate_NL = candidate_NL & ~duplicate_NL
        positive_NL = matched_NL | duplicate_NL if pairs.duplicates == "positive" else matched_NL
        num_rows = len(logits_NL)
        row_loss_N = _cross_entropy(logits_NL, candidate_NL, positive_NL)
        column_loss_N = _cross_entropy(*(matrix[:, :num_rows].T for matrix in (logits_NL, candidate_NL, positive_NL)))
        loss_N = weights[0] * row_loss_N + weights[1] * column_loss_N
        losses.append((loss_N * counted_N).sum() / counted_N.sum().clamp(min=1))
    return torch.stack(losses).mean()


def sigmoid_contrastive_loss(
    x_ND: Tensor, y_MD: Tensor, logit_scale: Tensor, logit_bias: Tensor, pairs: "Pairs", compute_dtype: torch.dtype
) -> Tensor:
    """What `scaleclip_kernels.sigmoid_contrastive_loss` returns, in fp32, or in fp64 for fp64 features."""
    losses = []
    for logits_NL, matched_NL, valid_NL, duplicate_NL in _views(x_ND, y_MD, logit_scale, logit_bias, pairs, compute_dtype):
        counted_NL = valid_NL & ~duplicate_NL if pairs.duplicates == "ignore" else valid_NL
        positive_NL = matched_NL | duplicate_NL if pairs.duplicates == "positive" else matched_NL
        loss_NL = -logsigmoid(torch.where(positive_NL, logits_NL, -logits_NL))
        losses.append((loss_NL * counted_NL).sum() / (matched_NL & valid_NL).sum().clamp(min=1))
    return torch.stack(losses).mean()


def _views(
    x_ND: Tensor,
    y_MD: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    pairs: "Pairs",
    compute_dtype: torch.dtype,
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Each view's logits [N, L] and which of them are matched, valid, and duplicates of a match."""
    device, num_rows = x_ND.device, len(x_ND)
    valid_N = torch.ones(num_rows, dtype=torch.bool, device=device) if pairs.valid is None else pairs.valid
    valid_M = torch.ones(len(y_MD), dtype=torch.bool, device=device) if pairs.column_valid is None else pairs.column_valid
    dtype = torch.promote_types(compute_dtype, torch.float32)
    views = []
    with torch.autocast(device.type, enabled=False):
        # masked_fill, not a product: what is invalid may hold NaN
        x_ND = x_ND.to(compute_dtype).to(dtype).masked_fill(~valid_N.unsqueeze(1), 0)
        y_MD = y_MD.to(compute_dtype).to(dtype).masked_fill(~valid_M.unsqueeze(1), 0)
        for view in pairs.view_slices():
            columns = slice(view.start, view.stop + pairs.extras)
            logits_NL = logit_scale.to(dtype) * (x_ND @ y_MD[columns].T)
            if logit_bias is not None:
                logits_NL = logits_NL + logit_bias.to(dtype)
            matched_NL = torch.eye(*logits_NL.shape, dtype=torch.bool, device=device)
            valid_NL = valid_N.unsqueeze(1) & valid_M[columns]
            duplicate_NL = torch.zeros_like(matched_NL)
            if pairs.ids is not None and pairs.column_ids is not None:
                duplicate_NL = (pairs.ids.unsqueeze(1) == pairs.column_ids[columns]) & valid_NL & ~matched_NL
            views.append((logits_NL, matched_NL, valid_NL, duplicate_NL))
    return views


def _cross_entropy(logits_NL: Tensor, candidate_NL: Tensor, positive_NL: Tensor) -> Tensor:
    """Row i: the mean over its positives of -log softmax over its candidates."""
    normaliser_N = logits_NL.masked_fill(~candidate_NL, -torch.inf).logsumexp(dim=1)
    log_prob_NL = logits_NL - normaliser_N.unsqueeze(1)
    return -log_prob_NL.masked_fill(~positive_NL, 0).sum(dim=1) / positive_NL.sum(dim=1)
