"""How a process ends: what went wrong as one message, and as a code.

0: done. 1: the run failed. 2: a setting or the environment is at fault. 70: an error that nobody foresaw (EX_SOFTWARE). 75: the
watchdog ended a hang. 128 + a signal's number. slurm/job.sh starts jobs again by them.
"""

import contextlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator

from scaleclip.errors import ConfigError, RunError, Stopped

_INTERRUPTED = 128 + signal.SIGINT


@contextlib.contextmanager
def exiting_on_errors() -> Iterator[None]:
    """Around all that a process does: an error ends it at once, with its code."""
    try:
        yield
    except ConfigError as error:
        _exit(error, 2)
    except RunError as error:
        _exit(error, 1)
    except Stopped as stop:
        _exit(stop, stop.exit_code)
    except KeyboardInterrupt:
        _exit("interrupted", _INTERRUPTED)
    except SystemExit as end:
        if end.code == _INTERRUPTED:  # typer's, which says nothing
            _exit("interrupted", _INTERRUPTED)
        raise
    except Exception:
        message = traceback.format_exc()
        logging.getLogger("scaleclip").error(message)  # into the rank's log
        _exit(message, 70)


def _exit(error: Exception | str, code: int) -> None:
    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("RANK", "0")) else ""
    print(f"{rank}{error}", file=sys.stderr, flush=True)
    # loader processes and the process group may wait for each other at the interpreter's end
    os._exit(code)
