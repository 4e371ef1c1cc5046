"""Folders of runs for the tests of reports, as training leaves them, without training."""

import json
from pathlib import Path

from scaleclip.config import RunConfig
from scaleclip.config_io import load_config, to_yaml
from scaleclip.evaluation.results import Figure
from scaleclip.files import resolve_path

ATTACK = "<script>document.title = 'broken'</script>"
NUM_CONCEPTS, NUM_IMAGES = 9, 14


def make_row(step: int, **changes) -> dict:
    row = {
        "step": step, "samples": step * 8, "stage": 0, "epoch": step / 4, "loss": 5 / step, "terms": {"contrastive": 5 / step},
        "lr": 1e-3, "logit_scale": 14.3, "grad_norm": 1.0, "pairs_per_s": 100.0, "data_wait": 0.1,
        "loader": {"read": 0.7, "decode": 0.3}, "lost_workers": 0, "mirror_failures": 0, "bad_steps": 0, "invalid": {},
        "world_size": 1,
    }  # fmt: skip
    return row | changes


def tiny_config(*overrides: str) -> RunConfig:
    """The demo's configuration with a tiny model."""
    return load_config(resolve_path("package:scaleclip/configs/demo.yaml"), ["model=tiny", *overrides])


def make_run(folder: Path, rows: list[dict], splits: tuple[str, ...] = (), starts: tuple[int, ...] = (0,)) -> Path:
    """A run's folder as training leaves it."""
    folder.mkdir(exist_ok=True)
    config = tiny_config(f"run.folder={folder}", f"eval.splits={list(splits)}")
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = {
        "time": "2026-01-01T00:00:00+0000", "command": ["scaleclip", "train"], "world_size": 2, "host": "node-7",
        "slurm_job": "42", "git": "abc1234", "python": "3.11", "packages": {"torch": "2"}, "data": ["0123"], "loss_gemm": "mkl",
    }  # fmt: skip
    (folder / "provenance.json").write_text(json.dumps({"starts": [start | {"step": step} for step in starts]}))
    return folder


def write_evaluations(run: Path, figures: dict[int, list[Figure]]) -> None:
    """evaluations.jsonl, by step."""
    rows = [{"step": step, "figures": [each._asdict() for each in found]} for step, found in figures.items()]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
