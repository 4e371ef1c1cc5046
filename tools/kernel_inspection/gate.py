"""What the machine code of every kernel must hold to: checked in CI, where no GPU is."""

import re

from kernel_inspection.baseline import Row
from kernel_inspection.chips import CHIPS
from kernel_inspection.compiled import Report, Resources
from kernel_inspection.pool import Failure
from kernel_inspection.variants import Variant
from scaleclip_kernels.tuning import Kernel, Products

REFRESH = "python tools/inspect_kernels.py --csv tools/results/kernels_aot.csv"
GROWTH = 1.02
"""Of an epilogue ratio over the recorded one: more than a compiler's noise."""
BOUNDS: dict[tuple[str, Kernel], float] = {("sm90", "softmax_sums"): 0.55, ("sm90", "softmax_gradients"): 0.45}
"""Of epilogue ratios of 16-bit products where all pairs count: beside the matrix units there must be time for memory."""
KNOWN_SPILLS = {"sm90 softmax_sums fp16 plain": (24, 10)}
"""Bytes of stack a thread and instructions on it, beside the main loop, of variants whose launch is by a tenth the fastest of
bf16 features. What they cost fp16 was not timed."""
INSTRUCTIONS: dict[str, dict[Products, str]] = {
    "sm80": {"16 bits": r"m16n8k16", "tf32x3": r"m16n8k8"},
    "sm90": {"16 bits": r"m64n\d+k16", "tf32x3": r"m64n\d+k8"},
    "sm100": {"16 bits": r"tcgen05\.mma", "tf32x3": r"tcgen05\.mma"},
    "gfx942": {"16 bits": r"32x32x8|16x16x16", "ieee": r"32x32x2|16x16x4"},
}
"""That products must be made with; with fused multiply-adds where nothing is said."""


def variant_faults(variant: Variant, found: Report | Failure, recorded: Row | None) -> list[str]:
    """What is wrong, a line each; the variant is named by the caller."""
    if isinstance(found, Failure):
        return [f"does not compile: {found.reason}"]
    faults = resource_faults(variant.architecture, found, KNOWN_SPILLS.get(variant.name, (0, 0)))
    faults += [_instruction_fault(found), _path_fault(found), _bound_fault(found), _growth_fault(found, recorded)]
    return [fault for fault in faults if fault]


def resource_faults(architecture: str, found: Resources | Failure, known_spills: tuple[int, int] = (0, 0)) -> list[str]:
    """Of any kernel."""
    if isinstance(found, Failure):
        return [f"does not compile: {found.reason}"]
    faults = []
    if found.stack_bytes > known_spills[0] or found.spills > known_spills[1]:
        faults.append(f"spills: {found.stack_bytes} bytes of stack a thread, {found.spills} instructions on it")
    limit = CHIPS[architecture].shared_bytes
    if found.shared_bytes > limit:
        faults.append(f"{found.shared_bytes} bytes of shared memory do not fit {architecture}'s {limit}")
    return faults


def _instruction_fault(report: Report) -> str:
    expected = INSTRUCTIONS[report.variant.architecture].get(report.variant.products)
    found = sorted(report.matrix_instructions)
    if expected is None:
        return f"matrix instructions {', '.join(found)} where fp32 products must be exact" if found else ""
    if found and all(re.fullmatch(expected, shape) for shape in found):
        return ""
    return f"matrix instructions are {', '.join(found) or 'none'}, not {expected}"


def _path_fault(report: Report) -> str:
    """Every logit has an exponential: a path with fewer is no tile's, and its cycles say nothing."""
    launch = report.variant.launch
    threads = launch.num_warps * CHIPS[report.variant.architecture].target[2]
    least, found = launch.block_rows * launch.block_columns / threads, report.code.ordinary.pipes.get("special", 0)
    if found >= least:
        return ""
    return f"the path that is taken for an ordinary tile's has {found} exponentials for {least:.0f} logits a thread"


def _bound_fault(report: Report) -> str:
    variant = report.variant
    bound = BOUNDS.get((variant.architecture, variant.kernel))
    if bound is None or variant.products != "16 bits" or variant.options != "plain" or report.epilogue_ratio <= bound:
        return ""
    return f"epilogue ratio {report.epilogue_ratio:.3f} ({report.busiest_pipe}) is above {bound}"


def _growth_fault(report: Report, recorded: Row | None) -> str:
    if recorded is None:
        return f"the baseline has no row: refresh with {REFRESH}"
    if recorded.launch != report.variant.launch:
        return f"the baseline has another launch: refresh with {REFRESH}"
    before, now = recorded.numbers.epilogue_ratio, report.epilogue_ratio
    if now <= before * GROWTH:
        return ""
    return (
        f"epilogue ratio grew from {before:.3f} ({recorded.numbers.busiest_pipe}, {recorded.commit}, Triton {recorded.triton}) "
        f"to {now:.3f} ({report.busiest_pipe}); where that is meant: {REFRESH}"
    )
