"""Progress of a long run: a bar on a terminal, and a line every 30 seconds everywhere else."""

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import ClassVar, Self

from loguru import logger
from tqdm import tqdm

_SECONDS = 30.0  # between two lines
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}{postfix}]"


class Phase:
    """Name what runs until it is closed, and count its steps if their `total` is known.

    A thread reports the innermost phase every 30 seconds, also while a step takes minutes. A phase
    of that length reports its last step. The time left follows from the mean time of the steps
    since `done`, which an earlier run took.
    """

    _running: ClassVar[list["Phase"]] = []  # the innermost is the last
    _thread: ClassVar[threading.Thread | None] = None

    def __init__(
        self,
        title: str,
        total: int | None = None,
        done: int = 0,
        *,
        unit: str = "steps",
        shown: bool = True,
    ):
        self._title, self._total, self._unit, self._shown = title, total, unit, shown
        self._first = self.done = done
        self._text = ""
        self._start = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=title,
            unit=unit,
            unit_scale=unit == "tokens",
            bar_format=_BAR,
            disable=total is None or not shown or not _fits_a_bar(),
        )
        Phase._running.append(self)
        if Phase._thread is None:
            Phase._thread = threading.Thread(target=_report_for_ever, daemon=True)
            Phase._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def advance(self, text: str = "", steps: int = 1) -> None:
        """Count steps; `text` is shown, such as "loss 0.0312"."""
        self.done += steps
        self._text = text
        self._bar.set_postfix_str(_joined(text, self._time()), refresh=False)
        self._bar.update(steps)

    def close(self) -> None:
        """End the phase, and those inside that an error has left open."""
        if self in Phase._running:
            took = time.monotonic() - self._start
            if self._bar.disable and self.done == self._total and took >= _SECONDS:
                self.report()
            place = Phase._running.index(self)
            for phase in Phase._running[place:]:
                phase._bar.close()
            del Phase._running[place:]

    def report(self) -> None:
        """Draw the bar anew, or log a line."""
        if not self._bar.disable:
            self._bar.refresh()
        elif self._shown:
            logger.info(f"{self._title}: {_joined(self._count(), self._text, self._time())}")

    def _count(self) -> str:
        if self._total is None:
            return f"{self.done:,} {self._unit}" if self.done else ""
        return f"{self.done:,} of {self._total:,} {self._unit}"

    def _time(self) -> str:
        passed, taken = time.monotonic() - self._start, self.done - self._first
        if self._total is None or taken <= 0:
            return f"{tqdm.format_interval(passed)} so far"
        left = passed / taken * (self._total - self.done)
        return f"about {tqdm.format_interval(left)} left"


def _joined(*texts: str) -> str:
    return ", ".join(filter(None, texts))


def report_running() -> None:
    """Report the innermost phase, if one runs."""
    for phase in Phase._running[-1:]:
        phase.report()


def _report_for_ever(sleep: Callable[[float], None] = time.sleep) -> None:
    while True:
        sleep(_SECONDS)
        report_running()


def _fits_a_bar() -> bool:
    """Return whether errors go to a terminal with a width; some have a width of 0."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):
        return False
