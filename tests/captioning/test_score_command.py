"""Made texts from a job's folder to a trained model and its score, by the commands that a user types."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from captions_job import by_rule, write_job
from runs import finish, rows, run, start
from scaleclip.cli import app
from scaleclip.errors import ConfigError


@pytest.fixture
def job(shards, tmp_path) -> Path:
    return write_job(tmp_path / "out", f"{shards}/*.tar", by_rule)


def score(*arguments: object) -> Result:
    """`scaleclip captions score ARGUMENTS` in this process, where no terminal tells a width."""
    return CliRunner(env={"COLUMNS": None}).invoke(app, ["captions", "score", *map(str, arguments)])


def test_weights_stand_beside_the_shares_that_training_draws_and_faults_are_said(shards, tmp_path):
    job = write_job(
        tmp_path / "out",
        f"{shards}/*.tar",
        lambda number, key, caption: {"short": ("word", None)},
        complete=False,
        skip=(1, 2, 3),
    )
    result = score(job, "--data", f"{shards}/*.tar", "--cache", tmp_path / "cache")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].rstrip() == "9 samples of 1 shard"
    assert "Fault: 3 of 4 shards have no texts: the job is not complete" in lines
    [advice] = [line for line in lines if line.startswith("Advice")]
    assert advice.endswith("original 0.50 (100.0%), short 0.50 (0.0%)")
    [remark] = [line for line in lines if line.startswith("short: taken, but")]
    assert len(remark) > 160
    assert remark.endswith(".")


def test_a_jobs_sidecar_is_scored_into_the_jobs_folder(job, shards, tmp_path):
    result = score(job / "sidecar", "--data", f"{shards}/*.tar", "--cache", tmp_path / "cache")
    assert result.exit_code == 0, result.output
    assert f"Page: {job / 'score.html'} " in result.output
    assert "<title>out: score</title>" in (job / "score.html").read_text()
    assert not (job / "sidecar" / "score.html").exists()


def test_what_is_not_there_ends_the_command(job, shards, tmp_path):
    data = ("--data", f"{shards}/*.tar", "--cache", tmp_path / "cache")
    for arguments, said in (
        ((job, "--against-text", "nope"), "their texts are txt, json:captions.name, json:concept"),
        ((f"{job}/texts/*.parquet", "--text", "text"), f"give the job's folder, OUT={job}"),
    ):
        result = score(*arguments, *data)
        assert isinstance(result.exception, ConfigError)
        assert said in str(result.exception)


@pytest.mark.slow
def test_texts_are_trained_with_by_the_advice_and_scored_under_the_run(job, shards, tiny_config, tmp_path):
    data = ("--data", f"{shards}/*.tar", "--cache", tmp_path / "cache")
    output = run("captions", "score", job, *data)
    assert "No model looked at the images" in output
    first = json.loads((job / "score.json").read_text())
    assert first["advice"]["weights"] == pytest.approx(dict.fromkeys(("original", "human", "mscoco"), 1 / 3))

    tree = yaml.safe_load(tiny_config.read_text())
    tree["data"]["sources"]["tiny"] |= {
        "sidecars": {"made": first["origin"]["sidecar"]},
        "texts": {"caption": "txt", "human": "made:human", "mscoco": "made:mscoco"},
    }
    weights = {"caption": 1, "human": 1, "mscoco": 1}
    tree["data"]["views"] = [{"texts": weights, "min_words": 2, "fallback": "caption"}]
    tree["train"]["samples"] = 960
    tiny_config.write_text(yaml.safe_dump(tree))
    run("train", tiny_config)
    folder = Path(tree["run"]["folder"])
    assert not rows(folder)[-1]["invalid"]
    mixes = [row["mix"] for row in rows(folder)]
    for name, share in (("caption", "original"), ("human", "human"), ("mscoco", "mscoco")):
        drawn = sum(mix.get(f"text/0/{name}", 0) for mix in mixes) / len(mixes)
        # binomial of 960 draws: five standard deviations
        assert drawn == pytest.approx(first["advice"]["effective"][share], abs=0.08)

    output = run("captions", "score", job, *data, "--model", folder, "--seed", "1")
    assert "nearer to the image" in output
    found = json.loads((job / "score.json").read_text())
    assert "step 120" in found["model"]
    assert found["sources"][1]["nearness"]["pairs"] == 32
    assert found["sources"][0]["reasons"] == first["sources"][0]["reasons"]
    assert "image, original" in (job / "score.html").read_text()
    code, output = finish(start("captions", "score", job, *data, "--model", folder, "--image", "gif"))
    assert (code, "--image=gif: none of the 32 samples read has an image of such a name" in output) == (2, True), output


@pytest.mark.slow
def test_tables_are_scored_where_the_user_says(shards, tmp_path):
    table = {"key": [f"{number:09d}" for number in range(32)], "re_caption": [f"Thing {number}." for number in range(32)]}
    pq.write_table(pa.table(table), tmp_path / "release.parquet")
    command = ("captions", "score", tmp_path / "release.parquet", "--data", f"{shards}/*.tar", "--cache", tmp_path / "cache")
    code, output = finish(start(*command, "--text", "re_caption"))
    assert (code, "say --to FOLDER" in output) == (2, True), output
    output = run(*command, "--text", "re_caption", "--to", tmp_path / "scored")
    assert "re_caption" in output
    assert sorted(path.name for path in (tmp_path / "scored").iterdir()) == ["score.html", "score.json"]
    code, output = finish(start(*command))
    assert (code, "is no folder" in output) == (2, True), output
    code, output = finish(start(*command, "--text", "re_caption", "--to", tmp_path / "scored", "--model", tmp_path / "none"))
    assert code == 2, output
