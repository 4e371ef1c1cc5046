"""From demo captions to training: a tiny model rewrites them, nonsense, and a run reads what is fit by policy."""

import json

import pyarrow.parquet as pq
import pytest

from captioning_models import demo_captions, tiny_llama, tiny_llava
from runs import rows, run

DATA = "package:scaleclip/data/demo/train/fxemoji-00000.tar"
SOURCES = ("human", "chatgpt")


@pytest.mark.slow
def test_rewrites_of_the_demo_are_trained_with(tmp_path):
    model = tiny_llama(tmp_path / "nonsense-llama", lines=demo_captions(), steps=150, width=64)
    out = tmp_path / "rewrites"
    named = [word for source in SOURCES for word in ("--source", source)]
    output = run(
        "captions", "rewrite", model, "--data", DATA, "--out", out, "--text", "json:captions.keywords", *named,
        "--max-tokens", "40", "--batch", "64",
    )  # fmt: skip
    manifest = json.loads((out / "manifest.json").read_text())
    assert f"{manifest['texts']:,} texts of {manifest['samples']:,} samples in 1 shard, " in output
    assert manifest["complete"]
    assert manifest["texts"] == 2 * manifest["samples"] > 100
    assert manifest["fit"] > manifest["texts"] / 10  # a model that was taught to end its lines
    captions = tmp_path / "recaptions"
    run(
        "captions", "recaption", tiny_llava(tmp_path / "nonsense-llava"), "--data", DATA, "--out", captions, "--max-tokens", "6"
    )
    assert pq.read_table(captions / "texts").num_rows == manifest["samples"]

    texts = {"caption": "txt", **{source: f"rewrites:{source}" for source in SOURCES}, "recaption": "recaptions:recaption"}
    source = {"shards": DATA, "texts": texts, "sidecars": {"rewrites": f"{out}/sidecar", "recaptions": f"{captions}/sidecar"}}
    views = [{"texts": ["caption", *SOURCES], "min_words": 2, "fallback": "caption"}]
    run(
        "train", "package:scaleclip/configs/demo.yaml", "model=tiny", f"run.folder={tmp_path}/run", "train.samples=512",
        "train.global_batch=32", "data.workers=0", "eval.splits=[]", f"data.sources={json.dumps({'demo': source})}",
        f"data.views={json.dumps(views)}", "metrics.log_every_steps=4", "optim.warmup_samples=64",
    )  # fmt: skip
    trained = rows(tmp_path / "run")
    assert len(trained) == 4
    for row in trained:
        assert row["invalid"] == {}
    share = {name: sum(row["mix"].get(f"text/0/{name}", 0) for row in trained) / len(trained) for name in ("caption", *SOURCES)}
    assert sum(share.values()) == pytest.approx(1)
    assert all(share[name] > 0.02 for name in SOURCES)
    # which shares what texts that are not fit leave, and takes the place of those that are too short
    assert share["caption"] > 1 / 3
