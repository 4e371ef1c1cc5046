"""Compiles a variant for its chip, with no GPU, and reads what came out."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernel_inspection import machine_code
from kernel_inspection.chips import CHIPS, Chip
from kernel_inspection.variants import DIM, KERNEL_FUNCTIONS, Variant, signature

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Report:
    """What the machine code of a variant takes. Cycles are of one multiprocessor for a tile at DIM feature dims."""

    variant: Variant
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    blocks: int
    """On a multiprocessor at once."""
    matrix_instructions: dict[str, int]
    code: machine_code.Code
    matrix_cycles: float
    loop_cycles: float
    """Of the main loop's instructions to be issued."""
    pipe_cycles: dict[str, float]
    """Of the ordinary path beside the main loop, by pipe."""

    @property
    def busiest_pipe(self) -> str:
        return max(self.pipe_cycles, key=lambda pipe: self.pipe_cycles[pipe])

    @property
    def epilogue_ratio(self) -> float:
        """Cycles of the busiest pipe over those of the matrix units."""
        return self.pipe_cycles[self.busiest_pipe] / self.matrix_cycles


def inspect(variant: Variant, dump: Path | None = None) -> Report:
    """Compile and read.

    Args:
        dump: a folder for all that the compiler leaves: intermediate forms, assembly, machine code.

    Raises:
        Exception: whatever Triton raises where a kernel cannot be compiled.
    """
    chip, launch = CHIPS[variant.architecture], variant.launch
    kernel = KERNEL_FUNCTIONS[variant.kernel]
    types, constants, aligned = signature(variant)
    position = kernel.arg_names.index
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(position(name),): value for name, value in constants.items()},
        attrs={(position(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=GPUTarget(*chip.target), options=options)
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        stem = re.sub(r"\W+", "-", variant.name)
        for kind, content in compiled.asm.items():
            (dump / f"{stem}.{kind}").write_bytes(content if isinstance(content, bytes) else content.encode())
    resources, code = (_nvidia if chip.target[0] == "cuda" else _amd)(compiled)
    return _report(variant, chip, int(compiled.metadata.shared), resources, code)


@dataclass(frozen=True)
class _Resources:
    registers: int
    stack_bytes: int
    matrix_instructions: dict[str, int]


def _nvidia(compiled: Any) -> tuple[_Resources, machine_code.Code]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _print("cuobjdump", "--dump-resource-usage", file.name)
        code = machine_code.nvidia(_print("cuobjdump", "-sass", file.name))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    shapes = re.findall(r"(?:wgmma\.mma_async|mma)\.sync\.aligned\.(m\d+n\d+k\d+)|(tcgen05\.mma)", compiled.asm["ptx"])
    matrix = Counter(shape or fifth_generation for shape, fifth_generation in shapes)
    return _Resources(int(found[1]), int(found[2]) + int(found[3]), dict(matrix)), code


def _amd(compiled: Any) -> tuple[_Resources, machine_code.Code]:
    assembly = compiled.asm["amdgcn"]
    fields = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", assembly, re.MULTILINE)}
    # scalar registers spill to lanes of vector registers, which costs no memory
    stack = fields["private_segment_fixed_size"] if fields["vgpr_spill_count"] else 0
    matrix = Counter(re.findall(r"v_mfma_\w+?_(\d+x\d+x\d+)", assembly))
    return _Resources(fields["vgpr_count"], stack, dict(matrix)), machine_code.amd(assembly)


def _report(variant: Variant, chip: Chip, shared: int, resources: _Resources, code: machine_code.Code) -> Report:
    num_warps, threads_a_warp = variant.launch.num_warps, chip.target[2]
    threads = num_warps * threads_a_warp
    held_registers = (resources.registers + 7) // 8 * 8 * threads  # given out in units of 8 a thread
    blocks = min(
        chip.registers // held_registers,
        (chip.shared_bytes + chip.reserved_shared_bytes) // (shared + chip.reserved_shared_bytes),
        chip.threads // threads,
    )
    cycles = {"issue": code.ordinary.total * num_warps / chip.issue}
    cycles |= {pipe: code.ordinary.pipes.get(pipe, 0) * threads / lanes for pipe, lanes in chip.lanes.items()}
    steps = DIM // variant.launch.block_dim
    return Report(
        variant,
        resources.registers,
        resources.stack_bytes,
        code.spills,
        shared,
        blocks,
        resources.matrix_instructions,
        code,
        variant.matrix_flop / chip.matrix_flop[variant.products],
        steps * code.main_loop.total * num_warps / chip.issue,
        cycles,
    )


def _print(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout
