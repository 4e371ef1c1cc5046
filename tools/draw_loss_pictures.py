"""Draw the pictures of kernels/README.md: how the logits are visited in panels, and how blocks travel over ranks.

python tools/draw_loss_pictures.py                    draw kernels/pictures/tiles.png and ring.png
python tools/draw_loss_pictures.py --table            print FLOPs and bytes sent instead, as the README's table
"""

import argparse
import io
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.ticker import EngFormatter
from PIL import Image

from loss_bench.formulas import sent_bytes, step_flop
from loss_bench.points import DTYPE_BYTES, Comparison
from scaleclip_kernels.distributed import GATHERED_BYTES
from scaleclip_kernels.panels import PANEL_COLUMNS, PANEL_ROWS

PICTURES = Path(__file__).parent.parent / "kernels" / "pictures"
TABLE_BATCHES = (32_768, 131_072, 1_048_576)
TABLE_RANKS = (1, 8, 64, 256)

# Okabe and Ito's colours, which colour-blind readers tell apart
BLUE, SKY, GREEN, ORANGE, VERMILLION, PURPLE = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
PALE_GREEN, INK, GREY, PALE, WHITE = "#BFE3D8", "#222222", "#6B6B6B", "#EBEBEB", "#FFFFFF"
ROW, COLUMN = BLUE, VERMILLION
BLOCKS = (SKY, ORANGE, GREEN, PURPLE)
"""One for each rank's columns."""

WIDTH = 9.0
"""Of a picture, in inches."""
PIXELS_PER_INCH = 100
"""Where a page shows it 900 pixels wide; the file has twice as many."""
SMALL, NORMAL, TITLE = 9.5, 10.5, 11.5
"""Letters, in points."""
NUM_COLOURS = 128
"""In a file: enough for smooth letters, a third of the size."""

Spot = tuple[float, float]
Place = tuple[float, float, float, float]
"""Left, lower edge, width and height in inches."""


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
    for name, page in (("tiles", draw_tiles()), ("ring", draw_ring())):
        path = arguments.folder / f"{name}.png"
        page.save(path)
        print(path)


def markdown_table(dim: int, dtype: str) -> str:
    """Of a step of the symmetric softmax loss: work, and bytes that a rank sends."""
    lines = [
        f"Symmetric softmax loss and its gradients, D = {dim}, features in {dtype}; bytes are what one rank sends.",
        "",
        "| N | W | FLOP | FLOP a rank | ring forward | ring backward | gather forward | gather backward |",
        "|--:" * 8 + "|",
    ]
    for batch in TABLE_BATCHES:
        flop = step_flop("softmax", Comparison(batch, dim, dtype, scale=1.0, mode="full"))
        for num_ranks in TABLE_RANKS:
            cells = [f"{batch:,}", str(num_ranks), _amount(flop), _amount(flop / num_ranks)]
            for schedule in ("ring", "gather"):
                forward, full = (
                    sent_bytes("softmax", schedule, num_ranks, batch // num_ranks, dim, DTYPE_BYTES[dtype], mode)
                    for mode in ("forward", "full")
                )
                cells += [_amount(forward, "B"), _amount(full - forward, "B")]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _amount(value: float, unit: str = "") -> str:
    return EngFormatter(unit, places=2)(value) if value else "0"


class Page:
    """White paper, measured in inches from its lower left corner."""

    def __init__(self, height: float) -> None:
        self._figure = Figure(figsize=(WIDTH, height), facecolor=WHITE)
        self.axes: Axes = self._figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(0, height))
        self.axes.set_axis_off()

    def save(self, path: Path) -> None:
        png = io.BytesIO()
        self._figure.savefig(png, dpi=2 * PIXELS_PER_INCH)
        Image.open(png).convert("RGB").quantize(NUM_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)

    def say(
        self,
        at: Spot,
        text: str,
        *,
        size: float = SMALL,
        colour: str = INK,
        bold: bool = False,
        align: Literal["left", "center", "right"] = "left",
        upright: bool = False,
    ) -> None:
        weight, rotation = "bold" if bold else "normal", 90 if upright else 0
        self.axes.text(*at, text, fontsize=size, color=colour, fontweight=weight, ha=align, va="center", rotation=rotation)

    def box(
        self, place: Place, colour: str, text: str = "", *, edge: str = INK, linewidth: float = 0.9, size: float = SMALL
    ) -> None:
        x, y, width, height = place
        self.axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=edge, linewidth=linewidth))
        self.say((x + width / 2, y + height / 2), text, size=size, align="center")

    def line(self, start: Spot, end: Spot, colour: str, *, dashes: tuple[float, float] | None = None) -> None:
        style = "-" if dashes is None else (0, dashes)
        self.axes.plot(*zip(start, end, strict=True), color=colour, linewidth=1.3, linestyle=style, zorder=1.5)

    def arrow(self, start: Spot, end: Spot, colour: str, *, dashed: bool = False) -> None:
        arrow = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, shrinkA=0, shrinkB=0, zorder=3)
        arrow.set(color=colour, linewidth=1.4, linestyle=(0, (2, 1.5)) if dashed else "-")
        self.axes.add_patch(arrow)


