"""Processes that are threads of this one, for tests of what each of several does."""

import json
import threading
from collections.abc import Callable
from typing import Any

import torch

from rac_modifier.distributed.processes import Processes


class Meeting:
    """What the threads of `together` share."""

    def __init__(self, count: int):
        self.barrier = threading.Barrier(count)
        self.places: list[Any] = [None] * count


class Threads(Processes):
    """One of the threads, with the methods of `Processes`; what they exchange is JSON here, too."""

    meeting: Meeting

    def wait(self) -> None:
        self.meeting.barrier.wait()

    def _exchange(self, value: Any) -> list[Any]:
        self.meeting.places[self.rank] = value
        self.wait()
        values = list(self.meeting.places)
        self.wait()
        return values

    def from_all(self, value: Any) -> list[Any]:
        return [json.loads(text) for text in self._exchange(json.dumps(value))]

    def sums(self, *values: float) -> list[float]:
        return [sum(column) for column in zip(*self.from_all(values), strict=True)]

    def exchanged(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [sent.chunk(self.count)[self.rank] for sent in self._exchange(tensor.clone())]

    def joined(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._exchange(tensor))

    def send(self, tensor: torch.Tensor | None, source: int = 0) -> torch.Tensor:
        sent = self._exchange(tensor)[source]
        return sent if self.rank == source else sent.clone()


def together(count: int, run: Callable[[Threads], Any]) -> list[Any]:
    """What `run` returns in each of so many threads."""
    meeting, results = Meeting(count), [None] * count
    errors: list[BaseException | None] = [None] * count

    def body(rank: int) -> None:
        mine = Threads(rank, count, torch.device("cpu"))
        object.__setattr__(mine, "meeting", meeting)
        try:
            results[rank] = run(mine)
        except BaseException as error:  # raised again below
            errors[rank] = error
            meeting.barrier.abort()

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    raised = [error for error in errors if error is not None]
    raised.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))
    if raised:
        raise raised[0]
    return results
