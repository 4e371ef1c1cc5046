"""Synthetic shards: pictures with a photograph's spectrum, so that a JPEG has a photograph's size, and captions."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import webdataset
from numpy.typing import NDArray

QUALITY = 90
_PICTURES = 16
# amplitudes fall with this power of the frequency: about 0.2 bytes a pixel at quality 90
_SLOPE = 1.7
_COLOUR_SLOPE = 1.6
_NUM_WORDS = 4000
_SYLLABLES = (
    "ba",
    "co",
    "den",
    "fir",
    "gol",
    "ha",
    "ink",
    "jo",
    "ker",
    "lum",
    "mo",
    "nes",
    "or",
    "pla",
    "qui",
    "ras",
    "sto",
    "ter",
    "ul",
    "ves",
)


@dataclass(frozen=True)
class Made:
    """What `make` wrote."""

    samples: int
    shards: int
    bytes_per_pixel: float


def make(folder: Path, size: int, samples: int, shards: int, formats: Sequence[str]) -> Made:
    """Fill `folder/tar` (img2dataset's layout, with its stats files) and `folder/mds`; the same bytes every time.

    Args:
        size: height and width of the pictures in pixels.
        samples: in all shards together, a multiple of `shards`.
        formats: of `tar` and `mds`.
    """
    rows = list(_samples(size, samples))
    if "tar" in formats:
        _write_tars(folder / "tar", rows, shards)
    if "mds" in formats:
        _write_mds(folder / "mds", rows, shards)
    return Made(samples, shards, sum(len(row["jpg"]) for row in rows) / samples / size**2)


def tars(folder: Path, shards: int) -> list[str]:
    """The tars of `folder`, in order."""
    return [str(folder / "tar" / f"{number:05d}.tar") for number in range(shards)]


def picture(height: int, width: int, random: np.random.Generator) -> NDArray[np.uint8]:
    """Noise [height, width, 3] whose amplitudes fall with the frequency as a photograph's do."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1 / max(height, width)

    def noise(slope: float) -> NDArray[np.float64]:
        spectrum = np.fft.rfft2(random.standard_normal((height, width))) / frequency**slope
        field = np.fft.irfft2(spectrum, s=(height, width))
        scaled: NDArray[np.float64] = (field - field.mean()) / field.std()
        return scaled

    light = noise(_SLOPE)
    colours = [128 + 45 * light + 18 * noise(_COLOUR_SLOPE) for _ in range(3)]
    return np.stack(colours, axis=2).clip(0, 255).astype(np.uint8)


def _samples(size: int, samples: int) -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(size)
    # a Fourier transform a sample would take longer than all measurements
    pictures = [picture(size + size // 2, size + size // 2, random) for _ in range(_PICTURES)]
    words = ["".join(random.choice(_SYLLABLES, random.integers(1, 4))) for _ in range(_NUM_WORDS)]
    for number in range(samples):
        top, left = random.integers(0, size // 2, 2)
        pixels = pictures[number % _PICTURES][top : top + size, left : left + size]
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), QUALITY, colorsubsampling="420")
        # frequent words are frequent, as in a language
        chosen = (random.zipf(1.3, random.integers(5, 25)) - 1) % _NUM_WORDS
        caption = " ".join(words[word] for word in chosen)
        key = f"{number:09d}"
        fields = {"key": key, "caption": caption, "url": f"https://example.org/{key}.jpg", "width": size, "height": size,
                  "original_width": size, "original_height": size, "status": "success", "error_message": None, "exif": "{}",
                  "sha256": f"{random.integers(2**62):064x}"}  # fmt: skip
        yield {"__key__": key, "jpg": data, "txt": caption.encode(), "json": json.dumps(fields, indent=4).encode()}


def _write_tars(folder: Path, rows: list[dict[str, Any]], shards: int) -> None:
    folder.mkdir(parents=True)
    each = len(rows) // shards
    for number in range(shards):
        path = folder / f"{number:05d}.tar"
        with webdataset.TarWriter(str(path), encoder=False) as tar:
            for row in rows[number * each : (number + 1) * each]:
                tar.write(row)
        path.with_name(f"{number:05d}_stats.json").write_text(json.dumps({"count": each, "successes": each}))


def _write_mds(folder: Path, rows: list[dict[str, Any]], shards: int) -> None:
    from streaming import MDSWriter  # seconds to import

    columns = {"key": "str", "jpg": "bytes", "txt": "bytes", "json": "bytes"}
    each = sum(len(row["jpg"]) + len(row["json"]) + len(row["txt"]) for row in rows) // shards
    with MDSWriter(out=str(folder), columns=columns, size_limit=each + each // 50 + 2**16) as mds:
        for row in rows:
            mds.write({"key": row["__key__"], **{name: row[name] for name in ("jpg", "txt", "json")}})
