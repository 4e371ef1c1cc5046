"""The Triton kernels under the names that a backend has (`panels.py` says what they do).

A module of its own, imported where it is asked for: the rest of the package works without triton.
"""

import triton

from scaleclip_kernels.triton_sigmoid import sigmoid_block
from scaleclip_kernels.triton_softmax import fold_softmax, softmax_gradients

IS_INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET=1 was set: kernels are bound when they are imported."""

__all__ = ["IS_INTERPRETED", "fold_softmax", "sigmoid_block", "softmax_gradients"]
