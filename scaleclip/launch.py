"""Jobs on a cluster through submitit: what they run, what they ask for, and the code that they run it with.

A job runs a copy of the code that lies in the run's folder, so that a start after a preemption is not one of later edits.
slurm/job.sh decides whether a job starts again, for these jobs as for the sbatch scripts: submitit's own way would requeue the
job, and so kill the other ranks, as soon as rank 0 hears of it.
"""

import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
import yaml
from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError

import scaleclip_kernels
from scaleclip.cluster import Cluster
from scaleclip.config import RunConfig
from scaleclip.config_io import parse_config, to_yaml
from scaleclip.errors import ConfigError, RunError
from scaleclip.exit_codes import exiting_on_errors
from scaleclip.run_folder import CODE_VERSION, code_version
from scaleclip.status import LAUNCHES

_YEAR_MIN = 365 * 24 * 60
_JOBS = "jobs"  # in a run's folder: submitit's
_DEMO = "data/demo"


@dataclass(frozen=True)
class TrainJob:
    """Trains a run; each task of the job is a rank."""

    config: str
    """Resolved, as YAML."""

    def __call__(self) -> None:
        """Returns when the run is finished; otherwise the process ends with the code that says why."""
        _forget_handlers()
        with exiting_on_errors():
            if os.environ["SUBMITIT_EXECUTOR"] == "local":
                submitit.helpers.TorchDistributedEnvironment().export()
            from scaleclip.train import train

            train(parse_config(yaml.safe_load(self.config)))


@dataclass(frozen=True)
class EvaluateJob:
    """Evaluates every checkpoint that a run has kept."""

    folder: str

    def __call__(self) -> None:
        """Figures go into the run's folder, see scaleclip.evaluate_run; those that are there are not made again."""
        _forget_handlers()
        with exiting_on_errors():
            from scaleclip.evaluate_run import evaluate_all

            for step, _ in evaluate_all(Path(self.folder)):
                print(f"step {step:,} of {self.folder} is evaluated", flush=True)


def submit(configs: Sequence[RunConfig], root: Path, cluster: Cluster, *, evaluate: bool) -> list[str]:
    """Submit a job for each run, several as one array; their ids. With `evaluate` a job follows each that finishes.

    Args:
        configs: of the runs.
        root: folder of the run, or of all runs of a sweep.
        cluster: what each job asks for.
        evaluate: submit a second job for each.

    Raises:
        ConfigError: a folder cannot be written, or SLURM refuses the job.
    """
    try:
        for config in configs:
            Path(config.run.folder).mkdir(parents=True, exist_ok=True)
        code = _copy_code(root)
        for member, config in enumerate(configs):
            (code / f"{member}.yaml").write_text(to_yaml(config))
        jobs = _executor(root, cluster, code, "slurm", check=True).map_array(
            _call, [TrainJob(to_yaml(config)) for config in configs]
        )
        for config, job in zip(configs, jobs, strict=True):
            _note(config, str(job.job_id))
        for config, job in zip(configs, jobs, strict=True):
            if evaluate:
                after = _executor(root, _one_rank(cluster), code, "slurm", dependency=f"afterok:{job.job_id}")
                _note(config, str(after.submit(EvaluateJob(config.run.folder)).job_id))
    except (FailedJobError, FailedSubmissionError) as error:
        raise ConfigError(f"SLURM refuses the job: {error}") from error
    except OSError as error:
        raise ConfigError(f"run.folder={root}: {error}") from error
    return [str(job.job_id) for job in jobs]


def sbatch_file(root: Path, cluster: Cluster) -> str:
    """What `submit` would give to sbatch for a single run; CODE stands for the copy's time."""
    code = root.absolute() / "code" / "CODE"
    executor = _executor(root, cluster, code, "slurm", check=True)
    slurm: Any = executor._executor
    return str(slurm._make_submission_file_text(slurm._submitit_command_str, "dry-run"))


