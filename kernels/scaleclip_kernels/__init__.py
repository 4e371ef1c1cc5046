"""Contrastive losses that never store the similarity matrix; depends on torch alone."""

from scaleclip_kernels.channels import RankError
from scaleclip_kernels.clip_loss import ClipLoss, SigLipLoss
from scaleclip_kernels.sigmoid import sigmoid_contrastive_loss
from scaleclip_kernels.softmax import softmax_contrastive_loss

__all__ = ["ClipLoss", "RankError", "SigLipLoss", "sigmoid_contrastive_loss", "softmax_contrastive_loss"]