DOTS = (1.0, 1.2)


def draw_tiles() -> Page:
    """The panels of a block of logits in the order of their visits, and what each gives in the two passes."""
    page, middle = Page(height=6.3), WIDTH / 2
    _draw_pass(page, 0.0, "Forward: one matmul a panel", reads=("X",), adds_to="m, Z")
    _draw_pass(page, middle, "Backward: three matmuls a panel", reads=("X", "r"), adds_to="dX")
    page.line((middle, 1.1), (middle, 6.15), PALE)

    forward = (
        ("matmul 1", INK, r"$S = t\,\log_2 e\;\, X_R\, Y_C^{\top}$"),
        ("rows", ROW, r"$m_i' = \mathrm{max}(m_i,\, s_{ij}\;\mathrm{over}\;j)$"),
        ("", ROW, r"$Z_i = 2^{\,m_i - m_i'}\, Z_i + \Sigma_j\; 2^{\,s_{ij} - m_i'}$"),
        ("columns", COLUMN, r"likewise over $i$, with maxima of their own"),
    )
    backward = (
        ("matmul 2", INK, r"$S$ once more"),
        ("", INK, r"$G = 2^{\,S - r_i} + 2^{\,S - c_j}$,  no term exceeds 1"),
        ("matmul 3", ROW, r"$dX_R$  +=  $G\, Y_C$"),
        ("matmul 4", COLUMN, r"$dY_C$  +=  $G^{\top} X_R$"),
    )
    for left, steps in ((0.0, forward), (middle, backward)):
        for number, (name, colour, formula) in enumerate(steps):
            y = 2.25 - 0.34 * number
            page.say((left + 0.35, y), name, colour=colour, bold=True)
            page.say((left + 1.2, y), formula, size=NORMAL)

    page.line((0.35, 0.82), (0.75, 0.82), INK, dashes=DOTS)
    page.say((0.85, 0.82), "matched pairs: left out of every panel; their logits and gradients are computed outside")
    page.say(
        (0.35, 0.54),
        r"between the passes, $m$, $Z$ and the matched logits give the loss and the log-sum-exps "
        r"$r$ and $c$, pair weights folded in",
    )
    size = f"{PANEL_ROWS:,} x {PANEL_COLUMNS:,}"
    page.say((0.35, 0.26), f"of the N x M logits, one panel exists at a time ({size}, two buffers); grey: visited, overwritten")
    return page


