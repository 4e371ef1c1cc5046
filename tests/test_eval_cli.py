"""`scaleclip eval` as a user types it."""

import json
import os
import shutil
import signal

import pytest
import yaml
from typer.testing import CliRunner

from helpers import encode_image, write_tar
from runs import SPLITS, figures, finish, run, start, wait_until
from scaleclip import distributed
from scaleclip.cli import app
from scaleclip.evaluate_run import below, subject_of
from scaleclip.evaluation.results import Figure
from scaleclip.evaluation.saved import SavedFigures

pytestmark = pytest.mark.xdist_group("eval_cli")


@pytest.fixture(scope="module")
def trained(tiny_config_path, tmp_path_factory):
    """A run of its own, with wandb offline."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(
        "train",
        tiny_config_path,
        f"run.folder={folder}",
        SPLITS,
        "train.samples=64",
        "checkpoint.keep=2",
        "metrics.wandb=offline",
    )
    return folder


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """A suite of captions and texts beside its data."""
    root = tmp_path_factory.mktemp("data")
    (root / "captions").mkdir()
    samples = [(f"{n:03d}", {"jpg": encode_image(n, "JPEG"), "txt": f"thing {n}\none {n}".encode()}) for n in range(7)]
    write_tar(root / "captions" / "0.tar", samples)
    (root / "pairs.csv").write_text("text1,text2,score\n" + "".join(f"a {n},b {n * n},{n % 4}\n" for n in range(9)))
    tree = {
        "datasets": {"captions": {"test": "captions"}, "pairs": {"test": "pairs.csv"}, "absent": {"test": "absent.csv"}},
        "suites": {
            "mine": [{"task": "retrieval", "datasets": "captions"}, {"task": "sts", "datasets": "pairs"}],
            "more": ["mine", {"task": "sts", "datasets": "absent"}],
        },
    }
    (root / "my.yaml").write_text(yaml.safe_dump(tree))
    return root


@pytest.fixture
def here(monkeypatch):
    """The command in this process, which need not load torch anew: its output, or the error that it raised."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def evaluate(*arguments):
        before = dict(os.environ)
        try:
            result = CliRunner().invoke(app, ["eval", *map(str, arguments)])
        finally:
            distributed.shutdown()
            os.environ.clear()
            os.environ.update(before)
        return f"{type(result.exception).__name__}: {result.exception}" if result.exception else result.output

    return evaluate


def saved(folder):
    return {path.name: json.loads(path.read_text())["figures"] for path in sorted(folder.glob("*.json"))}


def test_a_suite_is_measured_kept_and_not_measured_again(trained, suite, here):
    shutil.rmtree(trained / "evaluations", ignore_errors=True)
    results = figures(trained)
    arguments = ("eval", trained, "--suite", f"{suite}/my.yaml:mine", "--data", suite)
    output = run(*arguments)
    assert "1 of 2: retrieval captions, " in output
    assert "image -> text R@10" in output
    assert " to " in output, "intervals are shown"
    folder = trained / "evaluations" / "step_00000008"
    assert list(saved(folder)) == ["retrieval+captions.json", "sts+pairs.json"]
    again = here(*arguments[1:])
    assert "of 2: " not in again
    assert again.splitlines()[-5:] == output.splitlines()[-5:]
    assert figures(trained) == results, "which are of the run's own splits"


@pytest.mark.slow
def test_ranks_measure_the_same(trained, suite, tmp_path):
    out = {}
    for ranks in (1, 2):
        arguments = ("eval", trained, "--suite", f"{suite}/my.yaml:mine", "--data", suite, "--batch", 3)
        run(*arguments, "--out", tmp_path / str(ranks), "--ranks", ranks)
        [folder] = (tmp_path / str(ranks)).iterdir()
        out[ranks] = saved(folder)
    assert out[1] == out[2]
    assert len(out[1]) == 2


def test_missing_data_sets_are_errors_or_left_out(trained, suite, here):
    arguments = (trained, "--suite", f"{suite}/my.yaml:more", "--data", suite)
    output = here(*arguments)
    assert output.startswith("ConfigError: data sets are missing")
    assert f"absent: {suite}/absent.csv: a table" in output
    assert "left out, since it is not there: absent" in here(*arguments, "--skip-missing")


def test_a_fault_is_said_once_and_without_a_traceback(trained):
    code, output = finish(start("eval", trained, "--suite", "imagnet"))
    assert code == 2
    assert output.startswith("suite 'imagnet' is unknown; did you mean 'imagenet'?")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "imagenet"), "imagenet1k: data/imagenet1k/test: a folder of images for each class"),
        (("--against", "laclip-cc12-b16"), "did you mean 'laclip-cc12m-b16' or"),
        (("--all", "--follow"), "--follow takes every checkpoint: leave out --all"),
        (("--out", "RUN/figures"), "lies in "),
        (("--split", "/nowhere/*.json"), "nothing matches '/nowhere/*.json'"),
    ],
)
def test_faults_of_options_are_errors(trained, arguments, message, here):
    output = here(trained, *(each.replace("RUN", str(trained)) for each in arguments))
    assert output.startswith("ConfigError: ")
    assert message in output


