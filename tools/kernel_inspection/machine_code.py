"""Instructions of a compiled kernel: its main loop, the path of an ordinary tile through the rest, and what each pipe has to do.

The ordinary path is the cheapest one from the entry through the main loop to the end, each instruction at its pipe's rate: branches
of these kernels only ever add work (a diagonal or ragged tile, a tile whose exponentials need maxima of their own). Where lanes are
masked by branches around a load or store, as on AMD, an ordinary tile has lanes there and does not go round.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str
    kind: str
    """The pipe that runs it, or "other"."""
    target: int | None
    """Of a branch."""
    falls_through: bool
    is_end: bool


@dataclass(frozen=True)
class Path:
    """Instructions a thread by pipe."""

    total: int
    pipes: dict[str, int]


@dataclass(frozen=True)
class Code:
    """Of a kernel with a main loop of products."""

    main_loop: Path
    ordinary: Path
    """Beside the main loop."""


# What each pipe runs; the rest only takes issue slots.
_NVIDIA = {
    "matrix": r"(HGMMA|QGMMA|IGMMA|HMMA|QMMA|IMMA|UTC\w*MMA)",
    "special": r"MUFU",
    "shuffle": r"SHFL",
    "shared": r"(LDS|STS|LDSM|STSM|LDSTS|ATOMS)\b",
    "global": r"(LDG|STG|LDGSTS|UTMALDG|UTMASTG|RED|ATOM|ATOMG)\b",
    # integer products and moves by them share the units of fused multiply-adds
    "fp32": r"(FADD|FMUL|FFMA|FADD2|FMUL2|FFMA2|IMAD|HFMA2)\b",
    "alu": r"(FMNMX\d?|FSEL|FSETP|FSET|SEL|ISETP|LOP3|PLOP3|IADD|IADD3|VIADD|VIADDMNMX|IABS|IMNMX|VIMNMX\d?|SHF|PRMT|LEA|SGXT|P2R|"
    r"R2P|F2FP|F2F|I2F\w*|MOV)\b",
    "stack": r"(LDL|STL)\b",
}
_AMD = {
    "matrix": r"v_mfma",
    "special": r"v_(exp|rcp|log|rsq|sqrt)",
    "shuffle": r"ds_(bpermute|swizzle|permute)",
    "shared": r"ds_(read|write|load|store)",
    "global": r"(global|buffer|flat)_(load|store|atomic)",
    "fp32": r"v_",
    "stack": r"scratch_",
}


def spills(instructions: Iterable[Instruction]) -> int:
    """Instructions that read or write a thread's stack."""
    return sum(instruction.kind == "stack" for instruction in instructions)


