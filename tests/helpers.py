"""Samples and shards for tests."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def encode_image(seed: int, image_format: str = "PNG", size: tuple[int, int] = (40, 48)) -> bytes:
    """A random picture, (width, height) in pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, image_format)
    return out.getvalue()


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> Path:
    """A tar of webdataset's layout from (key, {extension: bytes}), with img2dataset's stats file beside it."""
    with tarfile.open(path, "w") as tar:
        for key, files in samples:
            for extension, content in files.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    path.with_name(f"{path.stem}_stats.json").write_text(json.dumps({"count": len(samples), "successes": len(samples)}))
    return path


def make_sample(number: int, **changes: bytes | None) -> tuple[str, dict[str, bytes]]:
    """Sample `number`; `changes` replace or (None) remove files."""
    fields = {"captions": {"name": f"thing {number}", "empty": " "}, "concept": f"c{number % 5}"}
    files = {
        "jpg": encode_image(number, "JPEG"),
        "txt": f"a picture of thing {number}".encode(),
        "json": json.dumps(fields).encode(),
    } | changes
    return f"{number:09d}", {extension: content for extension, content in files.items() if content is not None}