def test_what_is_no_run_is_said(trained, tmp_path, here):
    assert "there is no such run, checkpoint or model" in here(tmp_path / "nowhere")
    checkpoint = trained / "checkpoints" / "step_00000008"
    assert "is no run: --all and --follow take a run's folder" in here(checkpoint, "--all")


def test_a_checkpoint_is_measured_by_what_its_run_measures(trained, here):
    before = figures(trained)
    output = here(trained / "checkpoints" / "step_00000004")
    assert "step_00000004, step 4" in " ".join(output.split())
    assert list(saved(trained / "evaluations" / "step_00000004")) == ["unseen_clipart.json"]
    assert figures(trained) == before, "of the newest alone"


def test_expected_stands_beside_measured(trained, tmp_path, here):
    """A figure that was measured before, of the same weights, counts too."""
    subject = subject_of(str(trained))
    for name, weights, value in (("a", "others", 0.9), ("zero-shot-imagenet1k", subject.identity, 0.5)):
        kept = SavedFigures(below(tmp_path / "out")(subject), weights, 8)
        kept.save(name, "", [Figure("imagenet1k", "zero-shot top-1", value, 0.001, low=0.48, high=0.52)])
    output = here(trained, "--out", tmp_path / "out", "--against", "laclip-cc12m-b16")
    [line] = [line for line in output.splitlines() if "48.40" in line]
    assert [part for part in ("50.00", "+1.60", "48.0 to 52.0") if part not in line] == []
    assert output.count("not measured") == 3


def test_every_checkpoint_is_measured_and_logged_once(trained, suite, tmp_path, here):
    arguments = (trained, "--all", "--suite", f"{suite}/my.yaml:mine", "--data", suite, "--out", tmp_path)
    output = here(*arguments)
    names = sorted(path.name.rpartition("-")[0] for path in tmp_path.iterdir())
    assert names == ["run-step_00000004", "run-step_00000008"]
    assert output.index("step 4") < output.index("step 8")
    # beside the training's own
    assert list((trained / "wandb").glob("offline-run-*-evaluation"))
    assert "of 2: " not in here(*arguments)


def test_a_run_that_is_finished_is_followed_to_its_end(trained, tmp_path, here):
    output = here(trained, "--follow", "--out", tmp_path)
    assert "step 4" in output
    assert "step 8" in output


@pytest.mark.slow
def test_a_run_is_followed_while_it_trains_and_a_kill_is_borne(tiny_config_path, tmp_path):
    folder = tmp_path / "run"
    settings = ("train.samples=1600", "checkpoint.every_steps=20", "checkpoint.keep=20")
    training = start("train", tiny_config_path, f"run.folder={folder}", SPLITS, *settings)
    wait_until(lambda: any((folder / "checkpoints").glob("step_*")), training)
    following = start("eval", folder, "--follow")
    wait_until(lambda: len(list((folder / "evaluations").glob("step_*/*.json"))) >= 2, following)
    following.send_signal(signal.SIGKILL)
    following.wait()
    kept = {path: path.stat().st_mtime_ns for path in (folder / "evaluations").glob("step_*/*.json")}
    following = start("eval", folder, "--follow")
    assert finish(training)[0] == 0
    code, output = finish(following)
    assert code == 0, output
    steps = {path.name for path in (folder / "checkpoints").glob("step_*")}
    assert {path.parent.name for path in (folder / "evaluations").glob("step_*/*.json")} == steps
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.slow
def test_a_run_measures_its_suite_while_it_trains(tiny_config_path, suite, tmp_path):
    settings = (f"eval.suite={suite}/my.yaml:mine", f"eval.data={suite}", "eval.every_steps=4", SPLITS)
    run("train", tiny_config_path, f"run.folder={tmp_path}", "train.samples=64", *settings)
    rows = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8]
    measured = {(figure["split"], figure["metric"]) for figure in rows[0]["figures"]}
    recall = "image -> text R@1"
    assert {("captions", recall), ("pairs", "STS Spearman"), ("unseen_clipart", recall)} <= measured
    assert not (tmp_path / "evaluations" / "features").exists()
    assert {row["split"] for row in figures(tmp_path)["figures"]} == {"captions", "pairs", "unseen_clipart"}
    before = figures(tmp_path)
    (tmp_path / "results.json").unlink()
    run("eval", tmp_path)
    assert figures(tmp_path) == before


@pytest.mark.slow
def test_a_suite_that_is_not_there_stops_a_run_at_its_start(tiny_config_path, tmp_path):
    code, output = finish(start("train", tiny_config_path, f"run.folder={tmp_path}/run", "eval.suite=retrieval"))
    assert code == 2
    assert "coco: data/coco: Karpathy's dataset_*.json" in output
    assert not (tmp_path / "run" / "checkpoints").exists()
