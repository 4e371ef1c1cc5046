"""Jobs on a cluster through submitit: what they run, what they ask for, and the code that they run it with.

A job runs a copy of the code that lies in the run's folder, so that a start after a preemption is not one of later edits.
slurm/job.sh decides whether a job starts again, for these jobs as for the sbatch scripts: submitit's own way would requeue the
job, and so kill the other ranks, as soon as rank 0 hears of it.
"""

import contextlib
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import submitit
import yaml
from submitit.core.utils import FailedJobError, FailedSubmissionError

import scaleclip_kernels
from scaleclip.cluster import Cluster
from scaleclip.config import RunConfig
from scaleclip.config_io import parse_config, to_yaml
from scaleclip.errors import ConfigError
from scaleclip.exit_codes import exiting_on_errors
from scaleclip.run_folder import CODE_VERSION, code_version
from scaleclip.status import Launch, note_launch

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
            from scaleclip.train import train

            train(parse_config(yaml.safe_load(self.config)))


@dataclass(frozen=True)
class EvaluateJob:
    """Evaluates every checkpoint that a run has kept."""

    folder: str

    def __call__(self) -> None:
        """Figures go into the run's folder, see scaleclip.evaluate_run."""
        _forget_handlers()
        with exiting_on_errors():
            from scaleclip.evaluate_run import evaluate_all

            for step, figures in evaluate_all(Path(self.folder)):
                for figure in figures:
                    print(f"{self.folder} step {step:,} {figure.split} {figure.metric}: {figure.value:.1%}", flush=True)


class Submitted(NamedTuple):
    """SLURM's ids of a run's jobs."""

    train: str
    evaluate: str | None


def submit(configs: Sequence[RunConfig], root: Path, cluster: Cluster, *, evaluate: bool) -> list[Submitted]:
    """Submit a job for each run, several as one array. With `evaluate` a job follows each that finishes.

    Args:
        configs: of the runs.
        root: folder of the run, or of all runs of a sweep.
        cluster: what each job asks for.
        evaluate: submit a second job for each.

    Raises:
        ConfigError: a folder cannot be written, or SLURM refuses the job.
    """
    folders = [Path(config.run.folder) for config in configs]
    code = _code_folder(root)
    executor = _executor(root, cluster, code)
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        _copy_code(code, configs)
        with _quiet():
            jobs = executor.map_array(_call, [TrainJob(to_yaml(config)) for config in configs])
        for folder, job in zip(folders, jobs, strict=True):
            _note(folder, job, "train")
    except (FailedJobError, FailedSubmissionError) as error:
        _clear(root, code, folders)
        raise ConfigError(f"SLURM refuses the job: {error}") from error
    except OSError as error:
        raise ConfigError(f"run.folder={root}: {error}") from error
    submitted = []
    for folder, job in zip(folders, jobs, strict=True):
        after = None
        if evaluate:
            try:
                with _quiet():
                    after = _executor(root, cluster, code, after=job.job_id).submit(EvaluateJob(str(folder)))
            except (FailedJobError, FailedSubmissionError) as error:
                raise ConfigError(f"job {job.job_id} trains {folder}, but SLURM refuses its evaluation: {error}") from error
            _note(folder, after, "evaluate")
        submitted.append(Submitted(str(job.job_id), str(after.job_id) if after else None))
    return submitted


def sbatch_files(configs: Sequence[RunConfig], root: Path, cluster: Cluster, *, evaluate: bool) -> Iterator[tuple[str, str]]:
    """What each job would be, and its file for sbatch; TIME stands for the copy's, JOB for the id of the job that trains."""
    code = root.absolute() / "code" / "TIME"
    runs = [config.run.folder for config in configs]
    array = len(runs) > 1
    members = "; ".join(f"member {number} trains {run}" for number, run in enumerate(runs))
    yield members if array else f"trains {runs[0]}", _file(_executor(root, cluster, code), len(runs) if array else None)
    if evaluate:
        jobs = "JOB_MEMBER" if array else "JOB"
        which = "for each member, evaluates its run" if array else f"evaluates {runs[0]}"
        yield f"{which} when that is finished", _file(_executor(root, cluster, code, after=jobs), None)


def run_here(configs: Sequence[RunConfig], root: Path, cluster: Cluster, *, evaluate: bool) -> int:
    """Run the jobs one after the other on this machine, up to the first that fails; its exit code, or 0.

    A signal for this process is one for the job.

    Raises:
        ConfigError: the folder cannot be written.
    """
    code = _code_folder(root)
    try:
        _copy_code(code, configs)
    except OSError as error:
        raise ConfigError(f"run.folder={root}: {error}") from error
    environment = os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    environment["PYTHONPATH"] = os.pathsep.join([str(code), *filter(None, [os.environ.get("PYTHONPATH")])])
    for member, config in enumerate(configs):
        commands = [["train", str(code / f"{member}.yaml"), f"--ranks={cluster.ranks_per_node}"]]
        commands += [["eval", config.run.folder, "--all"]] if evaluate else []
        for command in commands:
            # in a group of its own: the terminal's Ctrl-C, which it would get too, comes from here
            job = subprocess.Popen([sys.executable, "-m", "scaleclip", *command], env=environment, process_group=0)
            for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
                signal.signal(number, _forward(job))
            status = job.wait()
            if status:
                return status if status > 0 else 128 - status
    return 0


