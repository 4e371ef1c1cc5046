"""The command: help without heavy imports, manifests."""

import json
import resource
import subprocess
import sys

import pytest

from runs import finish, run, start

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
    "command",
    [
        (),
        ("train",),
        ("demo",),
        ("eval",),
        ("report",),
        ("embed",),
        ("config",),
        ("data",),
        ("plan",),
        *(("data", name) for name in ("index", "subset", "convert", "sidecar")),
    ],
)
def test_every_command_has_help(command):
    assert "--help" in run(*command, "--help")


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("launch", ("--cluster", "--min-nodes", "--gpus", "--hours", "--sweep", "--evaluate", "--local", "--dry-run")),
        ("jobs", ("FOLDER",)),
        (
            "eval",
            (
                "REFERENCE",
                "--suite",
                "--data",
                "--split",
                "--against",
                "--skip-missing",
                "--all",
                "--follow",
                "--out",
                "--ranks",
            ),
        ),
        ("logs", ("RUN", "--rank", "--lines", "--follow")),
        ("cancel", ("RUN",)),
        ("check", ("CONFIG", "--ranks", "--grace")),
    ],
)
def test_help_of_commands_for_jobs_names_their_options(command, options):
    text = run(command, "--help")
    assert [option for option in options if option not in text] == []


def test_a_check_says_that_all_is_well_and_leaves_nothing(tiny_config, tmp_path):
    assert f"is in order for {tmp_path}/run" in run("check", tiny_config)
    assert not (tmp_path / "run").exists()


def said(*arguments):
    """A command's output on one line."""
    return " ".join(run(*arguments).split())


def test_data_index_and_subset_write_manifests(shards, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert "32 samples in 4 shards" in said("data", "index", f"{shards}/*.tar", "--out", whole)
    where = ("--where", "concept = 'c1'", "--manifest", whole)
    assert f"{part}: 7 of 32 samples" in said("data", "subset", f"{shards}/*.tar", "--out", part, *where)


@pytest.mark.slow
def test_data_convert_goes_both_ways(shards, tmp_path):
    mds, tars = tmp_path / "mds", tmp_path / "tars"
    assert "32 samples" in said("data", "convert", f"{shards}/*.tar", "--out", mds, "--compression", "zstd")
    assert "32 samples" in said("data", "convert", f"{mds}/index.json", "--out", tars)
    assert len(list(tars.glob("*.tar"))) == 4


def test_data_sidecar_joins_texts(shards, tmp_path):
    table, out = tmp_path / "recap.jsonl", tmp_path / "recap"
    table.write_text("".join(json.dumps({"key": f"{i:09d}", "text": f"new {i}"}) + "\n" for i in range(0, 40, 2)))
    options = ("--table", table, "--column", "text", "--out", out)
    assert "16 of 32 samples have texts; 4 of 20 rows name no sample" in said("data", "sidecar", f"{shards}/*.tar", *options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("index", "none.tar"), "TARS: no shards match 'none.tar'"),
        (("subset", "none.tar", "--out", "x"), "say what to choose by: --keep, --drop or --where"),
        (("convert", "none.tar", "--out", "x"), "SHARDS: no shards match 'none.tar'"),
    ],
)
def test_data_commands_say_what_is_wrong(arguments, message):
    code, output = finish(start("data", *arguments))
    assert code == 2
    assert message in output
