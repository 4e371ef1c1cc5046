"""SimCLR's views: what is drawn, how often, and what each change does to the pixels."""

import colorsys
import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from scaleclip.config import AugmentConfig
from scaleclip.data import augment as augmentation
from scaleclip.data.augment import augment
from scaleclip.data.sample import SampleError
from scaleclip.data.transform import Crop, Picture, centre_crop, open_image, random_crop, resize

SIZE = 40
NEVER = {
    "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip_probability": 0.0, "jitter_probability": 0.0,
    "jitter": (0.0, 0.0, 0.0, 0.0), "gray_probability": 0.0, "blur_probability": 0.0, "blur_sigma": (1.0, 1.0),
}  # fmt: skip


def noise(height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """Neighbours differ, no colour is near black or white, and no two channels are alike."""
    random = np.random.default_rng(0)
    return random.uniform([60, 85, 110], [120, 145, 170], (height, width, 3)).astype(np.uint8)


def picture_of(pixels: np.ndarray, image_format: str = "PNG") -> Picture:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, image_format)
    return open_image(out.getvalue(), 100_000)


def view(seed: int = 0, pixels: np.ndarray | None = None, size: int = SIZE, **changes: object) -> torch.Tensor:
    """A view [3, size, size] in which nothing changes but what is said."""
    picture = picture_of(noise() if pixels is None else pixels)
    return augment(picture, AugmentConfig(**(NEVER | changes)), size, np.random.default_rng(seed))


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def jittered(number: int, most: float, seed: int) -> torch.Tensor:
    """Only the one change of the four; the others are by factors of 1 and an angle of 0."""
    strengths = [0.0] * 4
    strengths[number] = most
    return view(seed, jitter_probability=1.0, jitter=tuple(strengths)).double()


def luma(pixels: torch.Tensor) -> torch.Tensor:
    """Rec. 601."""
    return torch.tensordot(torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64), pixels.double(), 1)


def test_nothing_changes_where_nothing_is_asked_for():
    assert torch.equal(view(), tensor(noise()))


def test_a_view_is_a_function_of_the_generator_alone():
    picture = picture_of(noise(60, 90))
    config = AugmentConfig()
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    views = [augment(picture, config, 32, np.random.default_rng(seed)) for seed in range(8)]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    np.random.seed(1)
    again = [augment(picture, config, 32, np.random.default_rng(seed)) for seed in range(8)]
    for number, pixels in enumerate(views):
        assert pixels.dtype == torch.uint8
        assert pixels.shape == (3, 32, 32)
        assert torch.equal(pixels, again[number])
        assert not any(torch.equal(pixels, other) for other in views[:number])


def test_the_draws_of_a_view_are_fixed():
    """They are part of what a resumed run repeats."""
    random = np.random.default_rng(7)
    picture = picture_of(noise())
    for _ in range(5):
        augment(picture, AugmentConfig(), 24, random)
    assert random.integers(1_000_000) == 392243


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_picture_gives_several_views(image_format):
    picture = picture_of(noise(60, 90), image_format)
    config, random = AugmentConfig(), np.random.default_rng(0)
    first, second = (augment(picture, config, 32, random) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, augment(picture_of(noise(60, 90), image_format), config, 32, np.random.default_rng(0)))


def test_the_crop_is_the_one_that_is_drawn():
    pixels = noise(60, 90)
    config = AugmentConfig(**(NEVER | {"crop_scale": (0.1, 0.5), "crop_ratio": (0.5, 2.0), "flip_probability": 0.5}))
    flips = 0
    for seed in range(8):
        top, left, height, width, flip = crop = random_crop(60, 90, config, np.random.default_rng(seed))
        assert crop != centre_crop(60, 90)._replace(flip=flip)
        expected = resize(tensor(pixels[top : top + height, left : left + width]), SIZE, flip)
        assert torch.equal(augment(picture_of(pixels), config, SIZE, np.random.default_rng(seed)), expected)
        flips += flip
    assert 0 < flips < 8


def test_flip_is_left_to_right():
    assert torch.equal(view(flip_probability=1.0), tensor(noise()).flip(2))


def test_brightness_scales():
    factors = []
    for seed in range(20):
        found, pixels = jittered(0, 0.4, seed), tensor(noise()).double()
        factor = found.sum() / pixels.sum()
        factors.append(factor.item())
        assert (found - (factor * pixels).clamp(max=255)).abs().max() <= 2.5
    assert 0.58 < min(factors) < 0.75
    assert 1.25 < max(factors) < 1.42


def test_contrast_moves_pixels_away_from_the_mean_grey():
    factors = []
    for seed in range(20):
        found, pixels = jittered(1, 0.4, seed), tensor(noise()).double()
        mean = luma(pixels).mean()
        factors.append((found.std() / pixels.std()).item())
        assert (found - (mean + factors[-1] * (pixels - mean)).clamp(0, 255)).abs().max() <= 2.5
    assert 0.58 < min(factors) < 0.75
    assert 1.25 < max(factors) < 1.42


def test_saturation_moves_colours_away_from_their_grey():
    factors = []
    for seed in range(20):
        found, pixels = jittered(2, 0.4, seed), tensor(noise()).double()
        grey = luma(pixels)
        factors.append(((found - luma(found)).norm() / (pixels - grey).norm()).item())
        assert (found - (grey + factors[-1] * (pixels - grey))).abs().max() <= 2.5
    assert 0.58 < min(factors) < 0.75
    assert 1.25 < max(factors) < 1.42


