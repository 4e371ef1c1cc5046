"""From encoded bytes to a uint8 image of the model's size. Pixels stay uint8 until they are on the device.

The crop is drawn from the header's size. A JPEG much larger than the model's input is then decoded at 1/2, 1/4 or 1/8 of its
size, which its 8 x 8 cosine transforms give cheaply; what is left of the way is resized with antialiasing.
"""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, Protocol

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from scaleclip.data.sample import SampleError

# data.max_pixels is the limit, for every format
Image.MAX_IMAGE_PIXELS = None

# tried in this order, so the usual ones come first
_FORMATS = ("WEBP", "PNG", "JPEG", "GIF", "BMP", "TIFF")
_JPEG = b"\xff\xd8\xff"
# the others (3/8, 5/8, ...) take longer than decoding all of it
_SCALES = (8, 4, 2)
# A crop decoded at less than full size still has this many times the pixels a side that it is resized to. Means of the
# difference from resizing every pixel, in 255ths: 0.4 to 1.1 at 1.5 (0.27 is rounding), 0.5 to 1.8 at 1.1, 0.3 to 0.7 at 2.
_HEADROOM = 1.5
_ORIENTATION = 0x0112
# EXIF orientation -> is the stored image transposed, then mirrored top to bottom, then left to right
_UPRIGHT = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


