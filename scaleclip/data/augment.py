"""SimCLR's random views of an image (arXiv:2002.05709, appendix A): crop, mirror, colours, grey, blur. Pixels stay uint8."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2 import functional

from scaleclip.config import AugmentConfig
from scaleclip.data.transform import Picture, random_crop, resize

_SIGMAS = 4  # a Gaussian's reach


def augment(picture: Picture, config: AugmentConfig, size: int, random: np.random.Generator) -> Tensor:
    """A view of a picture, which may be decoded any number of times. What is random comes from `random` alone.

    Args:
        picture: an opened image.
        config: which changes, how often and how large.
        size: height and width in pixels. The blur reaches size // 20 pixels far, as in SimCLR: below 20 there is none.
        random: drawn from as often as the draws before demand.

    Returns:
        uint8 [3, size, size].

    Raises:
        SampleError: the bytes are no image that can be read.
    """
    crop = random_crop(picture.height, picture.width, config, random)
    pixels = resize(picture.decode(crop, size), size, crop.flip)
    if random.random() < config.jitter_probability:
        pixels = _jitter(pixels, config.jitter, random)
    if random.random() < config.gray_probability:
        pixels = functional.rgb_to_grayscale(pixels, num_output_channels=3)
    if random.random() < config.blur_probability:
        pixels = _blur(pixels, random.uniform(*config.blur_sigma))
    return pixels


def _jitter(pixels: Tensor, jitter: tuple[float, float, float, float], random: np.random.Generator) -> Tensor:
    """Brightness, contrast and saturation by factors around 1, hue by a part of the circle, in random order."""
    changes: tuple[Callable[[Tensor, float], Tensor], ...] = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        _adjust_hue,
    )
    ranges = [(max(0.0, 1 - most), 1 + most) for most in jitter[:3]] + [(-jitter[3], jitter[3])]
    for number in random.permutation(len(changes)):
        pixels = changes[number](pixels, random.uniform(*ranges[number]))
    return pixels


def _adjust_hue(pixels: Tensor, turn: float) -> Tensor:
    """Turn the hue by a share of the circle; as torchvision's but for rounding, in a third of its time.

    A channel lies below the largest one by the chroma times a trapezium of the hue's distance from the channel's own: neither
    saturation nor the sector of the circle is needed.
    """
    values = pixels.float()
    red, green, blue = values
    top = values.amax(dim=0)
    chroma = top - values.amin(dim=0)
    scale = 1.0 / chroma.clamp(min=1.0)  # whole numbers: 0, where there is no hue, or at least 1
    of_blue = (red - green).mul_(scale).add_(4.0)
    of_green = torch.where(top == green, (blue - red).mul_(scale).add_(2.0), of_blue)
    hue = torch.where(top == red, (green - blue).mul_(scale), of_green).add_(6 * turn).remainder_(6.0)
    distance = (hue + torch.tensor([3.0, 1.0, -1.0])[:, None, None]).abs_()
    distance = torch.minimum(distance, (6.0 - distance).abs_())
    below = (2.0 - distance).clamp_(0.0, 1.0).mul_(chroma)
    return torch.sub(top, below, out=below).round_().to(torch.uint8)


def _blur(pixels: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of square pixels, mirrored at the edges; as torchvision's, in a twentieth of its time at 224 pixels."""
    size = pixels.shape[-1]
    reach = size // 20
    weight_K = torch.exp(-0.5 * (torch.arange(reach + 1) / sigma).square())
    weights = (weight_K / (2 * weight_K.sum() - 1)).tolist()
    reach = min(reach, math.ceil(_SIGMAS * sigma))  # what is farther does not change 8 bits
    padded = pad(pixels.float(), (reach,) * 4, mode="reflect")
    for dim in (1, 2):
        blurred = padded.narrow(dim, reach, size) * weights[0]
        for far in range(1, reach + 1):
            pair = padded.narrow(dim, reach - far, size) + padded.narrow(dim, reach + far, size)
            blurred.add_(pair, alpha=weights[far])
        padded = blurred
    return padded.round_().to(torch.uint8)
