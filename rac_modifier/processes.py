"""The processes that one run shares: those that torchrun started, or this one alone.

Decisions go as JSON through a gloo group, tensors through the default group (NCCL on GPUs).
"""

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
from torch import Tensor, distributed

from rac_modifier.errors import RacError

_PATIENCE = datetime.timedelta(days=7)  # the first rank may sample for hours while others wait
_ANSWER = datetime.timedelta(hours=1)  # ranks that work on the same end within this time
_FAILED = "rac_modifier/failed"  # key of the store with the message of the rank that failed first


class ProcessFailedError(RacError):
    """Another process has failed."""


@dataclass(frozen=True)
class Processes:
    """This process as one of `count`: its `rank`, and its `device` (None: the model's)."""

    rank: int = 0
    count: int = 1
    device: torch.device | None = None
    _group: Any = field(default=None, repr=False, compare=False)  # gloo, with `_PATIENCE`

    @property
    def is_first(self) -> bool:
        """Return whether this process samples, logs and writes."""
        return self.rank == 0

    @contextlib.contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Run the body on the first rank, then on the others, which read what it has written."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()
        self.wait()

    def wait(self) -> None:
        """Wait for all ranks, for days if need be."""
        if self.count > 1:
            with self._answered():
                distributed.barrier(group=self._group)

    def from_first(self, value: Any = None) -> Any:
        """Return on all ranks the `value`, which is JSON, of the first."""
        return self.from_all(value if self.is_first else None)[0]

    def from_all(self, value: Any) -> list[Any]:
        """Return on all ranks the `value`, which is JSON, of each, by rank."""
        if self.count == 1:
            return [value]
        texts = [""] * self.count
        with self._answered():
            distributed.all_gather_object(texts, json.dumps(value), group=self._group)
        return [json.loads(text) for text in texts]

    def sums(self, *values: float) -> list[float]:
        """Return each value summed over the ranks; the same bits on all of them."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        with self._answered():
            distributed.all_reduce(total)
        return [float(value) for value in total.cpu()]

    def exchanged(self, tensor: Tensor) -> list[Tensor]:
        """Cut `tensor` into `count` equal shards; return this rank's shard of each rank."""
        if self.count == 1:
            return [tensor]
        sent = tensor.to(self.device).contiguous()
        received = torch.empty_like(sent)
        with self._answered():
            distributed.all_to_all_single(received, sent)
        return list(received.to(tensor.device).chunk(self.count))

    def joined(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, of one shape, concatenated by rank."""
        if self.count == 1:
            return tensor
        sent = tensor.to(self.device).contiguous()
        received = [torch.empty_like(sent) for _ in range(self.count)]
        with self._answered():
            distributed.all_gather(received, sent)
        return torch.cat(received).to(tensor.device)

    def send(self, tensor: Tensor, source: int) -> Tensor:
        """Return the tensor of rank `source`; others' `tensor` gives shape, dtype and device."""
        if self.count == 1:
            return tensor
        sent = tensor.detach() if self.rank == source else torch.empty_like(tensor)
        sent = sent.to(self.device).contiguous()
        with self._answered():
            distributed.broadcast(sent, source)
        return sent.to(tensor.device)

    @contextlib.contextmanager
    def _answered(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self.lost(error) from error

    def lost(self, error: Exception) -> ProcessFailedError:
        """Return the error of a process that did not answer."""
        failed = _failure()
        if failed is not None and failed["rank"] != self.rank:
            message = f"process {failed['rank']} of {self.count} has failed: {failed['message']}"
            return ProcessFailedError(message)
        why = str(error).splitlines()[0][:200]
        return ProcessFailedError(
            f"another of the {self.count} processes has ended or does not answer ({why}), perhaps "
            "because memory ran out; start the same command again: it goes on from what was written"
        )


ALONE = Processes()  # a run in this process


def started_processes() -> int:
    """Return how many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def refuse_processes(feature: str) -> None:
    """Refuse to run under torchrun what is not distributed (RacError)."""
    if started_processes() > 1:
        raise RacError(
            f"{feature} runs in one process, and torchrun started {started_processes()}: start it "
            "without torchrun; only rac prune and rac recover are distributed"
        )


_joined: tuple[Any, Processes] | None = None  # with the default group that it belongs to


def present_processes() -> Processes:
    """Return the processes that this one has joined (RacError: they have not, or cannot)."""
    global _joined
    count = started_processes()
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or count)
    if not (distributed.is_available() and distributed.is_initialized()):
        if count > 1:
            raise RacError(
                f"torchrun started {count} processes, and they have not joined: call "
                "torch.distributed.init_process_group() first"
            )
        return Processes()
    if local != count:
        raise RacError(
            f"torchrun started {count} processes, {local} of them on this machine: pruning shares "
            "the model in the memory of one machine; start it with --nnodes 1"
        )
    if _joined is None or _joined[0] is not distributed.group.WORLD:
        _joined = (distributed.group.WORLD, _join())
    return _joined[1]


def _join() -> Processes:
    device = torch.device("cpu")
    if distributed.get_backend() == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    # gloo connects at a group's first use, and misses a process that is killed before: all
    # connect now
    distributed.barrier(group=group)
    distributed.all_reduce(torch.zeros(1, device=device))
    _keep_sockets()
    return Processes(distributed.get_rank(), distributed.get_world_size(), device, group)


def _keep_sockets() -> None:
    """Let no child program inherit the sockets: torch's outlives a killed rank, and others wait."""
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # the descriptor of the folder itself, closed by now
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                os.set_inheritable(int(name), False)


@contextlib.contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes that torchrun started (NCCL on GPUs, else gloo); the first rank logs."""
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
        of_library = isinstance(error, distributed.DistError) or "gloo" in str(error)
        if isinstance(error, RuntimeError) and of_library:  # a library's own communication
            raise processes.lost(error) from error
        if not isinstance(error, ProcessFailedError):
            _tell(processes.rank, error)
        raise
    finally:
        _joined = None
        logger.enable("rac_modifier")
        distributed.destroy_process_group()


def _tell(rank: int, error: BaseException) -> None:
    """Leave the other ranks a message, before this process ends."""
    message = {"rank": rank, "message": str(error) or type(error).__name__}
    with contextlib.suppress(Exception):  # the store may be gone with the first process
        store = distributed.distributed_c10d._get_default_store()
        store.set(_FAILED, json.dumps(message))


def _failure() -> dict[str, Any] | None:
    """Return the message of the rank that failed, if there is one."""
    with contextlib.suppress(Exception):  # the store may be gone with the first process
        store = distributed.distributed_c10d._get_default_store()
        store.set_timeout(datetime.timedelta(seconds=5))
        if store.check([_FAILED]):
            return dict(json.loads(store.get(_FAILED)))
    return None
