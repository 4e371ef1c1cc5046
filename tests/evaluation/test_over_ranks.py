"""Reading ahead of the model, and decoding by threads."""

import threading

import pytest
import torch

from helpers import encode_image
from scaleclip.errors import RunError
from scaleclip.evaluation.over_ranks import ahead, read_and_encode_over_ranks
from scaleclip.evaluation.pixels import square_pixels


def test_a_batch_is_read_while_the_one_before_is_encoded():
    next_is_read = {start: threading.Event() for start in range(0, 8, 3)}

    def read(start, stop):
        next_is_read[start].set()
        return start, stop

    def encode(span):
        if span[0] + 3 in next_is_read:
            assert next_is_read[span[0] + 3].wait(5), "the next batch waits for this one"
        return span

    assert read_and_encode_over_ranks(8, 3, read, encode) == [(0, 3), (3, 6), (6, 8)]


def test_not_more_than_a_batch_is_read_ahead():
    read = []
    batches = ahead(lambda start, stop: read.append(start), [(start, start + 1) for start in range(10)])
    next(batches)
    batches.close()
    assert read == [0, 1]


def test_a_fault_of_reading_is_the_callers():
    def read(start, stop):
        if start:
            raise RunError("broken")
        return start

    taken = []
    with pytest.raises(RunError, match="broken"):
        read_and_encode_over_ranks(9, 3, read, taken.append)
    assert taken == [0]


def test_pixels_are_in_order_and_the_first_fault_is_named():
    images = [encode_image(number, "PNG") for number in range(20)]
    fault = lambda number, error: RunError(f"{number}: {error.cause}")  # noqa: E731
    pixels_BCHW = square_pixels(images, 24, fault)
    assert (pixels_BCHW.dtype, tuple(pixels_BCHW.shape)) == (torch.uint8, (20, 3, 24, 24))
    for number in (0, 7, 19):
        torch.testing.assert_close(square_pixels([images[number]], 24, fault)[0], pixels_BCHW[number])
    images[11] = images[5] = b"no image"
    with pytest.raises(RunError, match=r"^5: undecodable_image"):
        square_pixels(images, 24, fault)
