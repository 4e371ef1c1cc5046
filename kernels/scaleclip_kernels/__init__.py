"""Contrastive losses that never store the similarity matrix; depends on torch alone."""

from scaleclip_kernels.softmax import softmax_contrastive_loss

__all__ = ["softmax_contrastive_loss"]
