"""The command: help without heavy imports, manifests."""

import json
import resource
import subprocess
import sys

import pytest

from runs import run

HEAVY = ("torch", "deepspeed", "transformers", "numpy", "pydantic", "matplotlib")


def test_help_imports_nothing_heavy():
    """`--help` is to answer within half a CPU-second; what would break that is importing these."""
    program = "import sys, scaleclip.cli; print([name for name in sys.argv[1:] if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program, *HEAVY], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_help_answers_in_half_a_cpu_second():
    def cpu_s():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    def measure():
        before = cpu_s()
        run("--help")
        return cpu_s() - before

    # the least of a few: a busy machine only adds
    assert min(measure() for _ in range(4)) < 0.5


@pytest.mark.parametrize(
    "command", [(), ("train",), ("demo",), ("eval",), ("plot",), ("config",), ("data",), ("data", "index")]
)
def test_every_command_has_help(command):
    assert "--help" in run(*command, "--help")


def test_data_index_writes_a_manifest(shards, tmp_path):
    out = tmp_path / "manifest.json"
    assert "32 samples in 4 shards" in " ".join(run("data", "index", f"{shards}/*.tar", "--out", out).split())
    assert json.loads(out.read_text())["counts"] == {"00000.tar": 9, "00001.tar": 4, "00002.tar": 12, "00003.tar": 7}