class Crop(NamedTuple):
    """A box in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


class CropConfig(Protocol):
    """What random crops are drawn by; DataConfig and AugmentConfig say what each means."""

    @property
    def crop_scale(self) -> tuple[float, float]: ...
    @property
    def crop_ratio(self) -> tuple[float, float]: ...
    @property
    def flip_probability(self) -> float: ...


class Picture:
    """An encoded image of which the header has been read.

    Args:
        height, width: as it is stored, before EXIF's orientation.
        orientation: EXIF's, 1 to 8.
    """

    def __init__(self, height: int, width: int, orientation: int) -> None:
        self._transposed, self._mirrored_down, self._mirrored_across = _UPRIGHT.get(orientation, _UPRIGHT[1])
        self.height, self.width = (width, height) if self._transposed else (height, width)

    def decode(self, crop: Crop, size: int) -> Tensor:
        """The pixels of a crop as RGB; transparency becomes white.

        Args:
            crop: of the upright image, `height` x `width`; its `flip` is `resize`'s business.
            size: pixels a side that the crop will be resized to. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where half
                as many again are left, and the crop's edges are rounded to that grid. `size=crop.height` takes every pixel.

        Returns:
            uint8 [3, h, w]; h and w are the crop's, or those of the crop at 1/2, 1/4 or 1/8.

        Raises:
            SampleError: the bytes are no image that can be read.
        """
        top, left, height, width, _ = crop
        if self._mirrored_down:
            top = self.height - top - height
        if self._mirrored_across:
            left = self.width - left - width
        if self._transposed:
            top, left, height, width = left, top, width, height
        with _faults():
            pixels = torch.from_numpy(self._decode(Crop(top, left, height, width, flip=False), size))
        pixels = pixels.permute(2, 1, 0) if self._transposed else pixels.permute(2, 0, 1)
        mirrored = [1] * self._mirrored_down + [2] * self._mirrored_across
        return pixels.flip(mirrored) if mirrored else pixels

    def _decode(self, crop: Crop, size: int) -> NDArray[np.uint8]:
        """[h, w, 3] of a crop of the stored image."""
        raise NotImplementedError


class _Jpeg(Picture):
    def __init__(self, data: bytes, height: int, width: int) -> None:
        super().__init__(height, width, _jpeg_orientation(data))
        self._data, self._stored = data, (height, width)

    def _decode(self, crop: Crop, size: int) -> NDArray[np.uint8]:
        scale = next((scale for scale in _SCALES if min(crop.height, crop.width) >= _HEADROOM * scale * size), 1)
        height, width = (-(-side // scale) for side in self._stored)
        # strict: whatever libjpeg would warn of, from missing pixels to bytes too many, may be wrong pixels
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(self._data, min_height=height, min_width=width, strict=True)
        edges = (crop.top, crop.top + crop.height, crop.left, crop.left + crop.width)
        top, bottom, left, right = ((edge + scale // 2) // scale for edge in edges)
        return pixels[top:bottom, left:right]


class _Other(Picture):
    """Any other format, and rare kinds of JPEG, through PIL."""

    def __init__(self, picture: Image.Image) -> None:
        # PIL turns TIFF upright itself
        orientation = 1 if picture.format == "TIFF" else picture.getexif().get(_ORIENTATION, 1)
        super().__init__(picture.height, picture.width, orientation)
        self._picture = picture

    def _decode(self, crop: Crop, size: int) -> NDArray[np.uint8]:
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        return _rgb(self._picture.crop(box))


def open_image(data: bytes, max_pixels: int) -> Picture:
    """Read an encoded image's header.

    Args:
        data: JPEG, PNG, WebP, GIF, BMP or TIFF; of an animation the first frame is the image.
        max_pixels: height x width that is still accepted.

    Raises:
        SampleError: the bytes are no image that can be read (`undecodable_image`) or one too large (`too_many_pixels`).
    """
    with _faults():
        if data.startswith(_JPEG):
            # TurboJPEG knows the usual ways to store colours at less than full size, PIL all
            with suppress(ValueError):
                height, width, *_ = simplejpeg.decode_jpeg_header(data)
                _check_size(height, width, max_pixels)
                return _Jpeg(data, height, width)
        picture = Image.open(io.BytesIO(data), formats=_FORMATS)
        _check_size(picture.height, picture.width, max_pixels)
        return _Other(picture)


def random_crop(height: int, width: int, config: CropConfig, random: np.random.Generator) -> Crop:
    """A box of random area and aspect ratio (Inception crop, arXiv:1409.4842); the largest centred one if ten tries miss."""
    flip = bool(random.random() < config.flip_probability)
    low, high = (math.log(ratio) for ratio in config.crop_ratio)
    for _ in range(10):
        area = height * width * random.uniform(*config.crop_scale)
        ratio = math.exp(random.uniform(low, high))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return Crop(int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w, flip)
    return centre_crop(height, width)._replace(flip=flip)


def centre_crop(height: int, width: int) -> Crop:
    """The largest square in the middle."""
    side = min(height, width)
    return Crop((height - side) // 2, (width - side) // 2, side, side, flip=False)


def resize(pixels: Tensor, size: int, flip: bool) -> Tensor:
    """uint8 [3, h, w] -> uint8 [3, size, size] by antialiased bicubic interpolation, mirrored left to right if asked.

    Colours lie side by side in memory, as decoders write them and as the interpolation's vector code wants them: a batch in
    torch.channels_last takes the result as it is, any other one has to have it transposed.
    """
    if pixels.shape[1:] != (size, size):
        # strides of a channels_last batch of one; pixels[None] has others, and torch would transpose it
        batch = pixels.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
        pixels = interpolate(batch, (size, size), mode="bicubic", antialias=True)[0]
    return pixels.flip(2) if flip else pixels


@contextmanager
def _faults() -> Iterator[None]:
    try:
        yield
    except SampleError:
        raise
    # a broken file makes the decoders raise nearly anything: OSError, SyntaxError, TypeError, struct.error, zlib.error
    except Exception as error:
        raise SampleError("undecodable_image", f"{type(error).__name__}: {error}") from None


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise SampleError("too_many_pixels", f"{height} x {width} pixels are more than data.max_pixels={max_pixels}")


def _jpeg_orientation(data: bytes) -> int:
    """EXIF's orientation, 1 where it is not said or not said properly."""
    at = 2
    # segments up to the first scan: marker, length, contents
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        size = int.from_bytes(data[at + 2 : at + 4])
        if data[at + 1] == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return _tiff_orientation(data[at + 10 : at + 2 + size])
        at += 2 + size
    return 1


def _tiff_orientation(exif: bytes) -> int:
    """Of the first directory: a count, then 12 bytes an entry (tag, type, count, value)."""
    order = "little" if exif[:2] == b"II" else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(exif[at : at + size], order)  # type: ignore[arg-type]

    first = number(4, 4)
    for entry in range(first + 2, first + 2 + 12 * number(first, 2), 12):
        if number(entry, 2) == _ORIENTATION:
            return number(entry + 8, 2)
    return 1


def _rgb(picture: Image.Image) -> NDArray[np.uint8]:
    """uint8 [h, w, 3]."""
    if picture.mode.startswith("I;16"):  # PIL would clip 16 bits to 8, not scale them
        grey = (np.array(picture) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.array(picture.convert("RGB"))
