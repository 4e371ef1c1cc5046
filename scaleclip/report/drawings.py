"""Sheets as pictures, for slides and papers; the page itself shows queries as text and thumbnails."""

import io
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from scaleclip.report.picture import FAINT, INK, RIGHT, WRONG, Picture, to_picture
from scaleclip.report.sheets import NUM_BEST, Query, Sheet

_CELL = 1.05  # inches


def draw_sheet(sheet: Sheet) -> list[Picture]:
    """`map_SPLIT`, `text_to_image_SPLIT` and `image_to_text_SPLIT`."""
    return [_draw_map(sheet), _draw_of_texts(sheet), _draw_of_images(sheet)]


def shorten(text: str, characters: int) -> str:
    """A text cut at a word's end."""
    return textwrap.shorten(text, characters, placeholder=" ...") if len(text) > characters else text


def _draw_map(sheet: Sheet) -> Picture:
    cosine, right = np.array(sheet.map.cosine), np.array(sheet.map.is_right)
    num_images, num_texts = cosine.shape
    figure = Figure((1.0 + 0.72 * num_texts + 1.6, 1.9 + 0.72 * num_images))
    left, bottom = 0.75 / figure.get_figwidth(), 0.12 / figure.get_figheight()
    width, height = 0.72 * num_texts / figure.get_figwidth(), 0.72 * num_images / figure.get_figheight()
    axes = figure.add_axes((left, bottom, width, height))
    image = axes.imshow(cosine, cmap="cividis", aspect="auto")
    axes.set_xticks(range(num_texts), [_line(sheet.texts[text], 26) for text in sheet.map.texts], rotation=35, ha="left")
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, labelsize=8, length=0, pad=2, colors=INK)
    axes.tick_params(axis="x", rotation=35)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    middle = (cosine.min() + cosine.max()) / 2
    for (row, column), value in np.ndenumerate(cosine):
        colour = "black" if value > middle else "white"
        weight = "bold" if right[row, column] else "normal"
        axes.text(
            column, row, f"{round(value, 2) + 0.0:.2f}", ha="center", va="center", fontsize=8, color=colour, weight=weight
        )
        if right[row, column]:
            for colour, linewidth in (("black", 4.5), ("white", 2.2)):  # seen on any colour
                box = Rectangle((column - 0.45, row - 0.45), 0.9, 0.9, fill=False, linewidth=linewidth, edgecolor=colour)
                axes.add_patch(box)
    for row, number in enumerate(sheet.map.images):
        place = bottom + height * (1 - (row + 0.94) / num_images)
        _show(figure, sheet.thumbnails[number], (0.06, place * figure.get_figheight(), 0.62, 0.62))
    bar = figure.add_axes((left + width + 0.15 / figure.get_figwidth(), bottom, 0.12 / figure.get_figwidth(), height))
    figure.colorbar(image, cax=bar)
    bar.tick_params(labelsize=8, colors=INK, length=2)
    bar.spines[:].set_visible(False)
    best = int((cosine.argmax(axis=1) == right.argmax(axis=1)).sum())
    alt = (
        f"Cosines of {num_images} images (rows) with {num_texts} texts (columns), the right pairs framed: the right text is "
        f"the most similar one for {best} of {num_images} images"
    )
    return to_picture(f"map_{sheet.name}", f"{sheet.name}: similarities", alt, figure, trim=True)


def _draw_of_texts(sheet: Sheet) -> Picture:
    lines = len(sheet.of_texts)
    figure = Figure((2.9 + NUM_BEST * _CELL + 0.1, lines * (_CELL + 0.14) + 0.1))
    tall = figure.get_figheight()
    for line, query in enumerate(sheet.of_texts):
        bottom = tall - (line + 1) * (_CELL + 0.14)
        words = "\n".join(textwrap.wrap(_line(sheet.texts[query.number], 96), 32))
        figure.text(0.02, (bottom + _CELL / 2) / tall, words, fontsize=9, color=INK, va="center")
        for place, (number, is_right) in enumerate(zip(query.best, query.is_right, strict=True)):
            axes = _show(figure, sheet.thumbnails[number], (2.9 + place * _CELL, bottom, _CELL - 0.1, _CELL - 0.1))
            _frame(axes, is_right)
    alt = f"{lines} texts and the {NUM_BEST} images most similar to each, the right ones framed; {_ranks(sheet.of_texts)}"
    return to_picture(f"text_to_image_{sheet.name}", f"{sheet.name}: text to image", alt, figure)


def _draw_of_images(sheet: Sheet) -> Picture:
    lines = len(sheet.of_images)
    figure = Figure((7.4, lines * (_CELL + 0.14) + 0.1))
    wide, tall = figure.get_size_inches()
    for line, query in enumerate(sheet.of_images):
        bottom = tall - (line + 1) * (_CELL + 0.14)
        _show(figure, sheet.thumbnails[query.number], (0.1, bottom, _CELL - 0.1, _CELL - 0.1))
        for place, (number, is_right) in enumerate(zip(query.best, query.is_right, strict=True)):
            height = (bottom + _CELL - 0.2 - place * 0.2) / tall
            figure.text(1.3 / wide, height, f"{query.similarity[place]:.2f}", fontsize=8, color=FAINT, va="center")
            colour, weight = (RIGHT, "bold") if is_right else (INK, "normal")
            figure.text(
                1.65 / wide, height, _line(sheet.texts[number], 80), fontsize=9, color=colour, weight=weight, va="center"
            )
    alt = f"{lines} images and the {NUM_BEST} texts most similar to each, the right ones bold; {_ranks(sheet.of_images)}"
    return to_picture(f"image_to_text_{sheet.name}", f"{sheet.name}: image to text", alt, figure)


def _line(text: str, characters: int) -> str:
    # a dollar would begin a formula
    return shorten(" ".join(text.split()), characters).replace("$", r"\$")


def _show(figure: Figure, encoded: bytes, box: tuple[float, float, float, float]) -> Axes:
    """A thumbnail at (left, bottom, width, height) inches."""
    wide, tall = figure.get_size_inches()
    axes = figure.add_axes((box[0] / wide, box[1] / tall, box[2] / wide, box[3] / tall))
    axes.imshow(np.asarray(Image.open(io.BytesIO(encoded))))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return axes


def _frame(axes: Axes, is_right: bool) -> None:
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color(RIGHT if is_right else WRONG)
    axes.spines[:].set_linewidth(3.5 if is_right else 0.8)


def _ranks(queries: tuple[Query, ...]) -> str:
    first = sum(query.rank == 1 for query in queries)
    return f"a right one is first for {first} of {len(queries)}"
