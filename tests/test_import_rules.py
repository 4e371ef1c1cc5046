"""Who may import whom, and which file may know which big dependency. Read from the source, so lazy imports count too."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "scaleclip").rglob("*.py"), *(ROOT / "kernels" / "scaleclip_kernels").rglob("*.py")])

# room -> rooms of ours that it may import; a room may always import itself, errors and files
MAY_IMPORT = {
    "scaleclip_kernels": set(),
    "errors": set(),
    "exit_codes": set(),
    "files": set(),
    "config": set(),
    "config_tree": set(),
    "config_io": {"config", "config_tree"},
    "stages": {"config", "config_io"},
    "config_rules": {"config", "stages"},
    "deepspeed_config": {"config"},
    "distributed": set(),
    "local_ranks": set(),
    "runtime": set(),
    "traffic": set(),
    "guard": {"distributed"},
    "schedule": {"config"},
    "status": set(),
    "optim": {"config", "models"},
    "run_folder": {"config", "config_io", "status"},
    "parent_death": set(),
    "data": {"config", "parent_death"},
    "models": {"config"},
    "losses": {"config", "models", "scaleclip_kernels"},
    "metrics": {"config", "evaluation", "run_folder"},
    "checkpoint": {"config", "distributed"},
    "engine": {"checkpoint", "config", "deepspeed_config", "distributed", "exchange", "models", "optim", "traffic"},
    "step": {"config", "data", "distributed", "engine", "losses", "models"},
    "planning": {"config", "config_rules", "deepspeed_config", "models"},
    "fit": {"config", "config_rules", "distributed", "planning"},
    "evaluation": {"config", "config_io", "data", "distributed", "models"},
    "equivalence": {
        "config", "config_io", "data", "distributed", "engine", "local_ranks", "losses", "models", "optim", "scaleclip_kernels",
        "step",
    },
    "exchange": {"checkpoint", "config", "config_io", "data", "evaluation", "models", "run_folder", "stages"},
    "exchange_cli": {"cli_arguments", "config_io", "exchange"},
    "trained_model": {"config", "data", "exchange", "models"},
    "evaluate_run": {
        "checkpoint", "config", "data", "distributed", "evaluation", "exchange", "run_folder", "status", "trained_model",
    },
    "start_ranks": {"parent_death"},
    "eval_cli": {
        "cli_arguments", "config_io", "data", "distributed", "evaluate_run", "evaluation", "metrics", "report", "run_folder",
        "start_ranks",
    },
    "shard_folder": {"data"},
    "shown_progress": set(),
    "embedding": {"config", "data", "distributed", "models", "shard_folder"},
    "embed_cli": {
        "checkpoint", "cli_arguments", "config", "config_io", "data", "distributed", "embedding", "shown_progress",
        "start_ranks", "trained_model",
    },
    "written_captions": {"data", "trained_model"},
    "captioning": {"config", "data", "distributed", "evaluation", "shard_folder"},
    "captions_cli": {
        "captioning", "captions_score_cli", "cli_arguments", "config", "data", "distributed", "shown_progress", "start_ranks",
        "written_captions",
    },
    "captions_score_cli": {
        "captioning", "cli_arguments", "config", "config_io", "data", "evaluation", "report", "trained_model",
    },
    "report": {
        "captioning", "checkpoint", "config", "config_io", "data", "evaluation", "metrics", "run_folder", "status",
        "trained_model",
    },
    "train": {
        "checkpoint", "config", "config_io", "config_rules", "data", "distributed", "evaluation", "guard", "losses", "models",
        "run_folder", "runtime", "scaleclip_kernels", "stages", "status", "train_stage",
    },
    "train_stage": {
        "checkpoint", "config", "data", "distributed", "engine", "evaluation", "fit", "guard", "metrics", "models", "planning",
        "runtime", "schedule", "stages", "status", "step",
    },
    "cli": {
        "captions_cli", "cli_arguments", "config", "config_io", "config_rules", "data_cli", "deepspeed_config", "embed_cli",
        "equivalence_cli", "eval_cli", "evaluation", "exchange_cli", "exit_codes", "launch_cli", "plan_cli", "report", "stages",
        "start_ranks", "train",
    },
    "data_cli": {"config", "data"},
    "equivalence_cli": {"cli_arguments", "config_io", "config_rules", "equivalence", "stages"},
    "cluster": {"config", "config_io"},
    "launch": {
        "cluster", "config", "config_io", "evaluate_run", "exit_codes", "run_folder", "scaleclip_kernels", "status", "train",
    },
    "jobs": {"run_folder", "status"},
    "cli_arguments": set(),
    "launch_cli": {
        "cli_arguments", "cluster", "config", "config_io", "config_rules", "jobs", "launch", "node_check", "run_folder",
    },
    "node_check": {"config", "data", "planning", "run_folder", "stages"},
    "plan_cli": {"cli_arguments", "config_io", "config_rules", "planning", "stages"},
    "__main__": {"cli"},
    "__init__": set(),
}  # fmt: skip

# by room, or by a file of it
FENCES = {
    "deepspeed": {"engine"},
    "wandb": {"metrics"},
    "submitit": {"launch"},
    "streaming": {"data/mds"},
    "webdataset": {"data/convert"},
    "sentencex": {"data/sentences"},
    "pyarrow": {"captioning/folder", "captioning/made_texts", "data", "embedding/folder", "shard_folder"},
    "duckdb": {"data/subset"},
    "fsspec": {"checkpoint/mirror", "data/remote", "data/join", "data/shards", "data/subset"},
    "triton": {"scaleclip_kernels"},
    "matplotlib": {"report", "planning/picture"},
    "jinja2": {"captioning/chat", "report/templates"},
    "transformers": {
        "captioning/generation",
        "captioning/language_model",
        "captioning/prefix_cache",
        "captioning/pretrained",
        "captioning/vision_language_model",
        "data",
        "exchange",
        "models",
    },
    "timm": {"models/timm_towers"},
    "mteb": {"evaluation/mteb_adapter"},
    "clip_benchmark": set(),
    "scipy": {"evaluation/logistic"},
    # every command has a file of its own
    "typer": {
        "captions_cli",
        "captions_score_cli",
        "cli",
        "cli_arguments",
        "data_cli",
        "embed_cli",
        "equivalence_cli",
        "eval_cli",
        "exchange_cli",
        "launch_cli",
        "plan_cli",
    },
}

KERNELS_MAY_IMPORT = {"torch", "triton", "scaleclip_kernels", *sys.stdlib_module_names}


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "scaleclip_kernels" if parts[0] == "kernels" else parts[1]


def imports(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_imported(path: Path) -> set[str]:
    found = set()
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "scaleclip":
            found.add(rest.split(".")[0])
        elif top == "scaleclip_kernels":
            found.add(top)
    return found - {room(path), "errors", "files"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    assert rooms_imported(path) <= MAY_IMPORT[room(path)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_big_dependencies_stay_behind_their_fences(path):
    tops = {name.partition(".")[0] for name in imports(path)}
    file = "/".join(path.relative_to(ROOT).with_suffix("").parts[1:])
    breached = {top for top, allowed in FENCES.items() if top in tops and not {room(path), file} & allowed}
    assert not breached
    if room(path) == "scaleclip_kernels":
        assert tops <= KERNELS_MAY_IMPORT


def test_nothing_imports_tools_or_tests():
    for path in SOURCES:
        assert not {name.partition(".")[0] for name in imports(path)} & {"tools", "tests"}


def test_there_is_no_circle():
    rooms = {room(path) for path in SOURCES}
    edges = {name: set().union(*(rooms_imported(p) for p in SOURCES if room(p) == name)) for name in rooms}
    done: set[str] = set()
    while edges:
        leaves = {name for name, needs in edges.items() if needs <= done}
        assert leaves, f"a circle among {sorted(edges)}"
        done |= leaves
        edges = {name: needs for name, needs in edges.items() if name not in leaves}