def run_here(configs: Sequence[RunConfig], root: Path, cluster: Cluster, *, evaluate: bool) -> None:
    """Run the jobs one after the other on this machine.

    Raises:
        RunError: one failed; its log is named.
    """
    code = _copy_code(root)
    for config in configs:
        Path(config.run.folder).mkdir(parents=True, exist_ok=True)
        jobs: list[Any] = [TrainJob(to_yaml(config))]
        jobs += [EvaluateJob(config.run.folder)] if evaluate else []
        for work in jobs:
            size = cluster if isinstance(work, TrainJob) else _one_rank(cluster)
            job = _executor(root, size, code, "local").submit(work)
            try:
                job.results()
            except (FailedJobError, UncompletedJobError) as error:
                raise RunError(f"the job on this machine failed: see {job.paths.stdout} and {job.paths.stderr}") from error


def _call(work: TrainJob) -> None:
    work()


def _one_rank(cluster: Cluster) -> Cluster:
    return cluster.model_copy(update={"nodes": 1, "min_nodes": None, "ranks": 1, "gpus": min(cluster.gpus, 1)})


def _executor(
    root: Path, cluster: Cluster, code: Path, kind: str, dependency: str | None = None, check: bool = False
) -> submitit.AutoExecutor:
    try:
        executor = submitit.AutoExecutor(root.absolute() / _JOBS / "%j", cluster=kind)
    except RuntimeError as error:
        raise ConfigError(f"this machine has no SLURM ({error}): submit where srun is, or run here with --local") from error
    executor.update_parameters(
        name=f"scaleclip-{root.name}",
        tasks_per_node=cluster.ranks_per_node,
        gpus_per_node=cluster.gpus,
        timeout_min=max(1, round(60 * cluster.hours)),
    )
    setup = [
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1",  # or the folder where the job was submitted would come before the copy
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}",
    ]
    if kind == "local":  # which knows one node; its time limit would only be a nuisance
        executor.update_parameters(nodes=1, timeout_min=_YEAR_MIN, local_setup=setup)
        return executor
    source = f"source {shlex.quote(str(code / 'scaleclip' / 'slurm' / 'job.sh'))}"
    checks = []
    if check:
        checks = [
            f"SCALECLIP_GRACE_S={cluster.grace_s} SCALECLIP_SRUN={shlex.quote(' '.join(cluster.srun))}",
            f"python={shlex.quote(sys.executable)}",
            f"check_nodes {shlex.quote(str(code))}/${{SLURM_ARRAY_TASK_ID:-0}}.yaml",
        ]
    nodes = {"nodes": f"{cluster.min_nodes}-{cluster.nodes}"} if cluster.min_nodes else {}
    memory = {} if cluster.memory_gb is None else {"mem_gb": cluster.memory_gb}
    wanted = {
        "slurm_partition": cluster.partition,
        "slurm_account": cluster.account,
        "slurm_qos": cluster.qos,
        "slurm_constraint": cluster.constraint,
        "slurm_exclude": cluster.exclude,
        "slurm_dependency": dependency,
    }
    executor.update_parameters(
        nodes=cluster.nodes,
        cpus_per_task=cluster.cpus,
        stderr_to_stdout=True,
        slurm_signal_delay_s=cluster.grace_s,
        slurm_additional_parameters={"requeue": True, "kill-on-invalid-dep": "yes", **nodes},
        slurm_setup=[*setup, "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK", *cluster.setup, source, *checks, "note_ends"],
        slurm_srun_args=["--kill-on-bad-exit=1", *cluster.srun],
        slurm_teardown=['end_job "$?"'],
        **memory,
        **{key: value for key, value in wanted.items() if value is not None},
    )
    return executor


def _forget_handlers() -> None:
    # submitit's would requeue the job, or swallow the signal; without one, it ends the rank with the code that job.sh knows
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _copy_code(folder: Path) -> Path:
    """A copy of both packages in a folder."""
    code = folder.absolute() / "code" / time.strftime("%Y%m%d-%H%M%S")
    for source in (Path(__file__).parent, Path(scaleclip_kernels.__path__[0])):
        shutil.copytree(source, code / source.name, ignore=shutil.ignore_patterns("__pycache__", "demo"))
    # 42 MB that nobody edits
    (code / "scaleclip" / _DEMO).symlink_to((Path(__file__).parent / _DEMO).resolve())
    (code / CODE_VERSION).write_text(code_version() or "")
    return code


def _note(config: RunConfig, job: str) -> None:
    row = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "job": job}
    with (Path(config.run.folder) / LAUNCHES).open("a") as file:
        file.write(json.dumps(row) + "\n")
