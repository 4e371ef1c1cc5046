"""status.json of a run's folder."""

import pytest

from scaleclip.errors import RunError, Stopped
from scaleclip.status import StatusFile, mark_finished, read_status


def begin(folder, step=0, most_idle=3):
    """A start that finds a checkpoint of `step`."""
    if step:
        (folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True, exist_ok=True)
    return StatusFile(folder, world_size=4, steps=100, samples=800, most_idle=most_idle)


def test_a_run_is_followed_from_start_to_end(tmp_path):
    assert read_status(tmp_path) is None
    status = begin(tmp_path)
    with status.watch():
        found = read_status(tmp_path)
        assert (found.state, found.step, found.starts, found.eta_s) == ("running", 0, 1, None)
        status.advance(40, 320, 20.0)
        found = read_status(tmp_path)
        assert (found.step, found.samples, found.pairs_per_s, found.resumed_step) == (40, 320, 20.0, 0)
        assert found.eta_s == pytest.approx(60 * 8 / 20)
        status.advance(100, 800, 20.0)
    found = read_status(tmp_path)
    assert (found.state, found.step, found.eta_s) == ("finished", 100, 0)


@pytest.mark.parametrize(
    ("error", "state", "why"),
    [(Stopped(12, 40), "stopped", "SIGUSR2 after step 40"), (RunError("no disk"), "failed", "RunError: no disk")],
)
def test_the_end_is_noted_with_its_reason(tmp_path, error, state, why):
    with pytest.raises(type(error)), begin(tmp_path).watch():
        raise error
    found = read_status(tmp_path)
    assert found.state == state
    assert why in found.why


def test_device_hours_of_all_starts_are_added_up(tmp_path):
    begin(tmp_path)
    first = read_status(tmp_path).device_hours
    assert first > 0
    begin(tmp_path, step=10)
    found = read_status(tmp_path)
    assert found.starts == 2
    assert found.device_hours >= 2 * first


def test_a_job_that_starts_again_and_again_without_a_step_saved_is_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    for step in (0, 0, 10, 10, 10):
        begin(tmp_path, step)
    assert read_status(tmp_path).idle_starts == 2
    with pytest.raises(RunError, match=r"4 starts of job 77 in a row have gone on from step 10 .*max_idle_starts=3"):
        begin(tmp_path, 10)
    assert read_status(tmp_path).state == "failed"
    monkeypatch.setenv("SLURM_JOB_ID", "78")  # submitted again
    begin(tmp_path, 10)
    assert read_status(tmp_path).idle_starts == 0


def test_without_slurm_any_number_of_starts_is_borne(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for _ in range(5):
        begin(tmp_path)
    assert read_status(tmp_path).idle_starts == 0


def test_a_status_of_another_version_counts_as_none(tmp_path):
    (tmp_path / "status.json").write_text('{"step": 3}')
    assert read_status(tmp_path) is None
    begin(tmp_path)
    assert read_status(tmp_path).starts == 1


def test_a_finished_run_says_so_even_if_it_was_killed_before_it_could(tmp_path):
    mark_finished(tmp_path)
    assert read_status(tmp_path) is None
    begin(tmp_path)
    mark_finished(tmp_path)
    assert read_status(tmp_path).state == "finished"


def test_members_of_an_array_have_names_of_their_own(tmp_path, monkeypatch):
    for name, value in (("SLURM_JOB_ID", "36"), ("SLURM_ARRAY_JOB_ID", "36"), ("SLURM_ARRAY_TASK_ID", "1")):
        monkeypatch.setenv(name, value)
    begin(tmp_path)
    assert read_status(tmp_path).job == "36_1"
