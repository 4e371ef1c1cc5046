"""scaleclip captions sample: what a run's caption decoder writes."""

from pathlib import Path

import pytest

from runs import run
from scaleclip.errors import ConfigError
from scaleclip.written_captions import written_captions

CAPTIONS = ("model.caption_decoder={queries: 8}", "data.caption={}", "data.views=[{texts: [name]}]")
TEXTS = "data.sources.tiny.texts={caption: txt, name: json:captions.name}"


@pytest.mark.slow
def test_a_decoder_that_has_learned_writes_captions(tiny_config: Path, tmp_path: Path) -> None:
    run(
        "train",
        tiny_config,
        *CAPTIONS,
        TEXTS,
        "eval.splits=[]",
        "train.samples=2400",
        "optim.lr=3e-3",
        "metrics.log_every_steps=50",
    )
    found = written_captions(tmp_path / "run", 4)
    # CLIP's words end at every digit
    things = [f"thing {' '.join(str(int(row.key)))}" for row in found]
    assert [(row.read, row.wanted) for row in found] == [(thing, f"a picture of {thing}") for thing in things]
    assert all(row.written.startswith("a picture of thing") for row in found), found
    output = run("captions", "sample", tmp_path / "run", "--number", 2)
    assert found[0].wanted in output
    with pytest.raises(ConfigError, match=r"--number=9 is more than train\.global_batch=8"):
        written_captions(tmp_path / "run", 9)


@pytest.mark.slow
def test_a_run_without_a_decoder_is_refused(undisturbed: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no model\.caption_decoder"):
        written_captions(undisturbed, 2)
