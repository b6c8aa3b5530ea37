"""Progress of a long run: a bar on a terminal, some ten log lines elsewhere."""

import time

from loguru import logger
from tqdm import tqdm

_LINES = 10  # log lines of a run without a terminal
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}s [{elapsed}{postfix}]"


class StepProgress:
    """Count the steps of a run, and estimate the time left from the mean time of its steps."""

    def __init__(self, title: str, total: int, first_step: int = 0, *, shown: bool = True):
        self._title, self._total, self._shown = title, total, shown
        self._first = self._done = first_step
        self._start = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=first_step,
            desc=title,
            unit="step",
            bar_format=_BAR,
            disable=None if shown else True,  # None: no bar without a terminal
        )

    def step(self, text: str) -> None:
        """Count a step; `text` is shown, such as "loss 0.0312"."""
        lines_before = self._done * _LINES // self._total
        self._done += 1
        per_step = (time.monotonic() - self._start) / (self._done - self._first)
        remaining = f"about {tqdm.format_interval(per_step * (self._total - self._done))} left"
        self._bar.set_postfix_str(f"{text}, {remaining}", refresh=False)
        self._bar.update()
        due = self._done * _LINES // self._total > lines_before
        if self._shown and self._bar.disable and due:
            logger.info(f"{self._title}: step {self._done} of {self._total}, {text}, {remaining}")

    def close(self) -> None:
        """End the bar."""
        self._bar.close()
