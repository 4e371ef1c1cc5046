"""The configurations of the papers' systems: each is planned as it is, and trains when its sizes are made small."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from runs import assert_same_run, rows, run, signal_when, start
from scaleclip.cli import app
from scaleclip.config_io import load_config, parse_config
from scaleclip.config_rules import validate
from scaleclip.equivalence.shrink import shrink
from scaleclip.stages import stages_of

CONFIGS = Path(__file__).parents[1] / "configs"
SLURM = Path(__file__).parents[1] / "slurm"
FULL = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem not in ("demo", "suites", "targets"))
DEMO = sorted((CONFIGS / "demo").glob("*.yaml"))
BATCH, NUM_STEPS = 8, 5
TOKENS = {"vocab_size": 4096, "bos_token_id": 4094, "eos_token_id": 4095, "pad_token_id": 0}


def stem(path: Path) -> str:
    return path.stem


def small(path: Path, folder: Path, shards: Path) -> Path:
    """The configuration with small towers and batches, on small shards: five steps a stage, a checkpoint every two."""
    config = load_config(path)
    tree = config.model_dump(mode="json")
    model = shrink(stages_of(config)[0].config).config.model.model_dump(mode="json")
    text = model["text"]
    text["config"] |= {key: value for key, value in TOKENS.items() if key in text["config"] or key == "vocab_size"}
    text["tokenizer"] = "demo"
    patch = model["image"]["config"].get("patch_size", 8)
    tree |= {"model": model, "run": {"folder": str(folder / "run")}}
    tree["loss"] |= {"backend": "panels"}
    tree["train"] |= {"precision": "fp32", "global_batch": BATCH, "samples": BATCH * NUM_STEPS}
    tree["optim"] |= {"warmup_samples": BATCH}
    tree["data"] |= {"workers": 0, "canonical_streams": 2, "cache": {"folder": str(folder / "cache")}}
    tree["checkpoint"] |= {"every_steps": 2}
    tree["metrics"] |= {"log_every_steps": 1}
    tree["eval"] |= {"splits": ["package:scaleclip/data/demo/eval/unseen_clipart.json"]}
    for number, stage in enumerate(tree["stages"]):
        stage["train"] |= {"global_batch": BATCH, "samples": BATCH * NUM_STEPS}
        stage["optim"] |= {"warmup_samples": BATCH}
        if "image" in stage["model"]:
            stage["model"]["image"]["size"] = patch * (2 + number)
        if "text" in stage["model"]:
            stage["model"]["text"]["context_length"] = 12 + 4 * min(number, 1)
    rows_of_texts = folder / "texts.jsonl"
    rows_of_texts.write_text(
        "".join(
            json.dumps({"query": f"what {i}", "positive": f"that {i}", "negatives": [f"no {i} {k}" for k in range(9)]}) + "\n"
            for i in range(40)
        )
    )
    for section in (tree["data"], *(stage["data"] for stage in tree["stages"])):
        for source in filter(None, section.get("sources", {}).values()):
            source |= {"shards": [f"{shards}/*.tar"], "sidecars": {}}
            source["texts"] = dict.fromkeys(source.get("texts", ["caption"]), "txt")
        for source in filter(None, section.get("text_pairs", {}).get("sources", {}).values()):
            source["files"] = [str(rows_of_texts)]
    written = folder / f"{path.stem}.yaml"
    written.write_text(yaml.safe_dump(tree))
    return written


@pytest.mark.parametrize("path", [*FULL, *DEMO], ids=stem)
def test_a_configuration_keeps_the_rules(path: Path) -> None:
    validate(load_config(path), 1)


@pytest.mark.parametrize("path", DEMO, ids=stem)
def test_every_system_is_there_at_full_scale_and_on_the_embedded_data(path: Path) -> None:
    name = "laion400m" if path.stem == "clip" else path.stem
    assert (CONFIGS / f"{name}.yaml").exists()
    assert (SLURM / f"{name}.sh").exists()


@pytest.mark.parametrize("path", FULL, ids=stem)
def test_a_recipe_s_job_fits_its_configuration(path: Path) -> None:
    script = (SLURM / path.name).with_suffix(".sh").read_text()
    asked = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in script.splitlines() if line.startswith("#SBATCH")
    )
    assert script.splitlines()[-1] == f'run_job configs/{path.name} "$@"'
    config = load_config(path)
    assert int(asked["cpus-per-task"]) >= config.data.workers
    assert asked["signal"].removeprefix("USR2@") in script.partition("SCALECLIP_GRACE_S:-")[2]
    validate(config, int(asked["nodes"]) * int(asked["ntasks-per-node"]))


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=() if path.stem == "siglip" else pytest.mark.slow) for path in FULL], ids=stem
)
def test_a_full_configuration_is_planned(path: Path) -> None:
    gpus = ["--gpus", "64", "--gpu", "h100", "train.micro_batch=auto"]
    result = CliRunner().invoke(app, ["plan", str(path), *gpus], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert result.output.count("taken for granted") == len(stages_of(load_config(path))), result.output


@pytest.mark.slow
@pytest.mark.parametrize("path", FULL, ids=stem)
def test_a_small_copy_of_a_full_configuration_trains(path: Path, tmp_path: Path, shards: Path) -> None:
    config = small(path, tmp_path, shards)
    run("train", config)
    found = rows(tmp_path / "run")
    stages = stages_of(load_config(config))
    assert [row["step"] for row in found] == list(range(1, NUM_STEPS * len(stages) + 1))
    for stage in stages:
        of_stage = [row for row in found if row["stage"] == stage.number]
        assert [row["step"] for row in of_stage] == list(range(stage.first_step + 1, stage.last_step + 1))
        assert of_stage[0]["lr"] == pytest.approx(stage.config.optim.lr)
        expected = {"contrastive"} | {
            name
            for name, is_there in (
                ("simclr", stage.config.model.projector),
                ("caption", stage.config.model.caption_decoder),
                ("text", stage.config.data.text_pairs.sources),
            )
            if is_there
        }
        assert {frozenset(row["terms"]) for row in of_stage} == {frozenset(expected)}
        assert all(value is not None and value > 0 for row in of_stage for value in row["terms"].values())
        assert all(row["bad_steps"] == 0 and not row["invalid"] for row in of_stage)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_of_three_stages_that_is_killed_in_each_ends_like_a_whole_one(tmp_path: Path, shards: Path, ranks: int) -> None:
    config = small(CONFIGS / "jina-clip.yaml", tmp_path, shards)
    run("train", config, f"run.folder={tmp_path}/whole", "--ranks", ranks)
    folder = tmp_path / "killed"
    for step in (3, 5, 8, 12):
        process = start("train", config, f"run.folder={folder}", "--ranks", ranks, process_group=0)
        signal_when(process, lambda step=step: len(rows(folder)) >= step, signal.SIGKILL)
    run("train", config, f"run.folder={folder}", "--ranks", ranks)
    assert_same_run(folder, tmp_path / "whole")


def tiny_stages(tiny_config: Path, stages: list[dict[str, Any]], **overrides: Any) -> Path:
    tree = yaml.safe_load(tiny_config.read_text())
    tree["stages"] = stages
    path = tiny_config.with_name("staged.yaml")
    path.write_text(yaml.safe_dump(tree))
    parse_config(load_config(path).model_dump(mode="json"))
    return path


def test_a_stage_changes_resolution_batch_objective_and_locks(tiny_config: Path, tmp_path: Path) -> None:
    path = tiny_stages(
        tiny_config,
        [
            {"train": {"samples": 24}},
            {
                "optimizer": "reset",
                "model": {"image": {"size": 48}, "text": {"locked": True}, "caption_decoder": {"queries": 6}},
                "data": {"caption": {}},
                "optim": {"lr": 1e-4, "warmup_samples": 0},
                "train": {"samples": 32, "global_batch": 16},
            },
        ],
    )
    output = run("train", path, "eval.splits=[]")
    found = rows(tmp_path / "run")
    assert [row["samples"] for row in found] == [8, 16, 24, 40, 56]
    assert [row["stage"] for row in found] == [0, 0, 0, 1, 1]
    assert found[3]["lr"] == pytest.approx(1e-4)
    assert [sorted(row["terms"]) for row in found[2:4]] == [["contrastive"], ["caption", "contrastive"]]
    said = " ".join(output.split())
    assert "optimizer state reset; resized: image.body.vision_model.embeddings.position_embedding.weight" in said
    assert "left fresh: caption_decoder." in said
