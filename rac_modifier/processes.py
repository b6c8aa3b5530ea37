"""The processes that one run shares: those that torchrun started, or this one alone.

Small things, which are decided in one process or come from each, go as JSON through a gloo group of our own. Tensors go through
the default group (NCCL on GPUs, else gloo). Tensors are not summed in it: the order of a sum is decided where it is taken
(pruning/lane_sum.py), so that no result depends on which process was slow.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from loguru import logger
from torch import distributed

from rac_modifier.errors import RacError

_PATIENCE = datetime.timedelta(
    days=7
)  # the first process may sample for hours while the others wait
_ANSWER = datetime.timedelta(
    hours=1
)  # what all of them work on at the same time does not differ by more
_FAILED = (
    "rac_modifier/failed"  # key of the store, with the message of the process that failed first
)


class ProcessFailedError(RacError):
    """Another process has failed; `said` is whether it can say so itself."""

    def __init__(self, message: str, said: bool = False):
        super().__init__(message)
        self.said = said


@dataclass(frozen=True)
class Processes:
    """One of `count` processes; `rank` is its number and `device` where it computes (None: where the model is)."""

    rank: int = 0
    count: int = 1
    device: torch.device | None = None
    _group: Any = field(default=None, repr=False, compare=False)  # gloo, with `_PATIENCE`
    _meeting: Any = field(default=None, repr=False, compare=False)  # gloo, with `_ANSWER`

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
            with self._answered():
                distributed.barrier(group=self._group)

    def from_first(self, value: Any = None) -> Any:
        """What the first process gives as `value`, which is JSON; in all of them."""
        if self.count == 1:
            return value
        text = json.dumps(value).encode() if self.is_first else b""
        with self._answered():
            size = torch.tensor([len(text)])
            distributed.broadcast(size, 0, group=self._group)
            data = _bytes(text, int(size))
            distributed.broadcast(data, 0, group=self._group)
        return json.loads(data.numpy().tobytes())

    def from_all(self, value: Any) -> list[Any]:
        """What each process gives as `value`, which is JSON, by rank; in all of them."""
        if self.count == 1:
            return [value]
        text = json.dumps(value).encode()
        with self._answered():
            sizes = [torch.tensor([0]) for _ in range(self.count)]
            distributed.all_gather(sizes, torch.tensor([len(text)]), group=self._group)
            longest = max(int(size) for size in sizes)
            found = [_bytes(b"", longest) for _ in sizes]
            distributed.all_gather(found, _bytes(text, longest), group=self._group)
        return [
            json.loads(data.numpy()[: int(size)].tobytes())
            for data, size in zip(found, sizes, strict=True)
        ]

    def meet(self) -> None:
        """Until all processes are here, which have worked on the same until now: within an hour of each other."""
        if self.count > 1:
            with self._answered():
                distributed.barrier(group=self._meeting)

    def sums(self, *values: float) -> list[float]:
        """Each value, summed over the processes; the same bits in all of them."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        with self._answered():
            distributed.all_reduce(total)
        return [float(value) for value in total.cpu()]

    def exchanged(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Of a tensor with as many equal parts as there are processes, the part of this one's number from each, by rank."""
        if self.count == 1:
            return [tensor]
        here = tensor.to(self.device).contiguous()
        found = torch.empty_like(here)
        with self._answered():
            distributed.all_to_all_single(found, here)
        return list(found.to(tensor.device).chunk(self.count))

    def joined(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all processes, of one shape, behind each other by rank."""
        if self.count == 1:
            return tensor
        here = tensor.to(self.device).contiguous()
        found = [torch.empty_like(here) for _ in range(self.count)]
        with self._answered():
            distributed.all_gather(found, here)
        return torch.cat(found).to(tensor.device)

    def send(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """The tensor of the process `source`; in the others `tensor` only gives shape, dtype and device."""
        if self.count == 1:
            return tensor
        here = (
            (tensor.detach() if self.rank == source else torch.empty_like(tensor))
            .to(self.device)
            .contiguous()
        )
        with self._answered():
            distributed.broadcast(here, source)
        return here.to(tensor.device)

    @contextlib.contextmanager
    def _answered(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self.lost(error) from error

    def lost(self, error: Exception) -> ProcessFailedError:
        """What to say where a process did not answer."""
        told = _told()
        if told is not None and told["rank"] != self.rank:
            return ProcessFailedError(
                f"process {told['rank']} of {self.count} has failed: {told['message']}", said=True
            )
        why = str(error).splitlines()[0][:200]
        return ProcessFailedError(
            f"another of the {self.count} processes has ended, or did not answer within {_ANSWER.total_seconds():,.0f} s "
            f"({why}). It may have been killed, for example where memory ran out; start the same command again: it goes on "
            "from what was written"
        )


ALONE = Processes()  # a run in this process


def _bytes(text: bytes, size: int) -> torch.Tensor:
    """uint8 [size], with `text` at its beginning."""
    data = torch.zeros(size, dtype=torch.uint8)
    if text:
        data[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return data


def started_processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def refuse_processes(what: str) -> None:
    """Refuse to run under torchrun what is not distributed (RacError)."""
    if started_processes() > 1:
        raise RacError(
            f"{what} runs in one process, and torchrun started {started_processes()}: start it without torchrun; only rac "
            "prune and rac recover are distributed"
        )


_joined: tuple[Any, Processes] | None = None  # with the default group that it belongs to


def present_processes() -> Processes:
    """Those that this process has joined, by `joined_processes` or by torch.distributed itself; all of them call it.

    Raises:
        RacError: torchrun started several, and torch.distributed was not told; or they are on several machines.
    """
    global _joined
    count, here = (
        started_processes(),
        int(os.environ.get("LOCAL_WORLD_SIZE") or started_processes()),
    )
    if not (distributed.is_available() and distributed.is_initialized()):
        if count > 1:
            raise RacError(
                f"torchrun started {count} processes, and they have not joined: call "
                "torch.distributed.init_process_group() first (on GPUs compressed_tensors.offload.init_dist()), or start "
                "torchrun -m rac_modifier.cli prune"
            )
        return Processes()
    if here != count:
        raise RacError(
            f"torchrun started {count} processes, {here} of them on this machine: pruning shares the model in the memory of "
            "one machine; start it with --nnodes 1"
        )
    if _joined is None or _joined[0] is not distributed.group.WORLD:
        _joined = (distributed.group.WORLD, _join())
    return _joined[1]


def _join() -> Processes:
    device = torch.device("cpu")
    if distributed.get_backend() == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    groups = [
        distributed.new_group(backend="gloo", timeout=timeout) for timeout in (_PATIENCE, _ANSWER)
    ]
    # gloo connects where a group is first used, and does not notice a process that is killed before; so all connect now
    for group in groups:
        distributed.barrier(group=group)
    distributed.all_reduce(torch.zeros(1, device=device))
    _keep_sockets()
    return Processes(distributed.get_rank(), distributed.get_world_size(), device, *groups)


def _keep_sockets() -> None:
    """Do not pass the sockets on to programs that are started from here.

    torch starts one for weights in shared memory. It outlives a process that is killed, and as long as it has the sockets, the
    others wait for that process.
    """
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # the descriptor of the folder itself, closed by now
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                os.set_inheritable(int(name), False)


@contextlib.contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes that torchrun started (NCCL on GPUs, else gloo), and leave them at the end. Only the first one logs.

    Raises:
        ProcessFailedError: in the others, where one of them has failed or did not answer for too long.
    """
    global _joined
    if started_processes() == 1:
        yield Processes()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0))
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=_ANSWER)
    processes = _join()
    _joined = (distributed.group.WORLD, processes)
    if not processes.is_first:
        logger.disable("rac_modifier")
    try:
        yield processes
    except BaseException as error:
        if isinstance(error, RuntimeError) and _of_distributed(
            error
        ):  # of a library's own communication
            raise processes.lost(error) from error
        if not isinstance(error, ProcessFailedError):
            _tell(processes.rank, error)
        raise
    finally:
        _joined = None
        logger.enable("rac_modifier")
        distributed.destroy_process_group()


def _of_distributed(error: RuntimeError) -> bool:
    return isinstance(error, distributed.DistError) or "gloo" in str(error)


def _tell(rank: int, error: BaseException) -> None:
    """Leave the others a message, before this process ends and they notice."""
    with contextlib.suppress(Exception):  # the store may be gone with the first process
        store = distributed.distributed_c10d._get_default_store()
        store.set(
            _FAILED, json.dumps({"rank": rank, "message": str(error) or type(error).__name__})
        )


def _told() -> dict[str, Any] | None:
    """The message of the process that failed, where there is one."""
    try:
        store = distributed.distributed_c10d._get_default_store()
        store.set_timeout(datetime.timedelta(seconds=5))
        found: dict[str, Any] | None = (
            json.loads(store.get(_FAILED)) if store.check([_FAILED]) else None
        )
    except Exception:  # the store may be gone with the first process
        return None
    return found
