"""From encoded bytes to the crop: formats, colours, orientation, scaled decoding, faults."""

import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageOps
from torch.nn.functional import interpolate

from scaleclip.config import DataConfig
from scaleclip.data.sample import SampleError
from scaleclip.data.transform import Crop, centre_crop, open_image, random_crop, resize

LIMIT = 100_000_000
ORIENTATION = 0x0112


def encode(picture: Image.Image, image_format: str, **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, image_format, **options)
    return out.getvalue()


def whole(data: bytes) -> torch.Tensor:
    """Every pixel of an image, [3, H, W]."""
    picture = open_image(data, LIMIT)
    return picture.decode(Crop(0, 0, picture.height, picture.width, flip=False), max(picture.height, picture.width))


def colour(data: bytes) -> list[int]:
    """The colour of an image of one colour."""
    pixels = whole(data).flatten(1)
    assert pixels.dtype == torch.uint8
    assert (pixels == pixels[:, :1]).all()
    return pixels[:, 0].tolist()


def noise(height: int, width: int, slope: float, seed: int = 0) -> np.ndarray:
    """A picture [height, width, 3] whose amplitudes fall with this power of the frequency; a photograph's is near 1.6."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1 / max(height, width)
    fields = []
    for _ in range(3):
        field = np.fft.irfft2(np.fft.rfft2(random.standard_normal((height, width))) / frequency**slope, s=(height, width))
        fields.append(128 + 40 * (field - field.mean()) / field.std())
    return np.stack(fields, axis=2).clip(0, 255).astype(np.uint8)


def quarters(height: int = 40, width: int = 60) -> np.ndarray:
    """Red, green over blue, yellow: no orientation leaves it as it is."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (200, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 200, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 200)
    pixels[height // 2 :, width // 2 :] = (200, 200, 0)
    return pixels


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(height: int, width: int, depth: int, colour_type: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG from its raw rows, each of them after a filter byte 0."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


def grey_jpeg(sampling: tuple[int, int, int]) -> bytes:
    """A mid-grey JPEG of 16 x 32 pixels with these sampling factors, one hexadecimal digit a direction."""
    data = encode(Image.new("YCbCr", (32, 16), (128, 128, 128)), "JPEG", subsampling=0)
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    head = bytearray(data[: scan + 2 + int.from_bytes(data[scan + 2 : scan + 4])])
    across, down = [factors >> 4 for factors in sampling], [factors & 15 for factors in sampling]
    for component, factors in enumerate(sampling):
        head[frame + 11 + 3 * component] = factors
    # with the standard tables: no difference to the block before, end of block
    unit = "".join((("0000", "001010")[component == 0]) * (across[component] * down[component]) for component in range(3))
    bits = unit * (-(-32 // (8 * max(across))) * -(-16 // (8 * max(down))))
    bits += "1" * (-len(bits) % 8)
    return bytes(head) + int(bits, 2).to_bytes(len(bits) // 8) + b"\xff\xd9"


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG"])
def test_every_format_gives_height_and_width_from_its_header_and_then_its_pixels(image_format):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(image_format, {})
    data = encode(Image.fromarray(quarters()), image_format, **options)
    picture = open_image(data, LIMIT)
    assert (picture.height, picture.width) == (40, 60)
    difference = whole(data).int() - torch.from_numpy(quarters()).permute(2, 0, 1)
    assert difference.abs().max() <= (3 if image_format == "JPEG" else 0)


@pytest.mark.parametrize(
    "options", [{"progressive": True}, {"keep_rgb": True}, {"subsampling": "4:2:2"}, {"restart_marker_rows": 1}]
)
def test_kinds_of_jpeg(options):
    data = encode(Image.fromarray(quarters(64, 96)), "JPEG", quality=100, **options)
    difference = whole(data).int() - torch.from_numpy(quarters(64, 96)).permute(2, 0, 1)
    assert difference.abs().float().mean() < 2


@pytest.mark.parametrize("sampling", [(0x22, 0x11, 0x11), (0x22, 0x12, 0x11), (0x42, 0x11, 0x11), (0x21, 0x21, 0x11)])
def test_jpegs_with_rare_sampling_are_read_too(sampling):
    assert colour(grey_jpeg(sampling)) == [128, 128, 128]


def test_grey_jpeg_has_three_equal_channels():
    assert colour(encode(Image.new("L", (20, 20), 90), "JPEG", quality=100)) == [90, 90, 90]


@pytest.mark.parametrize("size", [64, 8])
def test_ink_jpegs_have_the_right_colours(size):
    # Adobe's: inverted, in CMYK (PIL) and in YCCK (libjpeg)
    ink = (0, 200, 180, 20)
    cmyk = encode(Image.new("CMYK", (64, 64), ink), "JPEG", quality=100)
    inverted = np.full((64, 64, 4), [255 - part for part in ink], np.uint8)
    ycck = simplejpeg.encode_jpeg(inverted, 100, colorspace="CMYK", colorsubsampling="420")
    assert simplejpeg.decode_jpeg_header(ycck)[2] == "YCCK"
    for data in (cmyk, ycck):
        pixels = open_image(data, LIMIT).decode(Crop(0, 0, 64, 64, flip=False), size)
        assert pixels.shape == (3, 16, 16) if size == 8 else (3, 64, 64)
        expected = torch.tensor([255 * 235 / 255, 55 * 235 / 255, 75 * 235 / 255])
        assert (pixels.float() - expected[:, None, None]).abs().max() < 2.5


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 70, [70, 70, 70]),
        ("1", 1, [255, 255, 255]),
        ("LA", (100, 255), [100, 100, 100]),
        ("LA", (100, 0), [255, 255, 255]),
        ("RGBA", (200, 100, 50, 255), [200, 100, 50]),
        ("RGBA", (200, 100, 50, 0), [255, 255, 255]),
        ("RGBA", (200, 100, 50, 51), [244, 224, 214]),
        ("I;16", 0x7FFF, [0x7F, 0x7F, 0x7F]),
    ],
)
def test_png_modes_over_white(mode, value, expected):
    picture = Image.new(mode, (5, 4), value)
    assert colour(encode(picture, "PNG")) == expected


@pytest.mark.parametrize(
    ("transparent", "expected"), [(None, [10, 200, 30]), (b"\xff\x00", [255, 255, 255]), (1, [255, 255, 255])]
)
def test_palette_png(transparent, expected):
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    options = {} if transparent is None else {"transparency": transparent}
    assert colour(encode(picture, "PNG", **options)) == expected


def test_the_transparent_colour_of_a_png_without_alpha_is_white():
    picture = Image.new("RGB", (4, 4), (9, 8, 7))
    picture.putpixel((0, 0), (1, 2, 3))
    data = encode(picture, "PNG", transparency=(9, 8, 7))
    assert whole(data)[:, 1, 1].tolist() == [255, 255, 255]
    assert whole(data)[:, 0, 0].tolist() == [1, 2, 3]


def test_sixteen_bits_a_colour_are_scaled_not_clipped():
    pixel = struct.pack(">HHH", 0x1234, 0x8000, 0xFF00)
    assert colour(png(2, 3, 16, 2, (b"\0" + 3 * pixel) * 2)) == [0x12, 0x80, 0xFF]
    assert colour(png(2, 3, 16, 0, (b"\0" + 3 * b"\xab\xcd") * 2)) == [0xAB] * 3
    assert colour(png(2, 3, 16, 6, (b"\0" + 3 * (pixel + b"\xff\xff")) * 2)) == [0x12, 0x80, 0xFF]
    assert colour(png(2, 3, 16, 4, (b"\0" + 3 * b"\xab\xcd\x00\x00") * 2)) == [255] * 3


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(image_format):
    frames = [Image.new("RGB", (12, 10), name) for name in ("#c80a1e", "#00ff00", "#0000ff")]
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encode(frames[0], image_format, save_all=True, append_images=frames[1:], duration=50, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert colour(data) == [0xC8, 0x0A, 0x1E]


def with_orientation(pixels: np.ndarray, orientation: int, image_format: str) -> bytes:
    exif = Image.Exif()
    # a tag before it, longer than four bytes
    exif[0x010E] = "a description"
    exif[ORIENTATION] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(image_format, {})
    return encode(Image.fromarray(pixels), image_format, exif=exif, **options)


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_is_read_in_both_byte_orders(order):
    exif = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HIHHHIHHI", 42, 8, 1, ORIENTATION, 3, 1, 6, 0, 0)
    data = encode(Image.fromarray(quarters()), "JPEG", exif=b"Exif\0\0" + exif)
    assert exif in data
    assert open_image(data, LIMIT).height == 60


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations_as_pil_applies_them(orientation, image_format):
    data = with_orientation(quarters(), orientation, image_format)
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    picture = open_image(data, LIMIT)
    assert (picture.height, picture.width) == expected.shape[:2] == ((40, 60) if orientation < 5 else (60, 40))
    assert (whole(data).permute(1, 2, 0).int() - torch.from_numpy(expected)).abs().max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_crop_is_one_of_the_upright_image_at_every_scale(orientation):
    data = with_orientation(noise(300, 400, 1.6), orientation, "JPEG")
    picture = open_image(data, LIMIT)
    upright = whole(data)
    crop = Crop(20, 60, 192, 208, flip=False)
    assert torch.equal(picture.decode(crop, 192), upright[:, 20:212, 60:268])
    small = picture.decode(crop, 64)
    assert small.shape == (3, 96, 104)
    # any mix-up of axes or edges differs by tens
    average = torch.nn.functional.avg_pool2d(upright[:, 20:212, 60:268].float(), 2)
    assert (small.float() - average).abs().mean() < 2


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_none(orientation):
    assert torch.equal(whole(with_orientation(quarters(), orientation, "JPEG")), whole(with_orientation(quarters(), 1, "JPEG")))


@pytest.mark.parametrize("cut", [0, 2, 7, 12, 20, 40])
def test_broken_exif_is_no_reason_to_lose_an_image(cut):
    data = with_orientation(quarters(), 6, "JPEG")
    at = data.index(b"Exif\0\0") + 6
    end = data.index(b"Exif\0\0") - 2 + int.from_bytes(data[at - 8 : at - 6])
    broken = data[: at + cut] + b"\xff" * (end - at - cut) + data[end:]
    assert whole(broken).shape in ((3, 40, 60), (3, 60, 40))


def test_exif_is_found_behind_other_segments_only_before_the_scan():
    data = with_orientation(quarters(), 6, "JPEG")
    begin = data.index(b"\xff\xe1")
    end = begin + 2 + int.from_bytes(data[begin + 2 : begin + 4])
    other = b"\xff\xe1" + (2 + 30).to_bytes(2) + b"http://ns.adobe.com/xap/1.0/\0\0"
    exif, rest = data[begin:end], data[:begin] + data[end:]
    assert open_image(data[:begin] + other + exif + data[end:], LIMIT).height == 60
    assert open_image(rest + exif, LIMIT).height == 40


def naturals() -> list[np.ndarray]:
    return [noise(400, 520, slope, seed) for seed, slope in enumerate((1.3, 1.6, 2.0))]


def full_precision(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [3, h, w] resized in fp32."""
    return interpolate(pixels[None].float(), (size, size), mode="bicubic", antialias=True)[0].clamp(0, 255)


@pytest.mark.parametrize("subsampling", ["420", "444"])
def test_scaled_decoding_differs_little_from_resizing_every_pixel(subsampling):
    config = DataConfig(crop_scale=(0.3, 1.0))
    random = np.random.default_rng(0)
    scales = set()
    for pixels in naturals():
        data = simplejpeg.encode_jpeg(pixels, 90, colorsubsampling=subsampling)
        picture = open_image(data, LIMIT)
        upright = whole(data)
        for _ in range(40):
            size = int(random.integers(20, 130))
            top, left, height, width, _ = crop = random_crop(400, 520, config, random)
            decoded = picture.decode(crop, size)
            scale = round(height / decoded.shape[1])
            scales.add(scale)
            # as far down as half as many pixels again as asked for allow, and no further
            assert scale == max([s for s in (1, 2, 4, 8) if min(height, width) >= 1.5 * s * size])
            edges = [(edge + scale // 2) // scale for edge in (top, top + height, left, left + width)]
            assert decoded.shape == (3, edges[1] - edges[0], edges[3] - edges[2])
            # the crop moved to the grid of the scale, by half a step at most
            top, bottom, left, right = (edge * scale for edge in edges)
            difference = (resize(decoded, size, flip=False) - full_precision(upright[:, top:bottom, left:right], size)).abs()
            assert difference.mean() < (1.5 if scale > 1 else 0.3)
            assert difference.max() < (10 if scale > 1 else 2.5)
    assert scales == {1, 2, 4, 8}


def test_a_crop_at_a_scale_stays_inside_where_the_size_is_no_multiple():
    for height, width in ((131, 97), (132, 98), (133, 99), (135, 103)):
        picture = open_image(simplejpeg.encode_jpeg(noise(height, width, 1.6), 90), LIMIT)
        for scale in (2, 4):
            # the largest size that is decoded at this scale
            size = int(min(height, width) / scale / 1.5)
            pixels = picture.decode(Crop(0, 0, height, width, flip=False), size)
            assert pixels.shape == (3, (height + scale // 2) // scale, (width + scale // 2) // scale)
            corner = picture.decode(Crop(height - 96, width - 96, 96, 96, flip=False), 96 * 2 // 3 // scale)
            assert abs(corner.shape[1] - 96 // scale) <= 1
            assert abs(corner.shape[2] - 96 // scale) <= 1


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF"])
def test_other_formats_give_every_pixel_of_the_crop(image_format):
    options = {"lossless": True} if image_format == "WEBP" else {}
    pixels = noise(90, 110, 1.6)
    picture = open_image(encode(Image.fromarray(pixels), image_format, **options), LIMIT)
    for crop in (Crop(3, 7, 50, 61, flip=True), Crop(0, 0, 90, 110, flip=False), Crop(89, 109, 1, 1, flip=False)):
        expected = pixels[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        assert torch.equal(picture.decode(crop, 1), torch.from_numpy(expected).permute(2, 0, 1))


def test_a_transparent_png_is_cropped_as_an_opaque_one_is():
    picture = Image.new("P", (30, 20), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    picture.paste(0, (0, 0, 15, 20))
    opened = open_image(encode(picture, "PNG", transparency=0), LIMIT)
    assert opened.decode(Crop(5, 14, 2, 2, flip=False), 2)[:, 0].tolist() == [[255, 10], [255, 200], [255, 30]]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5000), (5000, 1), (3, 2)])
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_tiny_and_extreme_images_fill_the_crop(height, width, image_format):
    pixels = np.full((height, width, 3), (200, 200, 200), np.uint8)
    picture = open_image(encode(Image.fromarray(pixels), image_format), LIMIT)
    assert (picture.height, picture.width) == (height, width)
    random = np.random.default_rng(0)
    for crop in (random_crop(height, width, DataConfig(), random), centre_crop(height, width)):
        out = resize(picture.decode(crop, 32), 32, crop.flip)
        assert out.shape == (3, 32, 32)
        assert (out.int() - 200).abs().max() <= 2


JPEG = simplejpeg.encode_jpeg(noise(128, 128, 1.6), 90)
PNG = encode(Image.fromarray(noise(128, 128, 1.6)), "PNG")
BROKEN = {
    "zero bytes": b"",
    "one byte": b"\xff",
    "only the mark of a JPEG": b"\xff\xd8\xff",
    "HTML": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "HTML with the mark of a JPEG": b"\xff\xd8\xff<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "a JPEG's first half": JPEG[: len(JPEG) // 2],
    "a JPEG without its last byte": JPEG[:-1],
    "a progressive JPEG's first half": encode(Image.fromarray(noise(128, 128, 1.6)), "JPEG", progressive=True)[:2000],
    "a JPEG overwritten": JPEG[:2000] + bytes(1000) + JPEG[3000:],
    "a JPEG with rare sampling, cut off": grey_jpeg((0x42, 0x11, 0x11))[:-4],
    "a PNG's first half": PNG[:9000],
    "a PNG overwritten": PNG[:9000] + bytes(1000) + PNG[10000:],
    "a WebP's first half": encode(Image.fromarray(noise(128, 128, 1.6)), "WEBP")[:1500],
    "a GIF's first half": encode(Image.fromarray(noise(128, 128, 1.6)), "GIF")[:3000],
    "a TIFF header with nonsense": b"II*\0" + bytes(range(60)),
    "a format that is not read": encode(Image.new("RGB", (4, 4)), "PPM"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_image_is_a_counted_fault(case):
    with pytest.raises(SampleError) as error:
        whole(BROKEN[case])
    assert error.value.cause == "undecodable_image"
    assert error.value.detail


def huge_jpeg() -> bytes:
    data = bytearray(JPEG)
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\x70\x00\x70\x00"
    return bytes(data)


def huge_gif() -> bytes:
    return (
        encode(Image.new("P", (4, 4)), "GIF")[:6]
        + struct.pack("<HH", 65535, 65535)
        + encode(Image.new("P", (4, 4)), "GIF")[10:]
    )


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (huge_jpeg(), "28672 x 28672"),
        (png(60000, 50000, 8, 2, b""), "60000 x 50000"),
        (png(2**31 - 1, 2**31 - 1, 8, 2, b""), "2147483647 x 2147483647"),
        (huge_gif(), "65535 x 65535"),
        (b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 40000, 30000, 1, 24, 0, 0, 0, 0, 0, 0), "30000 x 40000"),
    ],
    ids=["jpeg", "png", "largest png", "gif", "bmp"],
)
def test_an_image_that_claims_to_be_huge_is_not_decoded(data, size, recwarn):
    with pytest.raises(SampleError) as error:
        open_image(data, LIMIT)
    assert error.value.cause == "too_many_pixels"
    assert error.value.detail == f"{size} pixels are more than data.max_pixels=100000000"
    assert not recwarn.list


def test_max_pixels_is_the_only_limit():
    data = encode(Image.new("1", (20000, 10000)), "PNG")
    assert len(data) < 100_000
    # above what PIL calls an attack, 179 million
    assert open_image(data, 200_000_000).width == 20000
    with pytest.raises(SampleError, match="too_many_pixels"):
        open_image(data, 199_999_999)
    for image_format in ("JPEG", "PNG"):
        small = encode(Image.new("RGB", (20, 10)), image_format)
        assert open_image(small, 200).height == 10
        with pytest.raises(SampleError, match="too_many_pixels"):
            open_image(small, 199)


def test_resizing_is_torchvisions_and_within_rounding_of_full_precision():
    from torchvision.transforms.v2 import functional

    for size in (13, 64, 224):
        pixels = torch.from_numpy(noise(150, 170, 1.3)).permute(2, 0, 1)
        for crop in (pixels, pixels[:, 3:140, 9:160], pixels.contiguous(), pixels.flip(1)):
            out = resize(crop, size, flip=False)
            assert out.dtype == torch.uint8
            theirs = functional.resize(crop, [size, size], functional.InterpolationMode.BICUBIC, antialias=True)
            assert torch.equal(out, theirs)
            assert (out - full_precision(crop, size)).abs().max() < 2.5


def test_a_crop_of_the_right_size_is_left_as_it_is():
    pixels = torch.from_numpy(noise(40, 40, 1.0)).permute(2, 0, 1)
    assert torch.equal(resize(pixels, 40, flip=False), pixels)
    assert torch.equal(resize(pixels, 40, flip=True), pixels.flip(2))


def test_colours_lie_side_by_side():
    out = resize(torch.from_numpy(noise(50, 60, 1.6)).permute(2, 0, 1), 32, flip=False)
    assert out[None].permute(0, 2, 3, 1).is_contiguous()


def test_mirroring_before_and_after_resizing_is_the_same():
    pixels = torch.from_numpy(noise(100, 130, 1.6)).permute(2, 0, 1)
    after = resize(pixels, 64, flip=True)
    before = resize(pixels.flip(2), 64, flip=False)
    assert torch.equal(after, resize(pixels, 64, flip=False).flip(2))
    assert (after.int() - before.int()).abs().max() <= 1


def test_a_mirrored_orientation_is_a_flip():
    pixels = noise(200, 240, 1.6)
    crop = Crop(10, 20, 160, 180, flip=False)
    mirrored = crop._replace(left=240 - 20 - 180)
    plain, turned = (open_image(with_orientation(pixels, orientation, "JPEG"), LIMIT) for orientation in (1, 2))
    for size in (160, 48, 24):
        left, right = plain.decode(crop, size), turned.decode(mirrored, size)
        assert torch.equal(left.flip(2), right)
        assert (resize(left, size, flip=True).int() - resize(right, size, flip=False).int()).abs().max() <= 1


def test_random_crops_have_the_configured_area_and_stay_inside():
    config = DataConfig(crop_scale=(0.3, 0.5), crop_ratio=(0.8, 1.25), flip_probability=0.25)
    random = np.random.default_rng(0)
    crops = [random_crop(60, 80, config, random) for _ in range(2000)]
    areas = np.array([crop.height * crop.width / 4800 for crop in crops])
    assert areas.min() > 0.28
    assert areas.max() < 0.52
    assert areas.std() > 0.05
    assert all(crop.top + crop.height <= 60 and crop.left + crop.width <= 80 for crop in crops)
    assert max(crop.top + crop.height for crop in crops) == 60
    assert 0.2 < np.mean([crop.flip for crop in crops]) < 0.3


def test_the_draws_of_a_crop_are_fixed():
    """They are part of what a resumed run repeats."""
    random = np.random.default_rng(7)
    config = DataConfig(crop_scale=(0.2, 0.9), flip_probability=0.5)
    crops = [tuple(random_crop(300, 400, config, random)) for _ in range(3)]
    assert crops == [(8, 13, 291, 341, False), (2, 32, 280, 332, True), (66, 88, 234, 203, True)]
    assert random.integers(1000) == 478


def test_a_crop_that_never_fits_is_the_centre():
    crop = random_crop(10, 100, DataConfig(crop_scale=(0.9, 1.0), crop_ratio=(1.0, 1.0)), np.random.default_rng(0))
    assert crop == centre_crop(10, 100) == Crop(0, 45, 10, 10, flip=False)
