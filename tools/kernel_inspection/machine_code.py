"""Instructions of a compiled kernel: its main loop, the path of an ordinary tile through the rest, what each pipe has to do.

The ordinary path is the cheapest one from the entry through the main loop to the end, each instruction at its pipe's rate:
branches of these kernels only ever add work (a diagonal or ragged tile, a tile whose exponentials need maxima of their own).
Where lanes are masked by branches around a load or store, as on AMD, an ordinary tile has lanes there and does not go round.
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
    """Instructions a thread."""

    total: int
    pipes: dict[str, int]
    """By the pipe that runs them; one on a pair of fp32 numbers keeps it as long as two."""


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
    "fp32 pair": r"(FADD|FMUL|FFMA)2\b",
    # integer products and moves by them share the units of fused multiply-adds
    "fp32": r"(FADD|FMUL|FFMA|IMAD|HFMA2)\b",
    "alu": r"(FMNMX\d?|FSEL|FSETP|FSET|SEL|ISETP|LOP3|PLOP3|IADD3?|VIADD|VIADDMNMX|IABS|IMNMX|VIMNMX\d?|SHF|PRMT|LEA|SGXT|"
    r"P2R|R2P|F2FP|F2F|I2F\w*|MOV)\b",
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


def read_nvidia(sass: str) -> list[Instruction]:
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
    return [_nvidia_instruction(address, text, labels) for address, text in raw if not text.startswith("NOP")]


def _nvidia_instruction(address: int, text: str, labels: dict[str, int]) -> Instruction:
    guard, _, rest = text.partition(" ") if text.startswith("@") else ("", "", text)
    rest = rest.strip()
    opcode = rest.split(" ")[0]
    target = None
    # a divergent branch (BRA.DIV) leads to a copy of the code for warps that have come apart; none does in these kernels;
    # a call under a condition is how a long loop is left
    if (opcode.startswith("BRA") and "DIV" not in opcode) or (opcode.startswith("CALL") and guard):
        named = re.search(r"(\.L_x_\d+)|(0x[0-9a-f]+)\s*$", rest)
        target = None if named is None else labels.get(named[1], -1) if named[1] else int(named[2], 16)
    unconditional = target is not None and not guard and not re.search(r"\bU?P\d", rest)
    is_end = opcode.startswith("EXIT")
    leaves = unconditional or ((is_end or opcode.startswith("RET")) and not guard)
    return Instruction(address, text, _kind(rest, _NVIDIA), target, not leaves, is_end)


def read_amd(assembly: str) -> list[Instruction]:
    """From the assembly that LLVM prints."""
    labels: dict[str, int] = {}
    texts: list[str] = []
    for line in assembly.splitlines():
        label = re.match(r"(\.LBB\d+_\d+):", line)
        if label:
            labels[label[1]] = len(texts)
            continue
        found = re.match(r"\s+((?:[vs]_|ds_|global_|buffer_|flat_|scratch_)\S*.*?)(?:\s*;.*)?$", line)
        if found and not found[1].startswith("s_nop"):
            texts.append(found[1].strip())
    kinds = [_kind(text, _AMD) for text in texts]
    targets = [labels.get(text.split()[-1]) if re.match(r"s_c?branch", text) else None for text in texts]
    falls = [not re.match(r"s_branch|s_endpgm", text) for text in texts]
    _follow_lanes(texts, kinds, targets, falls)
    ends = [text.startswith("s_endpgm") for text in texts]
    return list(map(Instruction, range(len(texts)), texts, kinds, targets, falls, ends))


def _follow_lanes(texts: Sequence[str], kinds: Sequence[str], targets: list[int | None], falls: list[bool]) -> None:
    """Leave to branches on the execution mask only the ways that an ordinary tile may go.

    A block of loads or stores has lanes to work for. Of an if and its else, which both are blocks that a branch may go round,
    one is run.
    """

    def block_end(at: int) -> int:
        return next(number for number in range(at, len(texts)) if re.match(r"s_c?branch|s_endpgm", texts[number]))

    ends_of_else = set()
    for number, text in enumerate(texts):
        target = targets[number]
        if not text.startswith("s_cbranch_exec") or target is None or number in ends_of_else:
            continue
        goes_round = text.startswith("s_cbranch_execz")
        if goes_round and target > number:
            end = block_end(target)
            masks = any(re.match(r"s_(or|andn2)_saveexec", texts[between]) for between in range(target, end))
            if masks and texts[end].startswith("s_cbranch_execz"):
                targets[number] = end + 1  # into the else
                falls[end] = False
                ends_of_else.add(end)
                continue
        # a block that lies elsewhere ends where the next branch is
        start = number + 1 if goes_round else target
        inside = kinds[start:target] if start < target else kinds[start : block_end(start)]
        if "global" in inside and "matrix" not in inside:
            targets[number], falls[number] = (None, True) if goes_round else (target, False)


def _kind(text: str, pipes: dict[str, str]) -> str:
    return next((name for name, pattern in pipes.items() if re.match(pattern, text)), "other")


def analyse(instructions: Sequence[Instruction]) -> Code:
    """Main loop and ordinary path.

    Raises:
        ValueError: no loop holds products, or no path leads through it.
    """
    at = {instruction.address: number for number, instruction in enumerate(instructions)}
    kinds = [instruction.kind for instruction in instructions]

    def path(numbers: Iterable[int]) -> Path:
        pipes = Counter(kinds[number] for number in numbers)
        total = pipes.total()
        if pairs := pipes.pop("fp32 pair", 0):
            pipes["fp32"] += 2 * pairs
        return Path(total, dict(pipes))

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

    start, end = _main_loop(instructions, at)
    ends = {number for number, instruction in enumerate(instructions) if instruction.is_end and not instruction.falls_through}
    before = _cheapest(following, kinds, 0, {start}) if start > 0 else []
    inside = range(start, end + 1)
    leaving = [number for number in following[end] if number not in inside]
    # a loop that ends in a jump back is left from within
    leaving = leaving or [number for step in inside for number in following[step] if number not in inside]
    if not leaving:
        raise ValueError("no way out of the main loop")
    after = min((_cheapest(following, kinds, number, ends) for number in leaving), key=len)
    return Code(path(inside), path([*before[:-1], *after]))


def _at_or_after(at: dict[int, int], address: int, instructions: Sequence[Instruction]) -> int | None:
    """A branch may lead to padding that is not in the list."""
    if address in at:
        return at[address]
    later = [number for number, instruction in enumerate(instructions) if instruction.address >= address]
    return later[0] if later and address >= 0 else None


def _main_loop(instructions: Sequence[Instruction], at: dict[int, int]) -> tuple[int, int]:
    """First and last instruction of the first tight loop around matrix instructions, or around fused multiply-adds."""
    loops = []
    for number, instruction in enumerate(instructions):
        start = None if instruction.target is None else _at_or_after(at, instruction.target, instructions)
        if start is not None and start <= number:
            loops.append((start, number))
    for is_product in (lambda instruction: instruction.kind == "matrix", lambda instruction: "FFMA" in instruction.text):
        with_products = [loop for loop in loops if any(map(is_product, instructions[loop[0] : loop[1] + 1]))]
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