def _draw_pass(page: Page, left: float, title: str, *, reads: tuple[str, ...], adds_to: str) -> None:
    """The matrix and its sides: what is read on the left and above, what is added to on the right and below."""
    count, cell, row, column = 4, 0.5, 1, 2
    x0, top, gap, depths = left + 1.3, 5.0, 0.08, {"X": 0.34, "dX": 0.34, "m, Z": 0.22, "r": 0.12}
    size = count * cell
    page.say((left + 0.35, 6.05), title, size=TITLE, bold=True)

    # the current panel last: its edge lies over its neighbours'
    now = row * count + column
    for number in [*(n for n in range(count * count) if n != now), now]:
        x, y, is_now = x0 + number % count * cell, top - (number // count + 1) * cell, number == now
        colour, edge, linewidth = (PALE_GREEN, GREEN, 2.0) if is_now else (PALE if number < now else WHITE, GREY, 0.9)
        page.box((x, y, cell, cell), colour, edge=edge, linewidth=linewidth)
        # in the upper right corner, off the diagonal
        where = x + cell - 0.05, y + cell - 0.11
        page.say(where, f"{number + 1}", colour=INK if is_now else GREY, bold=is_now, align="right")
    page.line((x0, top), (x0 + size, top - size), INK, dashes=DOTS)

    at_x, at_y = x0 - gap, top + gap
    for name in reversed(reads):
        depth = depths[name]
        _strip(page, (at_x - depth, top - size, depth, size), row, count, ROW)
        _strip(page, (x0, at_y, size, depth), column, count, COLUMN)
        page.say((at_x - depth / 2, top + 0.14), f"${name}$", size=NORMAL, colour=ROW, align="center")
        page.say((x0 + size + 0.1, at_y + depth / 2), f"${ {'X': 'Y', 'r': 'c'}[name] }$", size=NORMAL, colour=COLUMN)
        at_x, at_y = at_x - depth - 0.06, at_y + depth + 0.06
    page.say((at_x - 0.1, top - size / 2), "N rows", colour=GREY, align="center", upright=True)
    page.say((x0 + size / 2, at_y + 0.11), "M columns", colour=GREY, align="center")

    depth, right, below = depths[adds_to], x0 + size + gap, top - size - gap
    _strip(page, (right, top - size, depth, size), row, count, ROW)
    _strip(page, (x0, below - depth, size, depth), column, count, COLUMN)
    page.say((right, below - 0.08), f"${adds_to}$", size=NORMAL, colour=ROW)
    page.say((x0 - 0.1, below - depth / 2), f"${adds_to.replace('X', 'Y')}$", size=NORMAL, colour=COLUMN, align="right")
    page.arrow((x + cell / 2 + 0.1, y + cell / 2), (right, y + cell / 2), ROW)
    page.arrow((x + cell / 2, y + cell / 2 - 0.1), (x + cell / 2, below), COLUMN)


def _strip(page: Page, place: Place, chosen: int, count: int, colour: str) -> None:
    """Features or statistics along the matrix, and which of them the panel meets; rows are counted from above."""
    x, y, width, height = place
    page.box(place, WHITE, edge=colour)
    if height > width:
        page.box((x, y + (count - 1 - chosen) * height / count, width, height / count), colour, edge=colour)
    else:
        page.box((x + chosen * width / count, y, width / count, height), colour, edge=colour)


LANE, GRADIENT_LANE, COMPUTE_LANE, DATA_LANE = 0.42, 2.68, 1.92, 1.22
"""Height, and lower edges, of the timelines' lanes."""
TIMELINE_TITLE, TIMELINE_NOTE = 3.54, 0.92
"""Their titles, and their notes' first lines."""


def draw_ring() -> Page:
    """Four ranks: which columns each holds when, what overlaps in one hop; and the gather schedule."""
    page = Page(height=7.11)
    _draw_holdings(page)
    _draw_travellers(page)
    for y, name in ((GRADIENT_LANE, "gradient\nchannel"), (COMPUTE_LANE, "compute"), (DATA_LANE, "data\nchannel")):
        page.say((0.35, y + LANE / 2), name, colour=GREY)
    _draw_hop(page)
    _draw_gather(page)
    return page


def _draw_holdings(page: Page) -> None:
    num_ranks, width, height, step_x, step_y, x0, y0 = len(BLOCKS), 0.58, 0.34, 0.84, 0.5, 1.1, 5.81
    page.say((0.35, 6.86), "Ring: the columns that a rank holds", size=TITLE, bold=True)
    for hop in range(num_ranks + 1):
        x, is_home = x0 + hop * step_x, hop == num_ranks
        page.say((x + width / 2, 6.48), "home" if is_home else f"hop {hop}", colour=GREY, align="center")
        for rank in range(num_ranks):
            y, block = y0 - rank * step_y, (rank - hop) % num_ranks
            name = f"$dY_{block}$" if is_home else f"$Y_{block}$"
            colour = WHITE if is_home else BLOCKS[block]
            page.box((x, y, width, height), colour, name, edge=BLOCKS[block], linewidth=1.8, size=NORMAL)
            if hop == 0:
                page.say((x0 - 0.15, y + height / 2), f"rank {rank}", colour=GREY, align="right")
            # to the next rank; the last rank's leaves below and enters above
            for at in (y, y0 + step_y) if rank + 1 == num_ranks else (y,):
                start, end = (x + width + 0.03, at + 0.01), (x + step_x - 0.03, at - step_y + height - 0.01)
                if not is_home:
                    page.arrow(start, end, GREY, dashed=hop + 1 == num_ranks)
    page.say((1.1, 3.88), "dashed: what was collected, alone (column $m$, $Z$ or $dY$)", colour=GREY)


def _draw_travellers(page: Page) -> None:
    left, top, forward, backward = 5.5, 6.48, 6.6, 7.65
    page.say((forward, top), "forward", colour=GREY)
    page.say((backward, top), "backward", colour=GREY)
    for number, (name, remark, in_forward, in_backward) in enumerate(
        (
            ("stays", "own rows", r"$X$, row $m$, $Z$", r"$X$, $r$, $dX$"),
            ("travels", "W - 1 hops,\ndata channel", r"$Y_b$, validity", r"$Y_b$, validity, $c_b$"),
            ("collects", "W hops, fp32,\ngradient channel", r"column $m$, $Z$", r"$dY_b$"),
        )
    ):
        y = top - 0.4 - (0, 0.62, 1.4)[number]
        page.line((left, y + 0.2), (8.75, y + 0.2), PALE)
        page.say((left, y), name, bold=True)
        page.say((left, y - 0.2 - 0.08 * remark.count("\n")), remark, colour=GREY)
        page.say((forward, y), in_forward)
        page.say((backward, y), in_backward)


def _draw_hop(page: Page) -> None:
    """From the second half of hop 0 to the first half of hop 2: both halves of block 1 come and go."""
    page.say((0.35, TIMELINE_TITLE), "Ring: a hop of the backward pass, rank 2", size=TITLE, bold=True)
    left, half, travel, rank, num_ranks = 1.03, 1.09, 0.86, 2, len(BLOCKS)
    steps, until_first_product = ((0.36, "$S, G$"), (0.27, "$dX$"), (0.27, "$dY$")), 0.36 + 0.27 + 0.27 / 2
    above = GRADIENT_LANE + LANE + 0.13
    for number, (hop, name) in enumerate(((0, "B"), (1, "A"), (1, "B"), (2, "A"))):
        x, block = left + number * half, (rank - hop) % num_ranks
        page.say((x + 0.06, COMPUTE_LANE - 0.12), f"half {name}", colour=GREY)
        at = x
        for width, label in (*steps, (half - sum(width for width, _ in steps), "...")):
            page.box((at, COMPUTE_LANE, width, LANE), BLOCKS[block], label)
            at += width
        page.box((x, COMPUTE_LANE, half, LANE), "none", linewidth=2.0)

        # what left in the middle of a hop, or at the end of the one before
        leaving, moved = (block, "A") if name == "B" else ((block + 1) % num_ranks, "B")
        coming = (leaving - 1) % num_ranks
        _draw_messages(
            page,
            (x, GRADIENT_LANE, travel),
            (rf"$dY_{leaving}\;${moved} out", leaving),
            (rf"$dY_{coming}\;${moved} in", coming),
        )
        if number > 0:
            page.arrow((x, COMPUTE_LANE + LANE), (x, GRADIENT_LANE), INK)
            arrived = x - half + travel - 0.05, GRADIENT_LANE
            page.arrow(arrived, (x + until_first_product, COMPUTE_LANE + LANE), INK)
        if (hop, name) == (1, "B"):
            page.say((x + half / 2, above), "half a hop", colour=GREY, align="center")
            for edge, tip in ((0.19, 0.02), (half - 0.19, half - 0.02)):
                page.arrow((x + edge, above), (x + tip, above), GREY)

    hop_1, hop_2, end, arrival = left + half, left + 3 * half, left + 4 * half, 0.8 * half
    for hop, x in enumerate((left, hop_1, hop_2)):
        page.say((x + 0.06, above), f"hop {hop}", colour=GREY)
    _draw_messages(page, (left, DATA_LANE, arrival), ("$Y_1$ in", 1), ("$Y_2$ out", 2))
    _draw_messages(page, (hop_1, DATA_LANE, half + arrival), ("$Y_0$ in", 0), ("$Y_1$ out", 1))
    _draw_messages(page, (hop_2, DATA_LANE, end - hop_2), ("$Y_3$ in", 3), ("$Y_0$ out", 0))
    for x in (hop_1, hop_2):
        page.line((x, DATA_LANE - 0.1), (x, above + 0.1), GREY, dashes=(4.0, 3.0))
        page.arrow((x - half + arrival, DATA_LANE + LANE), (x, COMPUTE_LANE), INK)
    for line, text in enumerate(
        (
            "A, B: halves of a block's columns; of each, the first panel is drawn. A half",
            "of $dY$ (forward: $m$, $Z$) leaves when worked on and has half a hop to travel.",
            "Arrows, what waits: the first product added to a half for it, a hop for its $Y$.",
            "Foreign blocks: two at most, $Y_1$ being read and passed on, $Y_0$ on its way.",
        )
    ):
        page.say((0.35, TIMELINE_NOTE - 0.22 * line), text)


def _draw_messages(page: Page, place: tuple[float, float, float], *messages: tuple[str, int]) -> None:
    """One above the other: what arrives and what leaves."""
    x, y, width = place
    for number, (label, block) in enumerate(messages):
        page.box((x, y + (1 - number) * LANE / 2, width, LANE / 2), BLOCKS[block], label, linewidth=0.6)


def _draw_gather(page: Page) -> None:
    left, slot, num_chunks = 5.65, 0.63, 3
    page.say((left, TIMELINE_TITLE), "Gather: a chunk at a time", size=TITLE, bold=True)
    for delay, (y, label) in enumerate(((DATA_LANE, "gather"), (COMPUTE_LANE, "chunk"), (GRADIENT_LANE, "home"))):
        for chunk in range(num_chunks):
            place = left + (chunk + delay) * slot, y, slot, LANE
            page.box(place, (PALE, "#C8C8C8", WHITE)[chunk], f"{label} {chunk}", size=9)
    for line, text in enumerate(
        (
            f"gather: {GATHERED_BYTES >> 20} MiB over all ranks; two chunks held",
            "home: statistics by all-to-all (forward) or",
            "gradients by reduce-scatter, fp32 (backward)",
        )
    ):
        page.say((left, TIMELINE_NOTE - 0.22 * line), text)


if __name__ == "__main__":
    main()
