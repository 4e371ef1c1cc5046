"""A command on several processes of this machine, by torchrun."""

import logging
import os
import sys

from scaleclip.parent_death import end_with_parent


def start_ranks(ranks: int) -> None:
    """Run this command on `ranks` processes of this machine instead, by torchrun, and exit with their code."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()  # a rank, when its torchrun is killed
    launched = "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    if ranks == 1 or launched:
        return
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # ranks say themselves what went wrong
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2"
    arguments = ["--standalone", f"--nproc-per-node={ranks}", "-m", "scaleclip", *sys.argv[1:]]
    code = 0
    try:
        torchrun.run(torchrun.parse_args(arguments))  # type: ignore[no-untyped-call]
    except SignalException as stop:
        code = 128 + stop.sigval
    except ChildFailedError as failed:
        # below 0: killed by that signal, at which the others lose their connection, and may be seen first
        killed = [failure.exitcode for failure in failed.failures.values() if failure.exitcode < 0]
        code = 128 - killed[0] if killed else failed.get_first_failure()[1].exitcode
    sys.exit(code)


def is_main() -> bool:
    """Whether this process is rank 0, or alone, before the process group is made."""
    return os.environ.get("RANK", "0") == "0"
