"""Classification gives the same figures on any number of ranks."""

from pathlib import Path

import pytest
import torch

from classified import digits, write_folder, write_tars
from classify_rank_jobs import classify, classify_with_a_broken_image
from scaleclip.local_ranks import run_ranks


@pytest.mark.slow
def test_figures_are_those_of_one_rank(tiny_config_path: str, tmp_path: Path) -> None:
    """Neither 331 nor 170 images divide by the batch, the part or the ranks."""
    images, labels = digits(501)
    train = str(write_tars(tmp_path / "train", images[:331], labels[:331]))
    test = str(write_folder(tmp_path / "test", images[331:], labels[331:]))
    (tmp_path / "test" / "classnames.txt").write_text((tmp_path / "train" / "classnames.txt").read_text())
    folders = [tmp_path / f"{ranks}" for ranks in (1, 2, 3)]
    [(expected, fits)] = run_ranks(classify, 1, tiny_config_path, train, test, str(folders[0]))
    assert [figure.metric for figure in expected] == [
        "zero-shot top-1",
        "zero-shot top-5",
        "zero-shot mean per class",
        "5-way 3-shot",
        "linear probe",
        "linear probe mean per class",
    ]
    for ranks in (2, 3):
        for figures, weights in run_ranks(classify, ranks, tiny_config_path, train, test, str(folders[ranks - 1])):
            assert figures == expected
            assert all(torch.equal(found, alone) for found, alone in zip(weights, fits, strict=True))


@pytest.mark.slow
def test_a_broken_image_is_every_ranks_error(tiny_config_path: str, tmp_path: Path) -> None:
    images, labels = digits(100)
    images[70] = b"no image"
    test = str(write_tars(tmp_path / "test", images, labels))
    first, second = run_ranks(classify_with_a_broken_image, 2, tiny_config_path, test, str(tmp_path))
    # 48 images are a batch: the second rank has the broken one
    assert "undecodable_image" in second
    assert "2.tar sample 2 cannot be used" in second
    assert first == f"RunError: rank 1 failed: {second}"
