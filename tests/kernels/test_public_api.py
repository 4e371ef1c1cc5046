"""What users of scaleclip_kernels may rely on: its names, its parameters and their order, and how little it imports."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import scaleclip_kernels
from scaleclip_kernels.arguments import Backend, Duplicates
from scaleclip_kernels.distributed import ScheduleName

SHARED = [
    "valid=None",
    "column_valid=None",
    "ids=None",
    "column_ids=None",
    "duplicates='negative'",
    "views=1",
    "compute_dtype=None",
    "fp32_precision='ieee'",
    "group=None",
    "sizes=None",
    "schedule='auto'",
    "backend='auto'",
]


def test_names() -> None:
    functions = ["sigmoid_contrastive_loss", "softmax_contrastive_loss"]
    assert scaleclip_kernels.__all__ == ["ClipLoss", "RankError", "SigLipLoss", *functions]
    assert all(getattr(scaleclip_kernels, name).__doc__ for name in scaleclip_kernels.__all__)


PARAMETERS = {
    "softmax_contrastive_loss": (["x_ND", "y_MD", "logit_scale"], [*SHARED[:6], "weights=(0.5, 0.5)", *SHARED[6:]]),
    "sigmoid_contrastive_loss": (["x_ND", "y_MD", "logit_scale", "logit_bias=None"], SHARED),
    # open_clip's (test_clip_loss.py compares with the installed one)
    "ClipLoss": (
        ["local_loss=False", "gather_with_grad=False", "cache_labels=False", "rank=0", "world_size=1", "use_horovod=False"],
        [],
    ),
    "SigLipLoss": (["cache_labels=False", "rank=0", "world_size=1", "dist_impl=None"], []),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    positional, keywords = PARAMETERS[name]
    found: dict[inspect._ParameterKind, list[str]] = {}
    for parameter in inspect.signature(getattr(scaleclip_kernels, name)).parameters.values():
        shown = str(parameter.replace(annotation=inspect.Parameter.empty))
        found.setdefault(parameter.kind, []).append(shown)
    assert found.pop(inspect.Parameter.POSITIONAL_OR_KEYWORD) == positional
    assert found.pop(inspect.Parameter.KEYWORD_ONLY, []) == keywords
    assert not found


def test_choices() -> None:
    assert get_args(Duplicates) == ("negative", "ignore", "positive")
    assert get_args(Backend) == ("auto", "triton", "panels", "reference")
    assert get_args(ScheduleName) == ("auto", "ring", "gather")


def test_import_brings_in_torch_alone() -> None:
    """In a fresh process, next to what torch itself imports."""
    code = """
import sys
import torch, torch.distributed
before = set(sys.modules)
import scaleclip_kernels
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    root = Path(scaleclip_kernels.__file__).parents[1]
    run = [sys.executable, "-c", code]
    out = subprocess.run(run, env={"PYTHONPATH": str(root)}, capture_output=True, text=True, check=True).stdout
    assert set(out.split()) - sys.stdlib_module_names <= {"scaleclip_kernels", "torch"}
    assert "scaleclip_kernels" in out.split()
