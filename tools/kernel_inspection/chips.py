"""What a multiprocessor has and does in a cycle, by architecture.

Sources: NVIDIA's CUDA C++ Programming Guide (compute capabilities: shared memory, registers; arithmetic instructions:
throughput of native instructions), data sheets for dense matrix rates (A100 312, H100 SXM 989, B200 2250 TFLOP/s in 16 bits,
divided by multiprocessors and boost clock), and for gfx942 AMD's CDNA 3 white paper and instruction set guide.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Chip:
    """One multiprocessor (NVIDIA) or compute unit (AMD)."""

    target: tuple[str, int | str, int]
    """Triton's GPUTarget: backend, architecture, threads a warp."""
    shared_bytes: int
    """That one block can have."""
    registers: int
    threads: int
    matrix_flop: dict[str, int]
    """A cycle, dense, by the products' kind; TF32's three products count three times."""
    lanes: dict[str, int] = field(default_factory=dict)
    """Threads a cycle by pipe; an instruction of a pipe that is not named is bound by issue alone."""
    issue: int = 4
    """Warp instructions a cycle."""
    reserved_shared_bytes: int = 1024
    """The system's, a block."""
    tensor_columns: int = 512
    """Of tensor memory; blocks on other chips than sm100 need none."""


# Threads of a warp instruction that a multiprocessor finishes a cycle: fp32 add, multiply and FMA; comparisons, min, max,
# selects, integer and logic; ex2, rcp and the like; shuffles; shared memory (128 bytes a cycle).
CHIPS = {
    "sm80": Chip(
        ("cuda", 80, 32),
        163 << 10,
        65536,
        2048,
        {"16 bits": 2048, "tf32x3": 1024, "ieee": 128},
        {"fp32": 64, "alu": 64, "special": 16, "shuffle": 32, "shared": 32},
    ),
    "sm90": Chip(
        ("cuda", 90, 32),
        227 << 10,
        65536,
        2048,
        {"16 bits": 4096, "tf32x3": 2048, "ieee": 256},
        {"fp32": 128, "alu": 64, "special": 16, "shuffle": 32, "shared": 32},
    ),
    "sm100": Chip(
        ("cuda", 100, 32),
        227 << 10,
        65536,
        2048,
        {"16 bits": 8192, "tf32x3": 4096, "ieee": 256},
        {"fp32": 128, "alu": 64, "special": 16, "shuffle": 32, "shared": 32},
    ),
    # a compute unit: four SIMDs of 16 lanes, so a wave of 64 takes four cycles of one; exponentials run at a quarter
    "gfx942": Chip(
        ("hip", "gfx942", 64),
        64 << 10,
        4 * 512 * 64,
        2048,
        {"16 bits": 2048, "tf32x3": 1024, "ieee": 256},
        {"fp32": 64, "special": 16, "shared": 32},
        issue=1,
        reserved_shared_bytes=0,
    ),
}
