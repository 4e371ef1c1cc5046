"""The losses in plain PyTorch: the definition that every other backend is tested against. Stores the N x N logits.

Symmetric softmax: CLIP, Radford et al., arXiv 2103.00020. Several positives: L_out of SupCon, Khosla et al.,
arXiv 2004.11362.

Shapes: N pairs, D feature dims.
"""

import torch
from torch import Tensor


def softmax_contrastive_loss(
    x_ND: Tensor,
    y_ND: Tensor,
    logit_scale: Tensor,
    *,
    valid_N: Tensor | None = None,
    ids_N: Tensor | None = None,
    duplicates: str = "negative",
) -> Tensor:
    """Mean over valid pairs of (row cross-entropy + column cross-entropy) / 2, in fp32, or fp64 for fp64 features.

    The arguments mean what they mean in `scaleclip_kernels.softmax_contrastive_loss`, which checks them.
    """
    num_pairs, device = len(x_ND), x_ND.device
    valid_N = torch.ones(num_pairs, dtype=torch.bool, device=device) if valid_N is None else valid_N
    matched_NN = torch.eye(num_pairs, dtype=torch.bool, device=device)
    both_valid_NN = valid_N.unsqueeze(1) & valid_N
    duplicate_NN = torch.zeros_like(matched_NN)
    if duplicates != "negative" and ids_N is not None:
        duplicate_NN = (ids_N.unsqueeze(1) == ids_N) & both_valid_NN & ~matched_NN

    # An invalid pair keeps itself as its only candidate: a finite loss, which the mean then leaves out.
    candidate_NN = both_valid_NN | matched_NN
    if duplicates == "ignore":
        candidate_NN = candidate_NN & ~duplicate_NN
    positive_NN = matched_NN | duplicate_NN if duplicates == "positive" else matched_NN

    with torch.autocast(device.type, enabled=False):
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        # masked_fill, not a product: an invalid row may hold NaN.
        x_ND = x_ND.to(dtype).masked_fill(~valid_N.unsqueeze(1), 0)
        y_ND = y_ND.to(dtype).masked_fill(~valid_N.unsqueeze(1), 0)
        logits_NN = logit_scale.to(dtype) * (x_ND @ y_ND.T)
        row_loss_N = _cross_entropy(logits_NN, candidate_NN, positive_NN)
        column_loss_N = _cross_entropy(logits_NN.T, candidate_NN, positive_NN)  # both masks are symmetric
        return 0.5 * ((row_loss_N + column_loss_N) * valid_N).sum() / valid_N.sum().clamp(min=1)


def _cross_entropy(logits_NN: Tensor, candidate_NN: Tensor, positive_NN: Tensor) -> Tensor:
    """Row i: the mean over its positives of -log softmax over its candidates."""
    normaliser_N = logits_NN.masked_fill(~candidate_NN, -torch.inf).logsumexp(dim=1)
    log_prob_NN = logits_NN - normaliser_N.unsqueeze(1)
    return -log_prob_NN.masked_fill(~positive_NN, 0).sum(dim=1) / positive_NN.sum(dim=1)
