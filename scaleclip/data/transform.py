"""From encoded bytes to a uint8 image of the model's size. Pixels stay uint8 until they are on the device."""

import io
import math
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from scaleclip.config import DataConfig
from scaleclip.data.webdataset import SampleError

# tried in this order, so the usual ones come first
_FORMATS = ("WEBP", "PNG", "JPEG", "GIF", "BMP", "TIFF")


# where PIL sees a decompression bomb, for JPEG as well
_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)


class Crop(NamedTuple):
    """A box in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def decode(image: bytes) -> Tensor:
    """An encoded image as RGB, uint8 [3, H, W]; transparency becomes white.

    Raises:
        SampleError: the bytes are no image that can be read.
    """
    try:
        if image[:3] == b"\xff\xd8\xff":
            height, width, *_ = simplejpeg.decode_jpeg_header(image)
            if height * width > _MAX_PIXELS:
                raise ValueError(f"{height} x {width} pixels")
            return torch.from_numpy(simplejpeg.decode_jpeg(image)).permute(2, 0, 1)
        with Image.open(io.BytesIO(image), formats=_FORMATS) as picture:
            return torch.from_numpy(_rgb(picture)).permute(2, 0, 1)
    # a broken file makes the decoders raise nearly anything: OSError, SyntaxError, TypeError, struct.error, zlib.error
    except Exception as error:
        raise SampleError("undecodable_image", f"{type(error).__name__}: {error}") from None


def random_crop(height: int, width: int, config: DataConfig, random: np.random.Generator) -> Crop:
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


def cut(image: Tensor, crop: Crop, size: int) -> Tensor:
    """The crop of a uint8 [3, H, W] image, resized with antialiasing to [3, size, size]."""
    image = image[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    if image.shape[1:] != (size, size):
        image = functional.resize(image, [size, size], functional.InterpolationMode.BICUBIC, antialias=True)
    return image.flip(2) if crop.flip else image


def _rgb(picture: Image.Image) -> NDArray[np.uint8]:
    if picture.mode.startswith("I;16"):  # PIL would clip 16 bits to 8, not scale them
        grey = (np.array(picture) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.array(picture.convert("RGB"))
