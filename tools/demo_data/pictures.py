"""What a picture of the demo data is, and how pictures are scaled, encoded and compared."""

import io
import re
import unicodedata
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from rich.progress import track

SIZE = 64
"""Width and height of an image in pixels."""
NEAR_DUPLICATE = 6.0
"""Two images are near-duplicates below this mean absolute difference (0..255) of their 16x16 RGB thumbnails."""
READABLE = {"alphanum": "letters and numbers", "av-symbol": "audio and video symbol", "smileys-emotion": "smileys"}


class Picture(NamedTuple):
    """One image with its texts."""

    source: str
    license: str
    concept: str
    name: str
    keywords: str
    description: str
    group: str
    subgroup: str
    path: str
    webp: bytes
    thumbnail: NDArray[np.float32]
    """(768,) float32: 16x16 RGB of the decoded WebP, 0..255."""

    @property
    def caption(self) -> str:
        return f"{self.name}, {self.keywords}" if self.keywords else self.name


def slug(text: str) -> str:
    """`flag: St. Kitts & Nevis` -> `flag-st-kitts-and-nevis`: lower case ASCII, accents and apostrophes left out."""
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower().replace("'", "")
    text = text.replace("&", "and").replace("#", "hash").replace("*", "asterisk")
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def readable(name: str, joint: str = " ") -> str:
    return READABLE.get(name, name.replace("-", joint).replace("_", " "))


def to_webp(image: Image.Image) -> bytes:
    """Fit an RGBA image into SIZE x SIZE on white."""
    image = ImageOps.contain(image, (SIZE, SIZE), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (SIZE, SIZE), "white")
    canvas.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2), image)
    buffer = io.BytesIO()
    canvas.save(buffer, "WEBP", quality=60, method=6)
    return buffer.getvalue()


def thumbnail(webp: bytes) -> NDArray[np.float32]:
    pixels: NDArray[np.float32] = np.asarray(Image.open(io.BytesIO(webp)).convert("RGB"), np.float32)
    means: NDArray[np.float32] = pixels.reshape(16, SIZE // 16, 16, SIZE // 16, 3).mean(axis=(1, 3)).ravel()
    return means


def is_blank(picture: Picture) -> bool:
    return float(picture.thumbnail.std()) < 3


def near_duplicates(queries: list[Picture], pool: list[Picture], what: str) -> list[NDArray[np.int64]]:
    """For each query the indices of its near-duplicates in the pool (a query that is in the pool finds itself)."""
    # Averaging over 4x4 blocks can only lower the mean absolute difference, so the coarse pass loses nothing.
    fine = np.stack([picture.thumbnail for picture in pool])
    coarse = fine.reshape(-1, 4, 4, 4, 4, 3).mean(axis=(2, 4)).reshape(len(pool), -1)
    found = []
    for query in track(queries, what):
        block = query.thumbnail.reshape(4, 4, 4, 4, 3).mean(axis=(1, 3)).ravel()
        near = np.flatnonzero(np.abs(coarse - block).mean(axis=1) < NEAR_DUPLICATE)
        found.append(near[np.abs(fine[near] - query.thumbnail).mean(axis=1) < NEAR_DUPLICATE])
    return found
