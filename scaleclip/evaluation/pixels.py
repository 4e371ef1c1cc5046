"""An image as every evaluation sees it."""

from torch import Tensor

from scaleclip.config import DataConfig
from scaleclip.data.transform import centre_crop, open_image, resize


def square_pixels(data: bytes, size: int) -> Tensor:
    """uint8 (3, size, size) of an encoded image's largest centred square.

    Raises:
        SampleError: the bytes are no image that can be read.
    """
    picture = open_image(data, DataConfig().max_pixels)
    crop = centre_crop(picture.height, picture.width)
    # every pixel: figures are compared with other systems'
    return resize(picture.decode(crop, crop.height), size, flip=False)
