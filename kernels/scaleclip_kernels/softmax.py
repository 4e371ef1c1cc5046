"""The public symmetric softmax contrastive loss (CLIP, arXiv 2103.00020): checks, gathering, choice of backend.

Shapes: N pairs (a rank's own slice where a group is given), D feature dims.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from scaleclip_kernels import distributed, panels, reference

Duplicates = Literal["negative", "ignore", "positive"]
Backend = Literal["auto", "panels", "reference"]


def softmax_contrastive_loss(
    x_ND: Tensor,
    y_ND: Tensor,
    logit_scale: Tensor,
    *,
    valid: Tensor | None = None,
    ids: Tensor | None = None,
    duplicates: Duplicates = "negative",
    group: ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Mean over the valid pairs of the global batch of (row cross-entropy + column cross-entropy) / 2.

    The logits are logit_scale * x y^T and pair i is (x_i, y_i). Differentiable once (the reference: twice) in x, y and
    logit_scale. A batch with no valid pair has loss 0 and zero gradients.

    Args:
        x_ND, y_ND: (N, D) fp32, bf16 or fp16 features, of unit length for cosine logits. The loss is computed in fp32
            and gradients leave in the inputs' dtype. fp64 works with backend="reference" and then gives fp64.
        logit_scale: () or (1,), the multiplier itself (already exponentiated), kept in fp32.
        valid: (N,) bool; an invalid pair is neither row nor column, and its features may hold anything, NaN included.
        ids: (N,) int64; pairs with equal ids show the same thing (the same caption, say).
        duplicates: what an off-diagonal pair with equal ids is. "negative": a negative, as in CLIP; "ignore": left out
            of the denominators; "positive": one more positive, averaged outside the log (L_out, arXiv 2004.11362).
        group: ranks that hold one slice of the global batch each, all of the same N (pad with invalid pairs), and call
            this together with the same options. None: this process holds the whole batch. Every rank returns the same
            scalar, and the MEAN over ranks of the gradients of parameters and logit_scale is the true gradient.
        backend: "panels" never stores the N x N logits; "reference" does, and is the definition; "auto" takes "panels".

    Returns:
        0-dim fp32 tensor.

    Raises:
        ValueError: an argument breaks a rule above, or the backend cannot run.
    """
    _check(x_ND, y_ND, logit_scale, valid, ids, duplicates, backend)
    if duplicates == "negative":
        ids = None
    if group is not None:
        x_ND, y_ND, valid, ids = distributed.gather_batch(x_ND, y_ND, valid, ids, group)
    module = reference if backend == "reference" else panels
    implementation: Callable[..., Tensor] = module.softmax_contrastive_loss
    return implementation(x_ND, y_ND, logit_scale.reshape(()), valid_N=valid, ids_N=ids, duplicates=duplicates)


def _check(
    x_ND: Tensor,
    y_ND: Tensor,
    logit_scale: Tensor,
    valid: Tensor | None,
    ids: Tensor | None,
    duplicates: str,
    backend: str,
) -> None:
    """Raise ValueError for what a caller can get wrong; looks at shapes, dtypes and devices only, never at values."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend={backend!r} cannot run: this version has no such backend; choose one of {get_args(Backend)}")
    if duplicates not in get_args(Duplicates):
        raise ValueError(f"duplicates={duplicates!r} is not one of {get_args(Duplicates)}")
    if duplicates != "negative" and ids is None:
        raise ValueError(f"duplicates={duplicates!r} needs ids: pass ids of shape (N,), or duplicates='negative'")
    if x_ND.ndim != 2 or x_ND.shape != y_ND.shape:
        raise ValueError(f"x and y must both be (N, D), got {tuple(x_ND.shape)} and {tuple(y_ND.shape)}")
    if x_ND.dtype != y_ND.dtype or not x_ND.is_floating_point():
        raise ValueError(f"x and y must share a floating-point dtype, got {x_ND.dtype} and {y_ND.dtype}: cast one of them")
    if x_ND.dtype == torch.float64 and backend != "reference":
        raise ValueError(f"backend={backend!r} computes in fp32, got fp64 features: cast them, or use backend='reference'")
    if logit_scale.shape not in ((), (1,)):
        raise ValueError(f"logit_scale must have shape () or (1,), got {tuple(logit_scale.shape)}")
    if logit_scale.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logit_scale must be fp32, got {logit_scale.dtype}: in bf16, 98.5 and 98.9 are one number")
    for name, tensor, dtype in (("valid", valid, torch.bool), ("ids", ids, torch.int64)):
        if tensor is not None and (tensor.shape != x_ND.shape[:1] or tensor.dtype != dtype):
            raise ValueError(
                f"{name} must be {dtype} of shape ({len(x_ND)},), got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    for name, tensor in (("y", y_ND), ("logit_scale", logit_scale), ("valid", valid), ("ids", ids)):
        if tensor is not None and tensor.device != x_ND.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x_ND.device}: move them to one device")
