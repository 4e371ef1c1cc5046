"""Images as every evaluation sees them."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from scaleclip.config import DataConfig
from scaleclip.data.sample import SampleError
from scaleclip.data.transform import centre_crop, open_image, resize

_MOST_THREADS = 8


def square_pixels(images: Sequence[bytes], size: int, fault: Callable[[int, SampleError], Exception]) -> Tensor:
    """uint8 (B, 3, size, size) of the largest centred square of each encoded image. Threads decode, one a CPU, at most eight.

    Raises:
        Exception: what `fault(number, error)` makes of the first image that cannot be read.
    """

    def decode(data: bytes) -> Tensor | SampleError:
        try:
            return centre_square(data, size)
        except SampleError as error:
            return error

    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), _MOST_THREADS), "decode") as threads:
        decoded = list(threads.map(decode, images))
    pixels = []
    for number, each in enumerate(decoded):
        if isinstance(each, SampleError):
            raise fault(number, each) from None
        pixels.append(each)
    return torch.stack(pixels)


def centre_square(data: bytes, size: int) -> Tensor:
    """uint8 (3, size, size) of the largest centred square of an encoded image. Raises SampleError where it cannot be read."""
    picture = open_image(data, DataConfig().max_pixels)
    crop = centre_crop(picture.height, picture.width)
    # every pixel: figures are compared with other systems'
    return resize(picture.decode(crop, crop.height), size, flip=False)
