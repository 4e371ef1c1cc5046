"""How far a command is: a bar on a terminal, a line now and then elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_S = 10.0  # between lines where there is no terminal


class ShownProgress:
    """Shows progress, on a terminal from its `with` on.

    Args:
        what: is done.
        units: of it, in the plural.
        quiet: show nothing, as on ranks but the first.
    """

    def __init__(self, what: str, units: str, *, quiet: bool) -> None:
        self.console = Console(quiet=quiet)
        self._units = units
        self._bar = Progress(
            TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[news]}"), TimeRemainingColumn(),
            console=self.console, disable=quiet or not self.console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None, news="")
        self._said_s, self._said_done = time.monotonic(), 0

    def __enter__(self) -> "ShownProgress":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def show(self, done: int, total: int, rate: float, more: str = "") -> None:
        """Tell how far it is.

        Args:
            done, total: units.
            rate: units a second.
            more: what else is to be said, short.
        """
        news = f"{rate:,.0f} {self._units}/s" + f", {more}" * bool(more)
        self._bar.update(self._task, completed=done, total=total, news=news)
        is_time = time.monotonic() - self._said_s > _LINE_S or done == total
        if not self.console.is_terminal and is_time and done != self._said_done:
            self._said_s, self._said_done = time.monotonic(), done
            left = f", {(total - done) / rate / 60:,.1f} min left" if rate and done < total else ""
            said = f", {more}" * bool(more)
            made = f", {rate:,.0f} a second{said}{left}" if rate else ": nothing is left to do" * (done == total)
            # a log's lines are not cut where a terminal would end
            self.console.print(f"{done:,} of {total:,} {self._units}{made}", highlight=False, soft_wrap=True)