def nvidia(sass: str) -> Code:
    """From what nvdisasm or cuobjdump prints."""
    labels: dict[str, int] = {}
    waiting: list[str] = []
    raw: list[tuple[int, str]] = []
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            waiting.append(label[1])
            continue
        found = re.search(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", line)
        if not found:
            continue
        address = int(found[1], 16)
        labels |= dict.fromkeys(waiting, address)
        waiting.clear()
        raw.append((address, found[2].strip()))
    return _analyse([_nvidia_instruction(address, text, labels) for address, text in raw], _NVIDIA, r"(@!?U?P\w+\s+)?")


def _nvidia_instruction(address: int, text: str, labels: dict[str, int]) -> Instruction:
    guard, _, rest = text.partition(" ") if text.startswith("@") else ("", "", text)
    opcode = rest.split(" ")[0]
    target = None
    # a divergent branch (BRA.DIV) leads to a copy of the code for warps that have come apart; none does in these kernels
    if opcode.startswith("BRA") and "DIV" not in opcode:
        named = re.search(r"(\.L_x_\d+)|(0x[0-9a-f]+)\s*$", rest)
        target = None if named is None else labels.get(named[1], -1) if named[1] else int(named[2], 16)
    unconditional = target is not None and not guard and not re.search(r"\bU?P\d", rest)
    is_end = opcode.startswith("EXIT") and not guard
    return Instruction(address, text, target, not (unconditional or is_end), opcode.startswith("EXIT"))


def amd(assembly: str) -> Code:
    """From the assembly that LLVM prints."""
    labels: dict[str, int] = {}
    raw: list[tuple[int, str]] = []
    for line in assembly.splitlines():
        label = re.match(r"(\.LBB\d+_\d+):", line)
        if label:
            labels[label[1]] = len(raw)
            continue
        found = re.match(r"\s+((?:[vs]_|ds_|global_|buffer_|flat_|scratch_)\S*.*?)(?:\s*;.*)?$", line)
        if found:
            raw.append((len(raw), found[1].strip()))
    instructions = []
    for address, text in raw:
        opcode, _, rest = text.partition(" ")
        target = labels.get(rest.strip()) if re.match(r"s_c?branch", opcode) else None
        is_end = opcode == "s_endpgm"
        instructions.append(Instruction(address, text, target, not (opcode == "s_branch" or is_end), is_end))
    return _analyse(instructions, _AMD, "")


def _analyse(instructions: Sequence[Instruction], pipes: dict[str, str], prefix: str) -> Code:
    patterns = {name: re.compile(prefix + pattern) for name, pattern in pipes.items()}
    instructions = [i for i in instructions if not re.match(r"NOP\b|s_nop", i.text)]
    at = {instruction.address: number for number, instruction in enumerate(instructions)}

    def pipe_of(instruction: Instruction) -> str:
        return next((name for name, pattern in patterns.items() if pattern.match(instruction.text)), "other")

    kinds = [pipe_of(instruction) for instruction in instructions]

    def path(numbers: Iterable[int]) -> Path:
        listed = list(numbers)
        return Path(len(listed), dict(Counter(kinds[number] for number in listed)))

    following: list[list[int]] = []
    for number, instruction in enumerate(instructions):
        nexts = []
        if instruction.falls_through and number + 1 < len(instructions):
            nexts.append(number + 1)
        if instruction.target is not None:
            target = _at_or_after(at, instruction.target, instructions)
            if target is not None:
                nexts.append(target)
        following.append(nexts)

    start, end = _main_loop(instructions, kinds, at)
    ends = {number for number, instruction in enumerate(instructions) if instruction.is_end and not instruction.falls_through}
    before = _cheapest(following, kinds, 0, {start}) if start > 0 else []
    leaving = [number for number in following[end] if not start <= number <= end]
    after = _cheapest(following, kinds, leaving[0] if leaving else end + 1, ends)
    spills = kinds.count("stack")
    return Code(path(range(len(instructions))), path(range(start, end + 1)), path([*before[:-1], *after]), spills)


def _at_or_after(at: dict[int, int], address: int, instructions: Sequence[Instruction]) -> int | None:
    """A branch may lead to padding that is not in the list."""
    if address in at:
        return at[address]
    later = [number for number, instruction in enumerate(instructions) if instruction.address >= address]
    return later[0] if later and address >= 0 else None


def _main_loop(instructions: Sequence[Instruction], kinds: Sequence[str], at: dict[int, int]) -> tuple[int, int]:
    """First and last instruction of the first tight loop around matrix instructions, or around fused multiply-adds."""
    loops = []
    for number, instruction in enumerate(instructions):
        start = None if instruction.target is None else _at_or_after(at, instruction.target, instructions)
        if start is not None and start <= number:
            loops.append((start, number))
    for kind in ("matrix", "fp32"):
        with_products = [loop for loop in loops if kind in kinds[loop[0] : loop[1] + 1]]
        tight = [a for a in with_products if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in with_products)]
        if tight:
            return min(tight)
    raise ValueError("no loop with products in it: is this one of the tile kernels?")


# Cycles of a scheduler's pipe that a warp instruction keeps busy.
_COST = {"special": 8, "shuffle": 4, "shared": 4, "global": 4, "alu": 2}


def _cheapest(following: Sequence[Sequence[int]], kinds: Sequence[str], start: int, ends: set[int]) -> list[int]:
    """Instruction numbers of the cheapest path, both ends included."""
    queue: list[tuple[int, int]] = [(0, start)]
    came_from: dict[int, int | None] = {start: None}
    cost = {start: 0}
    while queue:
        length, number = heappop(queue)
        if number in ends:
            steps: list[int] = []
            at: int | None = number
            while at is not None:
                steps.append(at)
                at = came_from[at]
            return steps[::-1]
        for after in following[number]:
            longer = length + _COST.get(kinds[after], 1)
            if longer < cost.get(after, 1 << 60):
                cost[after], came_from[after] = longer, number
                heappush(queue, (longer, after))
    raise ValueError("no path from the entry through the main loop to the end")
