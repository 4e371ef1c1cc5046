"""Draw the pictures of kernels/README.md: how the logits are visited in panels, and how blocks travel over ranks.

python tools/draw_loss_pictures.py                    draw kernels/pictures/tiles.png and ring.png
python tools/draw_loss_pictures.py --table            print FLOPs and bytes sent instead, as the README's table
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.ticker import EngFormatter

from loss_bench.formulas import sent_bytes, step_flop
from loss_bench.points import DTYPE_BYTES, Comparison
from scaleclip_kernels.panels import PANEL_COLUMNS, PANEL_ROWS

PICTURES = Path(__file__).parent.parent / "kernels" / "pictures"
TABLE_BATCHES = (32_768, 131_072, 1_048_576)
TABLE_RANKS = (1, 8, 64, 256)

# Okabe and Ito's colours, which colour-blind readers tell apart
BLUE, SKY, GREEN, ORANGE, VERMILLION, PURPLE = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
INK, GREY, PALE = "#222222", "#767676", "#EDEDED"
ROW, COLUMN = BLUE, VERMILLION
BLOCKS = (SKY, ORANGE, GREEN, PURPLE)
"""One for each rank's columns."""

MATCHED = {"color": INK, "linewidth": 1.4, "linestyle": (0, (1, 1.2))}

