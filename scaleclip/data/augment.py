"""SimCLR's random views of an image (arXiv:2002.05709, appendix A): crop, mirror, colours, grey, blur. Pixels stay uint8."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad
from torchvision.transforms.v2 import functional

from scaleclip.config import AugmentConfig
from scaleclip.data.transform import Picture, random_crop, resize


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
        functional.adjust_hue,
    )
    ranges = [(max(0.0, 1 - most), 1 + most) for most in jitter[:3]] + [(-jitter[3], jitter[3])]
    for number in random.permutation(len(changes)):
        pixels = changes[number](pixels, random.uniform(*ranges[number]))
    return pixels


def _blur(pixels: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of square pixels, mirrored at the edges; as torchvision's, in a sixth of its time at 224 pixels."""
    size = pixels.shape[-1]
    reach = size // 20
    weight_K = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma).square())
    # what every pixel of a row gives to every blurred one
    blur_SS = conv1d(pad(torch.eye(size), (reach, reach), mode="reflect").unsqueeze(1), (weight_K / weight_K.sum())[None, None])
    blur_SS = blur_SS.squeeze(1)
    return (blur_SS.T @ pixels.float() @ blur_SS).round_().to(torch.uint8)
