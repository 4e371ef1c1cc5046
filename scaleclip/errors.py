"""The errors whose message says all a user needs: the command prints them without a traceback."""

import signal

HANG = 75
"""Exit code of a rank that the watchdog ended (EX_TEMPFAIL): starting again may help."""


class ConfigError(ValueError):
    """A setting that a user can mend: the message names the key, the value, the rule and the way out. Exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on: the message says why and what is safe. Exit code 1."""


class Stopped(Exception):
    """A run that was asked to stop and has saved. Exit code 128 + the signal's number, as a shell reports it."""

    def __init__(self, number: int, step: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after step {step}, which is saved: start again to go on")
        self.exit_code = 128 + number
