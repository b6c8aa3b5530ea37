"""How long pruning takes: seconds per group of modules, and the time left, estimated from the groups that are done."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loguru import logger
from tqdm import tqdm

_LINES = 10  # log lines per run where there is no terminal
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} modules [{elapsed}{postfix}]"  # tqdm's own estimate left out


class PruningProgress:
    """Counts the modules that are pruned. A group's time runs from the end of the group before it, forward passes included.

    The time left takes each module that is not done yet to need the mean time of the modules of its shape, or as long as they
    all did per weight where no module of that shape is done. A progress bar shows it on a terminal; elsewhere some ten log
    lines per run do.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        clock: Callable[[], float] = time.monotonic,
        *,
        shown: bool = True,
        prunes: bool = True,
    ):
        self._verb, desc = ("pruned", "pruning") if prunes else ("quantized", "quantizing")
        self._left = dict(shapes)
        self._clock = clock
        self._begin = self._last = clock()
        self._times: list[tuple[tuple[int, int], float]] = []
        self._groups: list[dict[str, Any]] = []
        self._bar = tqdm(
            total=len(shapes),
            desc=desc,
            bar_format=_BAR,
            disable=None if shown else True,
        )
        self._next_line = 1
        self._restored = 0

    def done(self, names: Sequence[str]) -> None:
        """A group of these modules is pruned."""
        now = self._clock()
        seconds, self._last = now - self._last, now
        shapes = [self._left.pop(name) for name in names]
        weights = sum(_size(shape) for shape in shapes)
        self._times += [(shape, seconds * _size(shape) / weights) for shape in shapes]
        self._groups.append({"modules": list(names), "seconds": round(seconds, 3)})
        self._show(len(names))

    def restored(self, name: str) -> None:
        """This module was pruned by an earlier run; its time says nothing about the others."""
        del self._left[name]
        self._restored += 1
        self._last = self._clock()
        self._bar.update()

    def close(self) -> None:
        """Pruning has ended."""
        self._bar.close()

    @property
    def seconds_left(self) -> float:
        """The estimate for the modules that are not done; 0.0 before any is."""
        if not self._times:
            return 0.0
        per_weight = sum(seconds for _, seconds in self._times) / sum(
            _size(shape) for shape, _ in self._times
        )
        of_shape: dict[tuple[int, int], list[float]] = {}
        for shape, seconds in self._times:
            of_shape.setdefault(shape, []).append(seconds)
        mean = {shape: sum(seconds) / len(seconds) for shape, seconds in of_shape.items()}
        return sum(mean.get(shape, per_weight * _size(shape)) for shape in self._left.values())

    def record(self) -> dict[str, Any]:
        """For the run record: seconds of all groups together, and per group; without what an earlier run had pruned."""
        restored = {"restored_modules": self._restored} if self._restored else {}
        return {"seconds": round(self._last - self._begin, 3), **restored, "groups": self._groups}

    def _show(self, count: int) -> None:
        self._bar.set_postfix_str(f"{_readable(self.seconds_left)} left", refresh=False)
        self._bar.update(count)
        done = len(self._times) + self._restored
        total = len(self._left) + done
        if self._bar.disable and done * _LINES >= self._next_line * total:
            self._next_line = done * _LINES // total + 1
            logger.info(
                f"{self._verb} {done} of {total} modules, about {_readable(self.seconds_left)} left"
            )


def _size(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _readable(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min"
        if hours
        else f"{minutes} min {rest:02d} s"
        if minutes
        else f"{rest} s"
    )
