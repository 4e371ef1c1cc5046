"""Compiles a kernel for its chip, with no GPU, and reads what came out."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from kernel_inspection import machine_code
from kernel_inspection.chips import CHIPS, Chip
from kernel_inspection.variants import DIM, KERNEL_FUNCTIONS, Signature, Variant, signature

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Resources:
    """What a kernel takes of a multiprocessor."""

    registers: int
    """A thread."""
    stack_bytes: int
    """A thread."""
    spills: int
    """Instructions that read or write the stack."""
    shared_bytes: int
    """A block."""
    matrix_instructions: dict[str, int]
    """In the whole kernel, by shape."""


@dataclass(frozen=True)
class Report(Resources):
    """Of a variant. Cycles are of one multiprocessor for a tile at DIM feature dims."""

    variant: Variant
    blocks: int
    """On a multiprocessor at once."""
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


class Built(NamedTuple):
    resources: Resources
    instructions: list[machine_code.Instruction]
    tensor_columns: int
    """Of the tensor memory of sm100, a block."""


def build(
    kernel: JITFunction[Any],
    signature: Signature,
    architecture: str,
    options: dict[str, int],
    name: str,
    dump: Path | None = None,
) -> Built:
    """Compile and read.

    Args:
        options: Triton's, such as num_warps; what is not named is as it is where a launch does not name it.
        name: of the dumped files.
        dump: a folder for all that the compiler leaves: intermediate forms, assembly, machine code.

    Raises:
        Exception: whatever Triton raises where a kernel cannot be compiled.
    """
    chip, position = CHIPS[architecture], kernel.arg_names.index
    source = ASTSource(
        fn=kernel,
        signature=signature.types,
        constexprs={(position(name),): value for name, value in signature.constants.items()},
        attrs={(position(name),): [["tt.divisibility", 16]] for name in signature.aligned},
    )
    compiled = triton.compile(source, target=GPUTarget(*chip.target), options=options)
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        stem = re.sub(r"\W+", "-", name)
        for kind, content in compiled.asm.items():
            (dump / f"{stem}.{kind}").write_bytes(content if isinstance(content, bytes) else content.encode())
    return _read_nvidia(compiled) if chip.target[0] == "cuda" else _read_amd(compiled)


def inspect(variant: Variant, dump: Path | None = None) -> Report:
    """As `build`."""
    options = {"num_warps": variant.launch.num_warps, "num_stages": variant.launch.num_stages}
    kernel = KERNEL_FUNCTIONS[variant.kernel]
    built = build(kernel, signature(variant), variant.architecture, options, variant.name, dump)
    return _report(variant, CHIPS[variant.architecture], built)


def _read_nvidia(compiled: Any) -> Built:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _print("cuobjdump", "--dump-resource-usage", file.name)
        instructions = machine_code.read_nvidia(_print("cuobjdump", "-sass", file.name))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    shapes = re.findall(r"(?:wgmma\.mma_async|mma)\.sync\.aligned\.(m\d+n\d+k\d+)|(tcgen05\.mma)", compiled.asm["ptx"])
    matrix = Counter(shape or fifth_generation for shape, fifth_generation in shapes)
    stack_bytes, shared_bytes = int(found[2]) + int(found[3]), int(compiled.metadata.shared)
    resources = Resources(int(found[1]), stack_bytes, machine_code.spills(instructions), shared_bytes, dict(matrix))
    return Built(resources, instructions, int(compiled.metadata.tmem_size))


def _read_amd(compiled: Any) -> Built:
    assembly = compiled.asm["amdgcn"]
    instructions = machine_code.read_amd(assembly)
    fields = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", assembly, re.MULTILINE)}
    # scalar registers spill to lanes of vector registers, which costs no memory
    stack_bytes = fields["private_segment_fixed_size"] if fields["vgpr_spill_count"] else 0
    matrix = Counter(re.findall(r"v_mfma_\w+?_(\d+x\d+x\d+)", assembly))
    shared_bytes = int(compiled.metadata.shared)
    resources = Resources(fields["vgpr_count"], stack_bytes, machine_code.spills(instructions), shared_bytes, dict(matrix))
    return Built(resources, instructions, 0)


def _report(variant: Variant, chip: Chip, built: Built) -> Report:
    resources, code = built.resources, machine_code.analyse(built.instructions)
    num_warps, threads_a_warp = variant.launch.num_warps, chip.target[2]
    threads = num_warps * threads_a_warp
    held_registers = (resources.registers + 7) // 8 * 8 * threads  # given out in units of 8 a thread
    blocks = min(
        chip.registers // held_registers,
        (chip.shared_bytes + chip.reserved_shared_bytes) // (resources.shared_bytes + chip.reserved_shared_bytes),
        chip.threads // threads,
        chip.tensor_columns // max(built.tensor_columns, 1),
    )
    cycles = {"issue": code.ordinary.total * num_warps / chip.issue}
    cycles |= {pipe: code.ordinary.pipes.get(pipe, 0) * threads / lanes for pipe, lanes in chip.lanes.items()}
    steps = DIM // variant.launch.block_dim
    return Report(
        **vars(resources),
        variant=variant,
        blocks=blocks,
        code=code,
        matrix_cycles=variant.matrix_flop / chip.matrix_flop[variant.products],
        loop_cycles=steps * code.main_loop.total * num_warps / chip.issue,
        pipe_cycles=cycles,
    )


def _print(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout
