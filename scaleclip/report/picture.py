"""What every picture of a report has: its file's name, its bytes and its words, and the look that all share."""

import io
import warnings
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444", "#B8A800")
"""Told apart with any colour vision (Okabe and Ito, 2008), the yellow darkened to be seen on white."""
RIGHT, WRONG = "#009E73", "#B9BEC6"
INK, FAINT = "#1F2933", "#7B8794"
_DPI = 160
_QUALITY = 80


class Picture(NamedTuple):
    """A picture of a report."""

    name: str
    """Of its PNG, without the ending."""
    title: str
    alt: str
    """What it shows, for those who do not see it."""
    png: bytes
    width: int
    """In pixels."""
    height: int


def to_picture(name: str, title: str, alt: str, figure: Figure, *, trim: bool = False) -> Picture:
    """A drawn figure as a PNG, at about twice the pixels of its place on a page; with `trim` without empty edges."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        # a script that the font lacks is a box here; the page has the words themselves
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(out, format="png", dpi=_DPI, facecolor="white", bbox_inches="tight" if trim else None)
    width, height = Image.open(out).size
    # a split may be called anything
    name = "".join(character if character.isalnum() or character in "_-" else "_" for character in name)
    return Picture(name, title, alt, out.getvalue(), width, height)


def to_webp(pixels_CHW: Tensor) -> bytes:
    """A thumbnail of uint8 RGB pixels."""
    out = io.BytesIO()
    Image.fromarray(pixels_CHW.permute(1, 2, 0).numpy()).save(out, "WEBP", quality=_QUALITY)
    return out.getvalue()


def clean(axes: Axes) -> None:
    """Axes without ornament."""
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9, length=3)
