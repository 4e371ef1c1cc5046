"""The kernel that adds up the parts of sums, as it is launched. It multiplies nothing: only what it takes is of interest."""

from dataclasses import dataclass
from pathlib import Path

from kernel_inspection.compiled import Resources, build
from kernel_inspection.variants import Signature
from scaleclip_kernels.triton_softmax import FOLD_BLOCK, FOLD_TILES, fold_sums_kernel

KERNEL = "fold_sums"
NUM_SUMS = (2, 4)
"""Of a row or column, without and with positives."""


@dataclass(frozen=True)
class Fold:
    """One compilation."""

    architecture: str
    num_sums: int

    @property
    def name(self) -> str:
        return f"{self.architecture} {KERNEL} K={self.num_sums}"


def inspect_fold(fold: Fold, dump: Path | None = None) -> Resources:
    """As `compiled.build`."""
    constants = {"K": fold.num_sums, "BLOCK": FOLD_BLOCK, "TILES": FOLD_TILES}
    types = {"partials": "*fp32", "sums": "*fp32", "size": "i32", "num_tiles": "i32", **dict.fromkeys(constants, "constexpr")}
    signature = Signature(types, constants, {"partials", "sums"})
    return build(fold_sums_kernel, signature, fold.architecture, {"num_warps": 4}, fold.name, dump).resources