def _forward(job: "subprocess.Popen[bytes]") -> Callable[[int, object], None]:
    return lambda number, _: job.send_signal(number)


def _call(work: TrainJob) -> None:
    work()


def _executor(root: Path, cluster: Cluster, code: Path, after: str | None = None) -> submitit.AutoExecutor:
    """Submits training, or where `after` is the id of the job that trains, what evaluates."""
    try:
        executor = submitit.AutoExecutor(root.absolute() / _JOBS / "%j", cluster="slurm")
    except RuntimeError as error:
        raise ConfigError(f"this machine has no SLURM ({error}): submit where srun is, or run here with --local") from error
    if after is not None:
        cluster = cluster.model_copy(update={"nodes": 1, "min_nodes": None, "ranks": 1, "gpus": min(cluster.gpus, 1)})
    ranks, cpus = cluster.ranks_per_node, cluster.cpus
    size: dict[str, Any] = {"nodes": cluster.nodes, "tasks_per_node": ranks, "cpus_per_task": cpus}
    more: dict[str, Any] = {"requeue": True, "kill-on-invalid-dep": "yes"}
    if cluster.min_nodes:
        # With tasks in it, SLURM would give no more nodes than the fewest nodes have tasks: srun alone hears of them.
        size = {"cpus_per_task": ranks * cpus}
        more["nodes"] = f"{cluster.min_nodes}-{cluster.nodes}"
    checks = []
    if after is None:
        checks = [
            f"SCALECLIP_GRACE_S={cluster.grace_s} SCALECLIP_SRUN={shlex.quote(' '.join(cluster.srun))}",
            f"python={shlex.quote(sys.executable)}",
            f"check_nodes {shlex.quote(str(code))}/${{SLURM_ARRAY_TASK_ID:-0}}.yaml",
        ]
    wanted = {
        "mem_gb": cluster.memory_gb,
        "slurm_partition": cluster.partition,
        "slurm_account": cluster.account,
        "slurm_qos": cluster.qos,
        "slurm_constraint": cluster.constraint,
        "slurm_exclude": cluster.exclude,
        "slurm_dependency": f"afterok:{after}" if after else None,
    }
    executor.update_parameters(
        name=f"scaleclip-{root.name}" + ("-evaluate" if after else ""),
        gpus_per_node=cluster.gpus,
        timeout_min=max(1, round(60 * cluster.hours)),
        stderr_to_stdout=True,
        slurm_signal_delay_s=cluster.grace_s,
        slurm_additional_parameters=more,
        slurm_setup=[
            f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
            "export PYTHONSAFEPATH=1",  # or the folder where the job was submitted would come before the copy
            "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}",
            f"export SLURM_NTASKS_PER_NODE={ranks} SRUN_CPUS_PER_TASK={cpus}",
            *cluster.setup,
            f"source {shlex.quote(str(code / 'scaleclip' / 'slurm' / 'job.sh'))}",
            *checks,
            "note_ends",
        ],
        slurm_srun_args=["--kill-on-bad-exit=1", *cluster.srun],
        slurm_teardown=['end_job "$?"'],
        **size,
        **{key: value for key, value in wanted.items() if value is not None},
    )
    return executor


def _file(executor: submitit.AutoExecutor, members: int | None) -> str:
    """What a job is for sbatch, or an array of so many."""
    slurm: Any = executor._executor
    slurm.parameters["map_count"] = members
    return str(slurm._make_submission_file_text(slurm._submitit_command_str, "dry-run"))


def _forget_handlers() -> None:
    # submitit's would requeue the job, or swallow the signal; without one, it ends the rank with the code that job.sh knows
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _code_folder(root: Path) -> Path:
    return root.absolute() / "code" / time.strftime("%Y%m%d-%H%M%S")


def _copy_code(code: Path, configs: Sequence[RunConfig]) -> None:
    """Fill a folder with a copy of both packages, and each run's configuration."""
    for source in (Path(__file__).parent, Path(scaleclip_kernels.__path__[0])):
        shutil.copytree(source, code / source.name, ignore=shutil.ignore_patterns("__pycache__", "demo"))
    # 42 MB that nobody edits
    (code / "scaleclip" / _DEMO).symlink_to((Path(__file__).parent / _DEMO).resolve())
    (code / CODE_VERSION).write_text(code_version() or "")
    for member, config in enumerate(configs):
        (code / f"{member}.yaml").write_text(to_yaml(config))


def _quiet() -> contextlib.redirect_stderr[io.StringIO]:
    """submitit prints what sbatch says, and raises it."""
    return contextlib.redirect_stderr(io.StringIO())


def _clear(root: Path, code: Path, folders: Sequence[Path]) -> None:
    """Take away what a refused submission has left, and folders that are empty then."""
    shutil.rmtree(code)
    jobs = root / _JOBS
    for left in jobs.glob("*"):
        if left.is_file() and not left.is_symlink():
            left.unlink()
    for folder in (code.parent, jobs, *folders, root):
        with contextlib.suppress(OSError):  # it holds other things
            folder.rmdir()


def _note(folder: Path, job: submitit.Job[Any], kind: Literal["train", "evaluate"]) -> None:
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    note_launch(folder, Launch(now, str(job.job_id), kind, str(job.paths.stdout)))