def test_hue_turns_and_leaves_the_rest():
    """One angle for all pixels, within a tenth of the circle."""
    angles = []
    for seed in range(20):
        found = jittered(3, 0.1, seed)
        before, after = (
            np.array([colorsys.rgb_to_hsv(*colour) for colour in (pixels / 255).flatten(1).T.tolist()])
            for pixels in (tensor(noise()).double(), found)
        )
        turned = (after[:, 0] - before[:, 0] + 0.5) % 1 - 0.5
        strong = before[:, 1] > 0.3
        angles.append(np.median(turned[strong]))
        assert np.abs(turned[strong] - angles[-1]).max() < 0.02
        np.testing.assert_allclose(after[:, 1:], before[:, 1:], atol=0.02)
    assert -0.102 < min(angles) < -0.06
    assert 0.06 < max(angles) < 0.102


@pytest.mark.parametrize("turn", [-0.5, -0.1, -0.013, 0.0, 0.05, 0.1, 0.5])
def test_hue_is_that_of_hsv_rounded(turn):
    """Of any colour, those at the corners of the cube and greys too; torchvision cuts fractions off."""
    random = np.random.default_rng(0)
    some, corners = random.integers(0, 256, (3, 400), np.uint8), random.choice(np.array([0, 1, 254, 255], np.uint8), (3, 400))
    pixels = torch.from_numpy(np.concatenate([some, corners, np.tile(np.arange(256, dtype=np.uint8), (3, 1))], axis=1))[:, None]
    found = augmentation._adjust_hue(pixels, turn)
    before = [colorsys.rgb_to_hsv(*colour) for colour in (pixels[:, 0].double() / 255).T.tolist()]
    exact = (
        255 * torch.tensor([colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value) for hue, saturation, value in before]).T
    )
    assert (found[:, 0] - exact).abs().max() < 0.501
    assert (found.int() - functional.adjust_hue(pixels, turn).int()).abs().max() <= 1


def test_changes_of_colour_come_once_each_in_every_order(monkeypatch):
    calls = []
    for module, name in (
        (functional, "brightness"),
        (functional, "contrast"),
        (functional, "saturation"),
        (augmentation, "hue"),
    ):
        change = "_adjust_hue" if name == "hue" else f"adjust_{name}"
        monkeypatch.setattr(module, change, lambda pixels, _, name=name: calls.append(name) or pixels)
    for seed in range(240):
        view(seed, pixels=noise(2, 2), size=2, jitter_probability=1.0)
    orders = [tuple(calls[start : start + 4]) for start in range(0, len(calls), 4)]
    assert len(orders) == 240
    assert set(orders) == set(itertools.permutations(("brightness", "contrast", "saturation", "hue")))


def test_gray_is_rec_601():
    found = view(gray_probability=1.0)
    assert (found[0] == found[1]).all()
    assert (found[0] == found[2]).all()
    assert (found[0].double() - luma(tensor(noise()))).abs().max() < 1.1


@pytest.mark.parametrize("size", [SIZE, 100])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_gaussian_a_tenth_of_the_picture_wide(size, sigma):
    pixels = noise(size, size)
    found = view(pixels=pixels, size=size, blur_probability=1.0, blur_sigma=(sigma, sigma))
    kernel = 2 * (size // 20) + 1
    expected = functional.gaussian_blur(tensor(pixels), [kernel, kernel], [sigma, sigma])
    assert (found.int() - expected.int()).abs().max() <= 1
    assert (found != expected).double().mean() < 0.02
    assert torch.equal(found, tensor(pixels)) == (sigma == 0.1)


def test_the_width_of_the_blur_is_drawn():
    found = [view(seed, blur_probability=1.0, blur_sigma=(0.4, 2.0)).double().std().item() for seed in range(20)]
    ends = [view(blur_probability=1.0, blur_sigma=(sigma, sigma)).double().std().item() for sigma in (0.4, 2.0)]
    assert ends[1] < min(found) < ends[1] + 0.2 * (ends[0] - ends[1])
    assert ends[0] > max(found) > ends[0] - 0.4 * (ends[0] - ends[1])


def test_colours_change_before_the_blur():
    """Rounding aside the order is seen where a colour is cut off: blurred first, less would be."""
    pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
    pixels[::2] = 250
    found = view(3, pixels=pixels, jitter_probability=1.0, jitter=(0.4, 0, 0, 0), blur_probability=1.0, blur_sigma=(2.0, 2.0))
    bright = view(3, pixels=pixels, jitter_probability=1.0, jitter=(0.4, 0, 0, 0))
    assert bright.max() == 255
    assert torch.equal(found, functional.gaussian_blur(bright, [5, 5], [2.0, 2.0]))


@pytest.mark.parametrize("change", ["flip", "jitter", "gray", "blur"])
def test_changes_come_as_often_as_configured(change):
    changes = {f"{change}_probability": 0.3, "jitter": (0.4, 0.4, 0.4, 0.1), "blur_sigma": (1.0, 2.0)}
    unchanged = tensor(noise())
    share = np.mean([not torch.equal(view(seed, **changes), unchanged) for seed in range(300)])
    assert 0.22 < share < 0.38


def test_a_broken_picture_is_a_fault_of_the_sample():
    out = io.BytesIO()
    Image.fromarray(noise()).save(out, "JPEG")
    picture = open_image(out.getvalue()[:-200], 100_000)
    with pytest.raises(SampleError):
        augment(picture, AugmentConfig(), SIZE, np.random.default_rng(0))


def test_a_crop_that_never_fits_is_flipped_too():
    pixels = noise(10, 100)
    found = view(pixels=pixels, size=10, flip_probability=1.0)
    assert centre_crop(10, 100) == Crop(0, 45, 10, 10, flip=False)
    assert torch.equal(found, tensor(pixels[:, 45:55]).flip(2))
