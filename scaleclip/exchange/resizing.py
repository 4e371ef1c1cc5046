"""How other systems bring an image to its square, where that is not what happens here."""

import functools
import logging
from collections.abc import Mapping
from typing import Any

_BICUBIC = 3  # PIL's number
_PIL = {0: "nearest", 1: "lanczos", 2: "bilinear", _BICUBIC: "bicubic", 4: "box", 5: "hamming"}
log = logging.getLogger("scaleclip")


def warn_of_open_clips(preprocess: Mapping[str, Any], where: str) -> None:
    """Say where a `preprocess_cfg` resizes otherwise."""
    mode, filter_ = preprocess.get("resize_mode") or "shortest", preprocess.get("interpolation") or "bicubic"
    _warn(where, [f"resize_mode={mode}"] * (mode != "shortest") + [f"interpolation={filter_}"] * (filter_ != "bicubic"))


def warn_of_transformers(processor: Mapping[str, Any], where: str) -> None:
    """Say where a preprocessor_config.json resizes otherwise."""
    size, number = processor.get("size"), processor.get("resample")
    squashes = isinstance(size, Mapping) and "height" in size and not processor.get("do_center_crop")
    found = ["a square without a crop"] * bool(squashes and processor.get("do_resize", True))
    _warn(
        where,
        found
        + [f"resample={_PIL.get(number, number) if isinstance(number, int) else number}"] * (number not in (None, _BICUBIC)),
    )


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def _warn(where: str, found: list[str]) -> None:
    if found:
        _warn_once(
            f"{where} brings images to their size by {' and '.join(found)}. Here the shorter side is resized, bicubic, and the "
            f"middle is cropped: figures differ a little from those of the system that it comes from"
        )
