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

LAUNCHES = "launches.jsonl"
"""In a run's folder: a row a job that was submitted for it."""
_JOBS = "jobs"  # in a run's folder: submitit's
_DEMO = "data/demo"


@dataclass(frozen=True)
class TrainJob:
    """Trains a run; each task of the job is a rank."""

    config: str
    """Resolved, as YAML."""

    def __call__(self) -> None:
        """Returns when the run is finished; otherwise the process ends with the code that says why."""
        # submitit's handler would put the job back into the queue; without one, this ends the rank with the code that job.sh
        # knows, until the run can save
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
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
        """Figures go into the run's folder, see scaleclip.evaluate_run."""
        with exiting_on_errors():
            from scaleclip.evaluate_run import evaluate_all

            for step, _ in evaluate_all(Path(self.folder)):
                print(f"step {step:,} of {self.folder} is evaluated", flush=True)


def submit(configs: Sequence[RunConfig], cluster: Cluster, *, evaluate: bool) -> list[str]:
    """Submit a job for each run, several as one array; their ids. With `evaluate` a job follows each that finishes.

    Raises:
        ConfigError: a run's folder cannot be written, or SLURM refuses the job.
    """
    try:
        code = _copy_code(Path(configs[0].run.folder))
        executor = _executor(configs[0], cluster, code, "slurm")
        jobs = executor.map_array(_call, [TrainJob(to_yaml(config)) for config in configs])
        for config, job in zip(configs, jobs, strict=True):
            followers = []
            if evaluate:
                after = _executor(config, _one_rank(cluster), code, "slurm", dependency=f"afterok:{job.job_id}")
                followers = [after.submit(EvaluateJob(config.run.folder)).job_id]
            _note(config, [job.job_id, *followers])
    except (FailedJobError, FailedSubmissionError) as error:
        raise ConfigError(f"SLURM refuses the job: {error}") from error
    except OSError as error:
        raise ConfigError(f"run.folder={configs[0].run.folder}: {error}") from error
    return [str(job.job_id) for job in jobs]


def sbatch_file(config: RunConfig, cluster: Cluster) -> str:
    """What `submit` would give to sbatch for a single run."""
    executor = _executor(config, cluster, Path(config.run.folder).absolute() / "code", "slurm")
    slurm: Any = executor._executor
    return str(slurm._make_submission_file_text(slurm._submitit_command_str, "dry-run"))


def run_here(configs: Sequence[RunConfig], cluster: Cluster, *, evaluate: bool) -> None:
    """Run the jobs one after the other on this machine.

    Raises:
        RunError: one failed; its log is named.
    """
    for config in configs:
        code = _copy_code(Path(config.run.folder))
        jobs: list[Any] = [TrainJob(to_yaml(config))]
        jobs += [EvaluateJob(config.run.folder)] if evaluate else []
        for work in jobs:
            size = cluster if isinstance(work, TrainJob) else _one_rank(cluster)
            job = _executor(config, size, code, "local").submit(work)
            _note(config, [job.job_id])
            try:
                job.results()
            except (FailedJobError, UncompletedJobError) as error:
                raise RunError(f"the job on this machine failed: see {job.paths.stdout} and {job.paths.stderr}") from error


def _call(work: TrainJob) -> None:
    work()


def _one_rank(cluster: Cluster) -> Cluster:
    return cluster.model_copy(update={"nodes": 1, "min_nodes": None, "ranks": 1, "gpus": min(cluster.gpus, 1)})


def _executor(
    config: RunConfig, cluster: Cluster, code: Path, kind: str, dependency: str | None = None
) -> submitit.AutoExecutor:
    folder = Path(config.run.folder).absolute()
    executor = submitit.AutoExecutor(folder / _JOBS / "%j", cluster=kind)
    executor.update_parameters(
        name=f"scaleclip-{folder.name}",
        tasks_per_node=cluster.ranks_per_node,
        gpus_per_node=cluster.gpus,
        timeout_min=max(1, round(60 * cluster.hours)),
    )
    path = f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"
    if kind == "local":  # knows one node
        executor.update_parameters(nodes=1)
        executor.update_parameters(local_setup=[path, "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}"])
        return executor
    job_sh = shlex.quote(str(code / "scaleclip" / "slurm" / "job.sh"))
    nodes = {"nodes": f"{cluster.min_nodes}-{cluster.nodes}"} if cluster.min_nodes else {}
    memory = {} if cluster.memory_gb is None else {"mem_gb": cluster.memory_gb}
    wanted = {
        "slurm_partition": cluster.partition,
        "slurm_account": cluster.account,
        "slurm_qos": cluster.qos,
        "slurm_constraint": cluster.constraint,
        "slurm_exclude": cluster.exclude,
        "slurm_dependency": dependency,
        "slurm_gpus_per_node": cluster.gpus or None,
    }
    executor.update_parameters(
        nodes=cluster.nodes,
        cpus_per_task=cluster.cpus,
        stderr_to_stdout=True,
        slurm_signal_delay_s=cluster.grace_s,
        slurm_additional_parameters={"requeue": True, **nodes},
        slurm_setup=[
            path,
            "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}",
            "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
            *cluster.setup,
        ],
        slurm_srun_args=["--kill-on-bad-exit=1", *cluster.srun],
        slurm_teardown=["status=$?", f"source {job_sh}", 'end_job "$status"'],
        **memory,
        **{key: value for key, value in wanted.items() if value is not None},
    )
    return executor


def _copy_code(folder: Path) -> Path:
    """A copy of both packages in the run's folder."""
    code = folder.absolute() / "code" / time.strftime("%Y%m%d-%H%M%S")
    for source in (Path(__file__).parent, Path(scaleclip_kernels.__path__[0])):
        shutil.copytree(source, code / source.name, ignore=shutil.ignore_patterns("__pycache__", "demo"))
    # 42 MB that nobody edits
    (code / "scaleclip" / _DEMO).symlink_to((Path(__file__).parent / _DEMO).resolve())
    return code


def _note(config: RunConfig, jobs: Sequence[str]) -> None:
    row = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "jobs": list(jobs)}
    with (Path(config.run.folder) / LAUNCHES).open("a") as file:
        file.write(json.dumps(row) + "\n")
