"""The processes that one run shares: those that torchrun started, or this one alone.

Decisions go as JSON through a gloo group, tensors through the default group (NCCL on GPUs). On
several machines the first process alone reads and writes the files of the run; others ask for them.
"""

import contextlib
import datetime
import json
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from rac_modifier.errors import RacError, refusing

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
    _group: Any = field(default=None, repr=False, compare=False)  # gloo, with a timeout of days
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

    def fail(self, error: BaseException) -> None:
        """Leave the other ranks a message, before this process ends."""
        message = {"rank": self.rank, "message": str(error) or type(error).__name__}
        with contextlib.suppress(Exception):  # the store may be gone with the first process
            store = distributed.distributed_c10d._get_default_store()
            store.set(_FAILED, json.dumps(message))

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


def _failure() -> dict[str, Any] | None:
    """Return the message of the rank that failed, if there is one."""
    with contextlib.suppress(Exception):  # the store may be gone with the first process
        store = distributed.distributed_c10d._get_default_store()
        store.set_timeout(datetime.timedelta(seconds=5))
        if store.check([_FAILED]):
            return dict(json.loads(store.get(_FAILED)))
    return None
