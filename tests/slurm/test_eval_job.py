"""slurm/eval.sh follows a run that trains."""

from pathlib import Path

import pytest

from runs import finish, start, wait_until
from slurm_cluster import REPOSITORY

EVAL = REPOSITORY / "slurm" / "eval.sh"
TIMEOUT_S = 300
SPLIT = "package:scaleclip/data/demo/eval/unseen_family.json"


@pytest.mark.slow
def test_a_job_follows_a_run_to_its_end(cluster, tiny_config_path: str, tmp_path: Path) -> None:
    """Stopped on the way, it goes back into the queue and on; every checkpoint is evaluated once."""
    folder = tmp_path / "run"
    settings = (f"eval.splits={SPLIT}", "train.samples=8000", "checkpoint.every_steps=50", "checkpoint.keep=100")
    training = start("train", tiny_config_path, f"run.folder={folder}", *settings)
    wait_until(lambda: any((folder / "checkpoints").glob("step_*")), training)
    job = cluster.submit("--gpus-per-node=0", "--cpus-per-task=1", EVAL, folder, cwd=tmp_path)
    wait_until(lambda: any((folder / "evaluations").glob("step_*/*.json")), training)
    cluster.run("scancel", "--signal=USR2", job)
    assert finish(training)[0] == 0
    log = tmp_path / f"scaleclip-eval-{job}.out"
    assert cluster.final_state(job, TIMEOUT_S) == "COMPLETED", log.read_text()
    steps = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    assert [path.parent.name for path in sorted((folder / "evaluations").glob("step_*/*.json"))] == steps
