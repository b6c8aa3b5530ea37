"""The processes that one recovery runs in: those that torchrun started, or this one alone."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from loguru import logger
from torch import distributed

from rac_modifier.errors import RacError

# The first process may sample for hours while the others wait.
_PATIENCE = datetime.timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """One of `count` processes; `rank` is its number and `device` where it trains (None: where the model is)."""

    rank: int = 0
    count: int = 1
    device: torch.device | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that samples, logs and writes."""
        return self.rank == 0

    @contextlib.contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The first process runs the body, then the others, which find on disk what it has written."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()
        self.wait()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            distributed.barrier()

    def sums(self, *values: float) -> list[float]:
        """Each value, summed over the processes; the same bits in all of them."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return [float(value) for value in total.cpu()]


def started_processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def refuse_processes(what: str) -> None:
    """Refuse to run under torchrun what is not distributed (RacError)."""
    if started_processes() > 1:
        raise RacError(
            f"{what} runs in one process, and torchrun started {started_processes()}: start it without torchrun; only rac "
            "recover is distributed"
        )


@contextlib.contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes that torchrun started (NCCL on GPUs, else gloo), and leave them at the end. Only the first one logs."""
    if started_processes() == 1:
        yield Processes()
        return
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    processes = Processes(distributed.get_rank(), distributed.get_world_size(), device)
    if not processes.is_first:
        logger.disable("rac_modifier")
    try:
        yield processes
    finally:
        logger.enable("rac_modifier")
        distributed.destroy_process_group()
