"""Inf-CL's kernels (arXiv 2410.17243; PyPI `inf-cl`, module inf_cl.flash), compiled as that package launches them."""

import importlib
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from kernel_inspection.compiled import Resources, build
from kernel_inspection.variants import DIM, Signature

KERNELS = {
    "_prob_fwd_kernel": ("Q", "K", "LSE"),
    "_dq_prob_bwd_kernel": ("Q", "K", "dQ", "LSE", "dLSE"),
    "_dk_prob_bwd_kernel": ("Q", "K", "dK", "LSE", "dLSE"),
}
"""Pointers that each takes, all to fp32: the package converts features before it launches."""

HEAD_DIM = 256
BLOCK = 64
NUM_WARPS = 8
_SIZES = ("seqlen_q", "seqlen_k")


@dataclass(frozen=True)
class PeerKernel:
    """One compilation."""

    architecture: str
    kernel: str

    @property
    def name(self) -> str:
        return f"{self.architecture} inf_cl {self.kernel}"


def is_installed() -> bool:
    return find_spec("inf_cl") is not None


def label() -> str:
    return f"inf-cl {version('inf-cl')}"


def inspect_peer(peer: PeerKernel, dump: Path | None = None) -> Resources:
    """As `compiled.build`."""
    assert DIM > HEAD_DIM, "Triton makes a constant of a number of heads that is 1"
    kernel = getattr(importlib.import_module("inf_cl.flash"), peer.kernel)
    pointers = KERNELS[peer.kernel]
    constants = {"BLOCK_HEADDIM": HEAD_DIM, "BLOCK_M": BLOCK, "BLOCK_N": BLOCK}
    types = {**dict.fromkeys(pointers, "*fp32"), "nheads": "i32", **dict.fromkeys(_SIZES, "i32")}
    signature = Signature({**types, **dict.fromkeys(constants, "constexpr")}, constants, {*pointers, *_SIZES})
    options = {"num_warps": NUM_WARPS, "num_stages": 1}
    return build(kernel, signature, peer.architecture, options, peer.name, dump).resources
