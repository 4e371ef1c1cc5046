"""Evaluations of checkpoints: what is kept and not measured again, retention, and following a run."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scaleclip import evaluate_run
from scaleclip.checkpoint.checkpointer import Checkpointer
from scaleclip.checkpoint.shard import Fragment, Shard
from scaleclip.checkpoint.state import TrainState
from scaleclip.config import EvalConfig
from scaleclip.config_io import load_config, to_yaml
from scaleclip.data.cache import ShardCache
from scaleclip.distributed import World
from scaleclip.errors import ConfigError, RunError
from scaleclip.evaluate_run import (
    Session,
    below,
    checkpoints_as_they_come,
    evaluate_all,
    in_run,
    run_of,
    subject_of,
    subjects,
    wait_for_run,
    whole_checkpoints,
)  # fmt: skip
from scaleclip.evaluation.results import Figure, write_results
from scaleclip.evaluation.saved import SavedFigures, checkpoint_figures, drop_after, evaluated_steps, read_saved
from scaleclip.evaluation.suite import OpenedSuite
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.status import Status

STATUS = Status("running", "", 0, 8, 0, 64, None, 1, 0, 0, None, "here", 1, 0.0, 0.0)


@pytest.fixture
def run(tiny_config, monkeypatch):
    """A run's folder, and what saves checkpoints of random weights there."""
    config = load_config(tiny_config)
    folder = Path(config.run.folder)
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    monkeypatch.setattr("scaleclip.checkpoint.checkpointer.gather_objects", lambda found: [found])
    monkeypatch.setattr("scaleclip.checkpoint.checkpointer.any_rank", bool)

    def save(step: int) -> Path:
        model = DualEncoder(config.model)
        fragments = [
            Fragment(name, tuple(weight.shape), 0, {"weight": weight.detach().flatten()}, replicated=True)
            for name, weight in model.named_parameters()
        ]
        checkpointer = Checkpointer(folder, World(0, 1, 0, torch.device("cpu")), config.checkpoint, {})
        checkpointer.attach(lambda: Shard(fragments, {}))
        checkpointer.save(TrainState(step=step))
        checkpointer.finish()
        return folder / "checkpoints" / f"step_{step:08d}"

    return SimpleNamespace(folder=folder, save=save, config=config)


@pytest.fixture
def measured(monkeypatch):
    """Two evaluations that note on which weights they ran; `fails` is raised by the second."""
    seen: list[tuple[str, float]] = []
    state = SimpleNamespace(seen=seen, fails=None, features=[])

    def evaluation(name: str):
        def measure(encoder, features):
            if state.fails and name == "b":
                raise state.fails
            weight = float(encoder.model.logit_scale + encoder.model.image_projection.weight.sum())
            seen.append((name, weight))
            state.features.append(features)
            if features:
                features.mkdir(parents=True)
            return [Figure(name, "x", weight, 0.0)]

        return SimpleNamespace(name=name, num_items=1, place=name, definition="as it is", run=measure)

    state.suite = OpenedSuite([evaluation("a"), evaluation("b")], [], [])
    monkeypatch.setattr(evaluate_run, "open_evaluations", lambda *_, **__: state.suite)
    return state


def session(run, **options) -> Session:
    return Session(EvalConfig(), ShardCache(run.config.data.cache), in_run(run.folder), **options)


def test_what_was_measured_of_the_same_weights_is_not_measured_again(run, measured):
    path = run.save(4)
    first = session(run).evaluate(subject_of(str(run.folder)))
    assert (first.subject.step, len(measured.seen)) == (4, 2)
    again = session(run).evaluate(subject_of(str(path)))
    assert (again.figures, len(measured.seen)) == (first.figures, 2)
    kept = run.folder / "evaluations" / "step_00000004"
    assert read_saved(kept, first.subject.identity) == first.figures
    assert read_saved(kept, "other weights") == []
    tree = json.loads((run.folder / "evaluations" / "step_00000004" / "a.json").read_text())
    assert (tree["step"], tree["evaluation"]) == (4, "a")
    assert not list((run.folder / "evaluations").rglob("*features*"))
    assert measured.features[0] != measured.features[1]


@pytest.mark.parametrize("changed", ["weights", "definition"])
def test_other_weights_or_another_definition_are_measured_anew(run, measured, changed):
    run.save(4)
    session(run).evaluate(subject_of(str(run.folder)))
    if changed == "weights":
        shutil.rmtree(run.folder / "checkpoints")
        run.save(4)
        expected = ["a", "b", "a", "b"]
    else:
        measured.suite.evaluations[1].definition = "otherwise"
        expected = ["a", "b", "b"]
    session(run).evaluate(subject_of(str(run.folder)))
    assert [name for name, _ in measured.seen] == expected


def test_a_failure_loses_one_data_set(run, measured):
    run.save(4)
    measured.fails = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        session(run).evaluate(subject_of(str(run.folder)))
    measured.fails = None
    assert len(session(run).evaluate(subject_of(str(run.folder))).figures) == 2
    assert [name for name, _ in measured.seen] == ["a", "b"]