Place = tuple[float, float, float, float]
"""Left, lower edge, width, height: inches on the page."""
WIDTH = 9.0
"""Of a picture, in inches: 100 pixels each where a page shows it 900 pixels wide."""
SMALL, NORMAL, TITLE = 9.5, 10.5, 11.5
"""Letters, in points."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=PICTURES, help="where to write the pictures")
    parser.add_argument("--table", action="store_true", help="print FLOPs and bytes sent instead")
    parser.add_argument("--dim", type=int, default=512, help="feature dims, for the table")
    parser.add_argument("--dtype", choices=DTYPE_BYTES, default="bf16", help="in which features are sent, for the table")
    arguments = parser.parse_args()
    if arguments.table:
        print(markdown_table(arguments.dim, arguments.dtype))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, picture in (("tiles", draw_tiles()), ("ring", draw_ring())):
        path = arguments.folder / f"{name}.png"
        # no version of the writer in the file: the same picture is the same bytes
        picture.savefig(path, dpi=200, metadata={"Software": None}, pil_kwargs={"optimize": True})
        print(path)


def markdown_table(dim: int, dtype: str) -> str:
    """Of the symmetric softmax loss with its gradients: work, and bytes that a rank sends."""
    lines = [
        "| N | W | FLOP | FLOP a rank | ring forward | ring backward | gather forward | gather backward |",
        "|---" * 8 + "|",
    ]
    count, size = EngFormatter(places=2), EngFormatter("B", places=1)
    for batch in TABLE_BATCHES:
        flop = step_flop("softmax", Comparison(batch, dim, dtype, scale=1.0, mode="full"))
        for num_ranks in TABLE_RANKS:
            cells = [f"{batch:,}", f"{num_ranks}", count(flop), count(flop / num_ranks)]
            for schedule in ("ring", "gather"):
                forward, full = (
                    sent_bytes("softmax", schedule, num_ranks, batch // num_ranks, dim, DTYPE_BYTES[dtype], mode)
                    for mode in ("forward", "full")
                )
                cells += [size(forward), size(full - forward)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_tiles() -> Figure:
    """The panels of a block of logits in the order of their visit, and what each gives in the two passes."""
    picture, page = _page(height=6.1)
    middle = WIDTH / 2
    _draw_pass(page, 0.0, "Forward: one matmul a panel", reads=("X",), writes="m, Z")
    _draw_pass(page, middle, "Backward: three matmuls a panel", reads=("X", "r"), writes="dX")
    page.plot([middle, middle], [1.0, 5.95], color=PALE, linewidth=1)

    forward = (
        ("matmul 1", INK, r"$S = t\,\log_2 e\;\, X_R\, Y_C^{\top}$"),
        ("rows", ROW, r"$m_i' = \max(m_i,\, \max_{j}\, s_{ij})$"),
        ("", ROW, r"$Z_i = 2^{\,m_i - m_i'}\, Z_i + \Sigma_{\,j}\; 2^{\,s_{ij} - m_i'}$"),
        ("columns", COLUMN, "the same over i, maxima of their own"),
    )
    backward = (
        ("matmul 2", INK, r"$S$ once more"),
        ("", INK, r"$G = 2^{\,S - r_i} + 2^{\,S - c_j}$,  no term exceeds 1"),
        ("matmul 3", ROW, r"$dX_R \;{+}{=}\; G\, Y_C$"),
        ("matmul 4", COLUMN, r"$dY_C \;{+}{=}\; G^{\top} X_R$"),
    )
    for left, lines in ((0.0, forward), (middle, backward)):
        for number, (label, colour, formula) in enumerate(lines):
            y = 2.2 - 0.35 * number
            page.text(left + 0.35, y, label, fontsize=SMALL, fontweight="bold", color=colour, va="center")
            page.text(left + 1.2, y, formula, fontsize=NORMAL, va="center")

    page.plot([0.35, 0.75], [0.75, 0.75], **MATCHED)
    size = f"{PANEL_ROWS:,} x {PANEL_COLUMNS:,}"
    for y, x, line in (
        (0.75, 0.85, "matched pairs: left out of every panel; their logits and gradients are computed outside"),
        (
            0.49,
            0.35,
            "between the passes: m, Z and the matched logits give the loss and the log-sum-exps r (rows), c (columns)",
        ),
        (0.23, 0.35, f"of the N x M logits, two buffers of one panel ({size}) exist at any time"),
    ):
        page.text(x, y, line, fontsize=SMALL, va="center")
    return picture


def _draw_pass(page: Axes, left: float, title: str, *, reads: tuple[str, ...], writes: str) -> None:
    """The matrix with its sides: what is read on the left and above, what is added to on the right and below."""
    count, side, row, column = 4, 0.5, 1, 2
    x0, top, gap, width = left + 1.3, 4.95, 0.08, {"X": 0.34, "dX": 0.34, "m, Z": 0.22, "r": 0.12}
    size = count * side
    page.text(left + 0.35, 5.85, title, fontsize=TITLE, fontweight="bold", va="center")

    for number in range(count * count):
        i, j = divmod(number, count)
        is_now, is_past = (i, j) == (row, column), number < row * count + column
        x, y = x0 + j * side, top - (i + 1) * side
        _box(page, (x, y, side, side), "#BFE3D8" if is_now else PALE if is_past else "white", edge=GREY)
        name = dict(fontsize=SMALL, fontweight="bold" if is_now else "normal", color=INK if is_now else GREY)
        page.text(x + side - 0.05, y + side - 0.05, f"{number + 1}", ha="right", va="top", **name)
    x, y = x0 + column * side, top - (row + 1) * side
    _box(page, (x, y, side, side), "none", edge=GREEN, linewidth=2)
    page.plot([x0, x0 + size], [top, top - size], **MATCHED)

    label = dict(fontsize=NORMAL, va="center")
    at_x, at_y = x0 - gap, top + gap
    for name_x in reversed(reads):
        name_y, depth = {"X": "Y", "r": "c"}[name_x], width[name_x]
        _strip(page, (at_x - depth, top - size, depth, size), row, count, ROW)
        _strip(page, (x0, at_y, size, depth), column, count, COLUMN)
        page.text(at_x - depth / 2, top + 0.13, f"${name_x}$", ha="center", color=ROW, **label)
        page.text(x0 + size + 0.1, at_y + depth / 2, f"${name_y}$", ha="left", color=COLUMN, **label)
        at_x, at_y = at_x - depth - 0.06, at_y + depth + 0.06
    page.text(at_x - 0.02, top - size / 2, "N rows", fontsize=SMALL, rotation=90, ha="right", va="center", color=GREY)
    page.text(x0 + size / 2, at_y + 0.02, "M columns", fontsize=SMALL, ha="center", va="bottom", color=GREY)

    depth = width[writes]
    _strip(page, (x0 + size + gap, top - size, depth, size), row, count, ROW)
    _strip(page, (x0, top - size - gap - depth, size, depth), column, count, COLUMN)
    page.text(x0 + size + gap + depth / 2, top - size - 0.14, f"${writes}$", ha="center", color=ROW, **label)
    page.text(x0 - 0.1, top - size - gap - depth / 2, f"${writes.replace('X', 'Y')}$", ha="right", color=COLUMN, **label)
    centre_x, centre_y = x + side / 2, y + side / 2
    _arrow(page, (centre_x + 0.12, centre_y), (x0 + size + gap, centre_y), ROW)
    _arrow(page, (centre_x, centre_y - 0.12), (centre_x, top - size - gap), COLUMN)


def _strip(page: Axes, where: Place, chosen: int, count: int, colour: str) -> None:
    """Features or statistics along the matrix, and which part of them the panel meets; rows are counted from above."""
    x, y, width, height = where
    _box(page, where, "white", edge=colour)
    if height > width:
        _box(page, (x, y + (count - 1 - chosen) * height / count, width, height / count), colour, edge=colour)
    else:
        _box(page, (x + chosen * width / count, y, width / count, height), colour, edge=colour)


def draw_ring() -> Figure:
    """Four ranks: who holds which columns when, what overlaps in one hop, and the gather schedule."""
    picture, page = _page(height=6.35)
    _draw_holdings(page)
    _draw_travellers(page)
    _draw_hop(page)
    _draw_gather(page)
    return picture


def _draw_holdings(page: Axes) -> None:
    num_ranks, width, height, step_x, step_y = len(BLOCKS), 0.58, 0.34, 0.84, 0.52
    x0, y0 = 1.1, 5.15
    page.text(0.35, 6.1, "Ring: the columns that a rank holds", fontsize=TITLE, fontweight="bold", va="center")
    for hop in range(num_ranks + 1):
        is_home = hop == num_ranks
        x = x0 + hop * step_x
        page.text(
            x + width / 2, 5.68, "home" if is_home else f"hop {hop}", fontsize=SMALL, ha="center", va="center", color=GREY
        )
        for rank in range(num_ranks):
            y, block = y0 - rank * step_y, (rank - hop) % num_ranks
            if hop == 0:
                page.text(x0 - 0.15, y + height / 2, f"rank {rank}", fontsize=SMALL, ha="right", va="center", color=GREY)
            _box(page, (x, y, width, height), "white" if is_home else BLOCKS[block], edge=BLOCKS[block], linewidth=1.8)
            name = f"$dY_{block}$" if is_home else f"$Y_{block}$"
            page.text(x + width / 2, y + height / 2, name, fontsize=NORMAL, ha="center", va="center")
            if is_home:
                continue
            # from the lower right corner to the next rank's upper left one; the last rank's leaves below and enters above
            for at in (y, y0 + step_y) if rank + 1 == num_ranks else (y,):
                start, end = (x + width + 0.03, at + 0.02), (x + step_x - 0.03, at - step_y + height - 0.02)
                _arrow(page, start, end, GREY, dashed=hop + 1 == num_ranks)


def _draw_travellers(page: Axes) -> None:
    left, top = 5.65, 5.68
    columns = (left + 1.0, left + 2.12)
    for x, title in zip(columns, ("forward", "backward"), strict=True):
        page.text(x, top, title, fontsize=SMALL, va="center", color=GREY)
    for number, (name, remark, *entries) in enumerate(
        (
            ("stays", "", r"$X$, row $m, Z$", r"$X$, $r$, $dX$"),
            ("travels", "W - 1 hops", r"$Y_b$", r"$Y_b$, $c_b$"),
            ("collects", "W hops, fp32", r"column $m, Z$", r"$dY_b$"),
        )
    ):
        y = top - 0.42 - 0.62 * number
        page.plot([left, 8.75], [y + 0.22, y + 0.22], color=PALE, linewidth=1)
        page.text(left, y, name, fontsize=SMALL, fontweight="bold", va="center")
        page.text(left, y - 0.21, remark, fontsize=SMALL, va="center", color=GREY)
        for x, entry in zip(columns, entries, strict=True):
            page.text(x, y, entry, fontsize=NORMAL, va="center")


LANES = {"gradient\nchannel": 2.05, "compute": 1.38, "data\nchannel": 0.71}
"""Their lower edges."""
LANE = 0.42


def _draw_hop(page: Axes) -> None:
    gradients, compute, data = LANES.values()
    page.text(0.35, 3.0, "One hop of the backward pass, on rank 2", fontsize=TITLE, fontweight="bold", va="center")
    for name, y in LANES.items():
        page.text(0.35, y + LANE / 2, name, fontsize=SMALL, va="center", color=GREY)
    start = 1.2
    hop_2 = start + 2.65
    end = 5.75
    for x, block, hop in ((start, 1, 1), (hop_2, 0, 2)):
        for offset, width, label in ((0.0, 0.5, "$S, G$"), (0.5, 0.45, "$dX$"), (0.95, 0.45, "$dY$")):
            _box(page, (x + offset, compute, width, LANE), BLOCKS[block])
            page.text(x + offset + width / 2, compute + LANE / 2, label, fontsize=NORMAL, ha="center", va="center")
        page.plot([x, x], [0.55, 2.65], color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        page.text(x + 0.06, 2.68, f"hop {hop}", fontsize=SMALL, va="center", color=GREY)
    _box(page, (start + 1.4, compute, 1.25, LANE), BLOCKS[1])
    page.text(start + 2.02, compute + LANE / 2, "next panels", fontsize=SMALL, ha="center", va="center")
    _box(page, (hop_2 + 1.4, compute, end - hop_2 - 1.4, LANE), BLOCKS[0])
    page.text((end + hop_2 + 1.4) / 2, compute + LANE / 2, "...", fontsize=SMALL, ha="center", va="center")

    _messages(page, (start, gradients, 0.8), ("$dY_1$ in", 1), ("$dY_2$ out", 2))
    _messages(page, (hop_2, gradients, 0.8), ("$dY_0$ in", 0), ("$dY_1$ out", 1))
    _messages(page, (start, data, 2.2), ("$Y_0$ in", 0), ("$Y_1$ out", 1))
    _messages(page, (hop_2, data, end - hop_2), ("$Y_3$ in", 3), ("$Y_0$ out", 0))
    for x in (start, hop_2):
        _arrow(page, (x + 0.95, gradients), (x + 0.95, compute + LANE), INK)
    _arrow(page, (hop_2, data + LANE), (hop_2, compute), INK)
    _arrow(page, (hop_2, compute + LANE), (hop_2, gradients), INK)


def _messages(page: Axes, where: tuple[float, float, float], *messages: tuple[str, int]) -> None:
    x, y, width = where
    for number, (label, block) in enumerate(messages):
        at = y + (1 - number) * LANE / 2
        _box(page, (x, at, width, LANE / 2), BLOCKS[block], linewidth=0.6)
        page.text(x + width / 2, at + LANE / 4, label, fontsize=SMALL, ha="center", va="center")


def _draw_gather(page: Axes) -> None:
    left, slot, num_chunks = 6.2, 0.66, 3
    page.text(left, 3.0, "Gather: a chunk at a time", fontsize=TITLE, fontweight="bold", va="center")
    for lane, delay, label in (("data\nchannel", 0, "gather"), ("compute", 1, "chunk"), ("gradient\nchannel", 2, "home")):
        for chunk in range(num_chunks if delay < 2 else num_chunks - 1):
            x = left + (chunk + delay) * slot
            _box(page, (x, LANES[lane], slot - 0.04, LANE), (PALE, "#CFCFCF", "white")[chunk])
            page.text(x + slot / 2 - 0.02, LANES[lane] + LANE / 2, f"{label} {chunk}", fontsize=SMALL, ha="center", va="center")


def _page(height: float) -> tuple[Figure, Axes]:
    """A white page measured in inches."""
    picture = plt.figure(figsize=(WIDTH, height), facecolor="white")
    page = picture.add_axes((0, 0, 1, 1))
    page.set(xlim=(0, WIDTH), ylim=(0, height))
    page.set_axis_off()
    return picture, page


def _box(page: Axes, where: Place, colour: str, *, edge: str = INK, linewidth: float = 0.9) -> None:
    x, y, width, height = where
    page.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=edge, linewidth=linewidth))


def _arrow(page: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, *, dashed: bool = False) -> None:
    style = dict(arrowstyle="-|>", mutation_scale=10, linewidth=1.4, linestyle=(0, (2, 1.5)) if dashed else "-")
    page.add_patch(FancyArrowPatch(start, end, color=colour, shrinkA=0, shrinkB=0, zorder=3, **style))


if __name__ == "__main__":
    main()
