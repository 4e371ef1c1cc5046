"""The record of machine code as kernels/README.md shows it."""

from collections.abc import Iterable

from kernel_inspection.baseline import Row

_HEADER = (
    "| chip | kernel | tile, warps | registers | blocks | shared KiB | matrix units | issue | special | shuffle | busiest |"
)


def table(rows: Iterable[Row]) -> str:
    """Of bf16 features where all pairs count; cycles of the pipes beside the main loop as shares of the matrix units'."""
    lines = [_HEADER, "|---" * (_HEADER.count("|") - 1) + "|"]
    for row in rows:
        key, launch, numbers = row.key, row.launch, row.numbers
        if key.options != "plain" or key.dtype != "bf16":
            continue
        pipes = (numbers.issue_cycles, numbers.special_cycles, numbers.shuffle_cycles)
        cells = [
            key.architecture,
            f"`{key.kernel}`",
            f"{launch.block_rows} x {launch.block_columns} x {launch.block_dim}, {launch.num_warps}",
            str(numbers.registers),
            str(numbers.blocks),
            str(numbers.shared_bytes >> 10),
            " ".join(sorted({shape.partition("*")[2] for shape in numbers.matrix_instructions.split()})) or "none",
            *("" if cycles is None else f"{cycles / numbers.matrix_cycles:.2f}" for cycles in pipes),
            f"{numbers.epilogue_ratio:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
