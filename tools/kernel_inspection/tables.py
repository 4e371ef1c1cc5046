"""What was found, as tables for people."""

from collections.abc import Mapping

from rich.table import Table

from kernel_inspection import peer_inf_cl
from kernel_inspection.chips import CHIPS
from kernel_inspection.compiled import Report, Resources
from kernel_inspection.fold import Fold
from kernel_inspection.peer_inf_cl import PeerKernel
from kernel_inspection.pool import Failure
from kernel_inspection.variants import Variant

_PIPES = ("issue", "fp32", "alu", "special", "shuffle", "shared")
_RESOURCES = ("registers", "stack bytes", "spills", "shared KiB")
_NUMBERS = ("regs", "stack", "spills", "KiB", "blocks", "matrix", "loop", "path", "cycles", *_PIPES, "busiest")
_NAMES = ("kernel", "dtype", "options", "tile", "launch")
_CAPTION = (
    "loop: instructions of a step, of which matrix / global / shared; path: instructions of an ordinary tile beside the loop; "
    "cycles: of a multiprocessor's matrix units for a tile; the pipes beside the loop as shares of them, the busiest is the "
    "epilogue ratio"
)
_UNKNOWN = "does not compile"


def of_variants(architecture: str, found: Mapping[Variant, Report | Failure]) -> Table:
    """A row a variant."""
    limit = CHIPS[architecture].shared_bytes >> 10
    table = Table(title=f"{architecture}: {limit} KiB of shared memory a block", title_justify="left", caption=_CAPTION)
    for column in (*_NAMES, *_NUMBERS):
        table.add_column(column, justify="left" if column in (*_NAMES, "matrix", "loop") else "right", no_wrap=True)
    before = None
    for variant, report in found.items():
        if before is not None and variant.kernel != before:
            table.add_section()
        before = variant.kernel
        table.add_row(*_named(variant), *_numbers(report))
    return table


def of_folds(found: Mapping[Fold, Resources | Failure]) -> Table:
    """A row a compilation."""
    table = Table("fold_sums", *_RESOURCES, title="the parts of all tiles, added up", title_justify="left")
    for fold, resources in found.items():
        table.add_row(
            f"{fold.architecture}, {fold.num_sums} sums", *_resources(fold.architecture, resources)[: len(_RESOURCES)]
        )
    return table


def beside_inf_cl(
    architecture: str, ours: Mapping[Variant, Report | Failure], theirs: Mapping[PeerKernel, Resources | Failure]
) -> Table:
    """Ours first."""
    columns = ("kernel", "dtype", "tile", "launch", *_RESOURCES, "matrix instructions")
    table = Table(*columns, title=f"{architecture}: beside {peer_inf_cl.label()}", title_justify="left")
    for variant, report in ours.items():
        kernel, dtype, _, tile, launch = _named(variant)
        table.add_row(kernel, dtype, tile, launch, *_resources(architecture, report))
    table.add_section()
    tile, launch = (
        f"{peer_inf_cl.BLOCK} x {peer_inf_cl.BLOCK} x {peer_inf_cl.HEAD_DIM}",
        f"{peer_inf_cl.NUM_WARPS}w 1s pointers",
    )
    for peer, resources in theirs.items():
        table.add_row(f"inf_cl {peer.kernel}", "fp32 tf32", tile, launch, *_resources(architecture, resources))
    return table


def _named(variant: Variant) -> tuple[str, ...]:
    launch = variant.launch
    dtype = variant.dtype if variant.products == "16 bits" else f"{variant.dtype} {variant.products}"
    tile = f"{launch.block_rows} x {launch.block_columns} x {launch.block_dim}"
    way = f"{launch.num_warps}w {launch.num_stages}s {'TMA' if launch.tma else 'pointers'}"
    return variant.kernel, dtype, variant.options, tile, f"{way} (other)" if variant.is_fallback else way


def _numbers(report: Report | Failure) -> tuple[str, ...]:
    if isinstance(report, Failure):
        return (_UNKNOWN,)
    loop = report.code.main_loop
    parts = "/".join(str(loop.pipes.get(pipe, 0)) for pipe in ("matrix", "global", "shared"))
    shares = (f"{report.pipe_cycles[pipe] / report.matrix_cycles:.2f}" if pipe in report.pipe_cycles else "" for pipe in _PIPES)
    return (
        str(report.registers),
        str(report.stack_bytes),
        str(report.spills),
        str(report.shared_bytes >> 10),
        str(report.blocks),
        _shapes(report),
        f"{loop.total}: {parts}",
        str(report.code.ordinary.total),
        f"{report.matrix_cycles:.0f}",
        *shares,
        f"{report.busiest_pipe} {report.epilogue_ratio:.3f}",
    )


def _resources(architecture: str, found: Resources | Failure) -> tuple[str, ...]:
    if isinstance(found, Failure):
        return (_UNKNOWN,)
    shared = f"{found.shared_bytes >> 10} of {CHIPS[architecture].shared_bytes >> 10}"
    return str(found.registers), str(found.stack_bytes), str(found.spills), shared, _shapes(found)


def _shapes(found: Resources) -> str:
    return " ".join(sorted(found.matrix_instructions)) or "none"
