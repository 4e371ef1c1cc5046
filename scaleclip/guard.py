"""Stopping on purpose: a signal only sets a flag, and the training loop acts on it at a step boundary."""

import signal
from types import FrameType


class StopSignal:
    """Remembers the first SIGINT, SIGTERM or SIGUSR2 (SLURM's warning) that this process got; a second SIGINT kills."""

    def __init__(self) -> None:
        self.received: int = 0
        """Number of the signal, 0 while there is none."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number
