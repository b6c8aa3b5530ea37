"""The processes that one run shares: those that torchrun started, or this one alone.

Decisions go as JSON through a gloo group, tensors through the default group (NCCL on GPUs). On
several machines the first process alone reads and writes the files of the run; others ask for them.
"""

import contextlib
import datetime
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, distributed

from rac_modifier import machines
from rac_modifier.errors import RacError, refusing

_PATIENCE = datetime.timedelta(days=7)  # the first rank may sample for hours while others wait
_ANSWER = datetime.timedelta(hours=1)  # ranks that work on the same end within this time
_CLOCKS = 300.0  # seconds by which the clocks of two machines may differ
_CHUNK = 1 << 26  # bytes of a file that are sent together
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
    machine: int = 0  # rank of the first process on this machine
    _local: int | None = None

    @property
    def is_first(self) -> bool:
        """Return whether this process samples, logs and writes."""
        return self.rank == 0

    @property
    def local(self) -> int:
        """Return how many of the processes share the memory of this machine."""
        return self._local or self.count

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

    def send(self, tensor: Tensor | None, source: int = 0) -> Tensor:
        """Return the tensor of rank `source`, elsewhere on this rank's device.

        The `tensor` of another rank is not read.
        """
        form = tensor if tensor is None else [list(tensor.shape), str(tensor.dtype)]
        shape, dtype = self.from_all(form)[source]
        if tensor is None or self.rank != source:
            kind = getattr(torch, dtype.removeprefix("torch."))
            tensor = torch.empty(shape, dtype=kind, device=self.device)
        if self.count == 1:
            return tensor
        sent = tensor.detach().to(self.device).contiguous()
        with self._answered():  # as bytes: gloo and NCCL do not send every dtype
            distributed.broadcast(sent.view(-1).view(torch.uint8), source)
        return tensor.detach() if self.rank == source else sent

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Refuse a rank whose `facts`, which are JSON, are not the first's (RacError)."""
        (host, expected), *others = self.from_all([socket.gethostname(), dict(facts)])
        for rank, (other, actual) in enumerate(others, 1):
            for name, value in actual.items():
                if value != expected[name]:
                    values = (
                        f" ({value}, not {expected[name]})" if not isinstance(value, dict) else ""
                    )
                    raise RacError(
                        f"process {rank} on {other} has another {name} than process 0 on {host}"
                        f"{values}: make them the same, then start all again"
                    )

    def check_clocks(self) -> None:
        """Refuse a rank whose clock is far from the first's (RacError)."""
        self.wait()
        (host, now), *others = self.from_all([socket.gethostname(), time.time()])
        for rank, (other, seconds) in enumerate(others, 1):
            if abs(seconds - now) > _CLOCKS:
                raise RacError(
                    f"the clock of process {rank} on {other} differs by {seconds - now:+,.0f} s "
                    f"from that of process 0 on {host}: set both by NTP, then start all again"
                )

    def copy(self, folder: Path, to: Path, *, needed: bool) -> None:
        """Write the files of the first rank's `folder` to a folder `to` where it is `needed`.

        config.json comes last, without which it is no model. RacError: not readable or writable.
        """
        if not any(self.from_all(needed)):
            return
        step = "make room, or make it readable, then start all again"
        with refusing(f"{folder} of the first machine cannot be copied", step, OSError):
            files = []
            if self.is_first:
                paths = [path for path in folder.iterdir() if path.is_file()]
                paths.sort(key=lambda path: (path.name == "config.json", path.name))
                files = [[path.name, path.stat().st_size] for path in paths]
            if needed:
                to.mkdir(parents=True, exist_ok=True)
            for name, size in self.from_first(files):
                self._copy_file(folder / name, to / Path(name).name, size, needed=needed)
        self.wait()

    def _copy_file(self, path: Path, to: Path, size: int, *, needed: bool) -> None:
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(path.open("rb")) if self.is_first else None
            target = stack.enter_context(to.open("wb")) if needed else None
            for start in range(0, size, _CHUNK):
                chunk = None
                if source is not None:
                    data = bytearray(source.read(min(_CHUNK, size - start)))
                    if not data:
                        raise OSError(f"{path} became shorter")
                    chunk = torch.frombuffer(data, dtype=torch.uint8)
                chunk = self.send(chunk)
                if target is not None:
                    target.write(chunk.cpu().numpy().tobytes())

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
    count = started_processes()
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
    with refusing("the processes cannot join", step, RuntimeError):
        distributed.init_process_group(backend, timeout=_ANSWER)
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
            _tell(processes.rank, error)
        raise
    finally:
        _joined = None
        logger.enable("rac_modifier")
        distributed.destroy_process_group()
        if watch is not None:
            watch.stop()


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