def test_evaluations_of_one_name_have_files_of_their_own(run, measured):
    measured.suite.evaluations[1].name = "a"
    run.save(4)
    figures = session(run).evaluate(subject_of(str(run.folder))).figures
    assert sorted(path.name for path in (run.folder / "evaluations" / "step_00000004").iterdir()) == [
        "a+%282%29.json",
        "a.json",
    ]
    assert len(figures) == 2


def test_without_a_folder_nothing_is_kept(run, measured):
    run.save(4)
    each = Session(EvalConfig(), ShardCache(run.config.data.cache))
    for _ in range(2):
        each.evaluate(subject_of(str(run.folder)))
    assert not (run.folder / "evaluations").exists()
    assert measured.features == [None] * 4


def test_every_checkpoint_is_evaluated_once_with_its_own_weights(run, measured):
    for step in (4, 8):
        run.save(step)
    assert [step for step, _ in evaluate_all(run.folder)] == [4, 8]
    assert len({weight for name, weight in measured.seen if name == "a"}) == 2
    run.save(12)  # of which two are kept
    assert [step for step, _ in evaluate_all(run.folder)] == [8, 12]
    assert len(measured.seen) == 6
    assert sorted(path.name for path in (run.folder / "evaluations").iterdir()) == [f"step_{n:08d}" for n in (4, 8, 12)]


def test_nothing_to_measure_and_nothing_to_measure_on_are_errors(run, measured):
    with pytest.raises(ConfigError, match="has no whole checkpoint to evaluate: train first"):
        list(evaluate_all(run.folder))
    measured.suite.evaluations.clear()
    with pytest.raises(ConfigError, match=r"nothing to measure: eval\.splits and eval.suite are empty; name a --suite"):
        session(run)
    with pytest.raises(ConfigError, match="nowhere: there is no such run"):
        subject_of(str(run.folder / "nowhere"))


def test_references_are_runs_checkpoints_or_others(run, tmp_path):
    path = run.save(4)
    assert run_of(str(run.folder)) == run_of(str(path)) == run.folder.absolute()
    other = tmp_path / "model"
    other.mkdir()
    (other / "weights").write_text("1")
    assert run_of(str(other)) is None
    subject = subject_of(str(other))
    assert (subject.name, subject.step, subject_of(str(path)).name) == ("model", None, "run-step_00000004")
    assert subject_of(str(other), run.config.model).identity != subject.identity
    (other / "weights").write_text("22")
    assert subject_of(str(other)).identity != subject.identity
    assert subject_of(str(path)).identity == subject_of(str(run.folder)).identity


def test_a_checkpoint_that_is_deleted_meanwhile_is_left_out_with_a_word(run, measured, monkeypatch, caplog):
    for step in (4, 8):
        run.save(step)
    paths = whole_checkpoints(run.folder)
    shutil.rmtree(paths[0])
    assert [each.step for each in subjects(paths)] == [8]
    assert "step_00000004 was deleted before it was evaluated: checkpoint.keep" in caplog.text
    # after it was found, and before it was loaded
    subject = subject_of(str(paths[1]))
    shutil.rmtree(paths[1])
    assert session(run).evaluate(subject) is None
    assert "step_00000008 was deleted before it was evaluated" in caplog.text


