"""Join the processes that torchrun started, and leave them again."""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from loguru import logger
from torch import distributed

from rac_modifier.distributed import machines
from rac_modifier.distributed.processes import Processes, ProcessFailedError
from rac_modifier.errors import RacError, refusing

_PATIENCE = datetime.timedelta(days=7)  # the first rank may sample for hours while others wait
_ANSWER = datetime.timedelta(hours=1)  # ranks that work on the same end within this time


def _started_processes() -> int:
    """Return how many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


_joined: tuple[Any, Processes] | None = None  # with the default group that it belongs to


def present_processes() -> Processes:
    """Return the processes that this one has joined (RacError: they have not, or cannot)."""
    global _joined
    count = _started_processes()
    if not (distributed.is_available() and distributed.is_initialized()):
        if count > 1:
            raise RacError(
                f"torchrun started {count} processes, and they have not joined: call "
                "torch.distributed.init_process_group() first"
            )
        return Processes()
    if _joined is None or _joined[0] is not distributed.group.WORLD:
        _joined = (distributed.group.WORLD, _join())
    return _joined[1]


def _join() -> Processes:
    """Connect the processes (RacError: another version, or a clock that is far off)."""
    rank, count, device = distributed.get_rank(), distributed.get_world_size(), torch.device("cpu")
    if distributed.get_backend() == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    # gloo connects at a group's first use, and misses a process that is killed before: all
    # connect now
    distributed.barrier(group=group)
    distributed.all_reduce(torch.zeros(1, device=device))
    # torch's program for shared memory outlives a killed rank: with its sockets others would wait
    for descriptor in machines.open_sockets().values():
        os.set_inheritable(descriptor, False)
    local_rank = int(os.environ.get("LOCAL_RANK") or rank)
    processes = Processes(rank, count, device, group, rank - local_rank)
    local = processes.from_all(processes.machine).count(processes.machine)
    processes = replace(processes, _local=local)
    processes.check_same(machines.environment())
    processes.check_clocks()
    return processes


@contextlib.contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes that torchrun started (NCCL on GPUs, else gloo); the first rank logs.

    RacError: they cannot join. A process ends in the body when another machine has died.
    """
    global _joined
    count = _started_processes()
    if count == 1:
        yield Processes()
        return
    several = int(os.environ.get("LOCAL_WORLD_SIZE") or count) < count  # machines
    if several:
        machines.choose_interface(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0))
    step = "see the errors of the others (GLOO_SOCKET_IFNAME names the network interface)"
    store, rank, world = machines.connect()
    store.set_timeout(_ANSWER)
    with refusing("the processes cannot join", step, RuntimeError):
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=_ANSWER
        )
    processes = Processes(distributed.get_rank(), distributed.get_world_size())
    watch = None
    try:
        before = machines.open_sockets()
        processes = _join()
        _joined = (distributed.group.WORLD, processes)
        if several:
            watch = machines.Watch(before, lambda: str(processes.lost(TimeoutError("no answer"))))
            watch.start()
        if not processes.is_first:
            logger.disable("rac_modifier")
        yield processes
    except BaseException as error:
        of_library = isinstance(error, distributed.DistError) or "gloo" in str(error)
        if isinstance(error, RuntimeError) and of_library:  # a library's own communication
            raise processes.lost(error) from error
        if not isinstance(error, ProcessFailedError):
            processes.fail(error)
        raise
    finally:
        _joined = None
        logger.enable("rac_modifier")
        distributed.destroy_process_group()
        if watch is not None:
            watch.stop()