def test_a_damaged_checkpoint_is_left_out_with_a_word(run, measured, caplog):
    path = run.save(4)
    whole = whole_checkpoints(run.folder)
    weights = next(path.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert list(subjects(whole)) == []
    assert "is damaged" in caplog.text


def test_a_model_that_cannot_be_loaded_is_an_error(run, measured):
    subject = subject_of(str(run.save(4)))
    (run.folder / "config.yaml").unlink()
    with pytest.raises(ConfigError):
        session(run).evaluate(subject)


def test_a_run_is_followed_until_it_is_finished(run, monkeypatch):
    """Each checkpoint once, as it comes; those of the end too."""

    def status(state, updated_s=0.0):
        content = json.dumps(STATUS._replace(state=state, updated_s=updated_s)._asdict())
        (run.folder / "status.json").write_text(content)

    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 1:
            run.save(8)
            run.save(12)  # and 4 is deleted
        if len(slept) == 2:
            status("stopped")
        if len(slept) == 3:
            run.save(16)
            status("finished")

    monkeypatch.setattr(evaluate_run.time, "sleep", sleep)
    status("running")
    run.save(4)
    names = [path.name for path in checkpoints_as_they_come(run.folder, poll_s=7.0)]
    assert names == [f"step_{step:08d}" for step in (4, 8, 12, 16)]
    assert slept == [7.0] * 3


def test_a_run_that_failed_for_good_is_no_longer_followed(run, monkeypatch):
    monkeypatch.setattr(evaluate_run.time, "time", lambda: 10_000.0)
    slept = []

    def write(updated_s):
        (run.folder / "status.json").write_text(json.dumps(STATUS._replace(state="failed", updated_s=updated_s)._asdict()))

    def sleep(_):
        slept.append(1)
        write(6_000.0)

    monkeypatch.setattr(evaluate_run.time, "sleep", sleep)
    write(7_000.0)  # its job may start it again
    run.save(4)
    paths = checkpoints_as_they_come(run.folder)
    assert next(paths).name == "step_00000004"
    with pytest.raises(RunError, match="has failed and was not started again for 60 minutes"):
        next(paths)
    assert slept == [1]


def test_a_checkpoint_that_is_written_anew_is_another(run, monkeypatch):
    """The run went back to step 4 and came to 8 again."""
    for step in (4, 8):
        run.save(step)

    def sleep(_):
        if (run.folder / "status.json").exists():
            return
        shutil.rmtree(run.folder / "checkpoints" / "step_00000008")
        run.save(8)
        (run.folder / "status.json").write_text(json.dumps(STATUS._replace(state="finished")._asdict()))

    monkeypatch.setattr(evaluate_run.time, "sleep", sleep)
    names = [path.name for path in checkpoints_as_they_come(run.folder)]
    assert names == ["step_00000004", "step_00000008", "step_00000008"]


def test_a_run_that_has_not_begun_is_waited_for(tmp_path, monkeypatch, caplog):
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        (tmp_path / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)  # as `scaleclip launch` does at once
        if len(slept) == 3:
            (tmp_path / "run" / "config.yaml").touch()

    monkeypatch.setattr(evaluate_run.time, "sleep", sleep)
    with caplog.at_level("INFO", "scaleclip"):
        assert wait_for_run(str(tmp_path / "run"), poll_s=2.0) == tmp_path / "run"
    assert slept == [2.0] * 3
    assert "".join(caplog.messages).count("has not begun yet") == 1
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    assert wait_for_run(str(tmp_path / "model")) is None
    assert len(slept) == 3


def test_models_of_one_name_have_folders_of_their_own(run, measured, tmp_path):
    place = below(tmp_path / "out")
    each = Session(EvalConfig(), ShardCache(run.config.data.cache), place)
    for _ in range(2):
        run.save(4)
        each.evaluate(subject_of(str(run.folder)))
        shutil.rmtree(run.folder / "checkpoints")
    assert len(list((tmp_path / "out").glob("run-step_00000004-????????"))) == 2


def test_figures_of_weights_that_a_run_left_behind_are_dropped(tmp_path):
    for step in (4, 8, 12):
        SavedFigures(tmp_path / "evaluations" / f"step_{step:08d}", "a", step).save("food", "", [Figure("food", "x", step, 0)])
    (tmp_path / "evaluations" / "step_00000006" / "food.features").mkdir(parents=True)
    write_results(tmp_path, 12, [])
    drop_after(tmp_path, 12)
    assert evaluated_steps(tmp_path) == [4, 8, 12], "and not one that is being measured"
    drop_after(tmp_path, 8)
    assert evaluated_steps(tmp_path) == [4, 8]
    assert not (tmp_path / "results.json").exists()
    assert [figure.value for figure in checkpoint_figures(tmp_path, 8)] == [8]
    assert checkpoint_figures(tmp_path, 8, "other weights") == []


def test_a_mean_holds_while_its_parts_do(tmp_path):
    kept = SavedFigures(tmp_path, "a", 4)
    parts, mean = [Figure(name, "x", 0.5, 0) for name in ("b", "c")], Figure("both", "mean x", 0.5, 0)
    for part in parts:
        kept.save(part.split, "first", [part])
    kept.save_mean("mean x both", mean, ["b", "c"])
    assert read_saved(tmp_path, "a") == [*parts, mean]
    kept.save("b", "of other data", [parts[0]])
    assert read_saved(tmp_path, "a") == parts
    kept.save_mean("mean x both", mean, ["b", "c"])
    assert read_saved(tmp_path, "a") == [*parts, mean]


def test_full_memory_names_the_setting(run, measured):
    run.save(4)
    measured.fails = torch.OutOfMemoryError("no more")
    with pytest.raises(RunError, match=r"memory is full at --batch=\d+ \(eval\.batch\): give fewer; no more"):
        session(run).evaluate(subject_of(str(run.folder)))


def test_what_cannot_be_deleted_does_not_stop_a_run(tmp_path, monkeypatch, caplog):
    kept = SavedFigures(tmp_path / "evaluations" / "step_00000012", "a", 12)
    kept.save("food", "", [Figure("food", "x", 0.5, 0)])

    def fail(path):
        raise OSError("device busy")

    monkeypatch.setattr("scaleclip.evaluation.saved.shutil.rmtree", fail)
    drop_after(tmp_path, 8)
    assert evaluated_steps(tmp_path) == []
    assert "cannot be deleted: device busy" in "".join(caplog.messages)


def test_names_have_files_of_their_own(tmp_path):
    kept = SavedFigures(tmp_path, "a", 4)
    names = ["sts a b", "sts a-b", "sts a/b", "sts a_b", "zero-shot \u82b1", "zero-shot \u9ce5", "x (2)", "x+(2)"]
    assert len({kept.path(name) for name in names}) == len(names)
    assert {kept.path(name).parent for name in names} == {tmp_path}
