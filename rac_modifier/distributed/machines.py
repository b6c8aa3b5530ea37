"""What connects the machines of a run, and what has to be the same on each."""

import contextlib
import datetime
import os
import select
import socket
import stat
import sys
import threading
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import psutil
import torch
from torch import distributed

from rac_modifier.errors import RacError

_JOIN = 600.0  # seconds in which all processes connect; torchrun starts them at the same time
_SILENCE = 25  # seconds without an answer after which the kernel gives up a connection
_GRACE = 10.0  # seconds in which a process ends by itself after it lost a connection


def environment() -> dict[str, Any]:
    """Return versions, and without an accelerator threads, that the bits of a run depend on."""
    packages = ("rac-modifier", "torch", "transformers", "llmcompressor", "compressed-tensors")
    values: dict[str, Any] = {name: version(name) for name in packages}
    if not torch.accelerator.is_available():
        values["threads (OMP_NUM_THREADS)"] = torch.get_num_threads()
    return values


def choose_interface(host: str, port: int) -> None:
    """Let gloo use the network interface that leads to `host`.

    Its default is the address of this machine's name, which is often the loopback's.
    """
    with contextlib.suppress(OSError):  # gloo's own error says more
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            local = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if local in {item.address for item in addresses}:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def connect() -> tuple[Any, int, int]:
    """Return torchrun's store, the rank and the count (RacError: not all connect in `_JOIN`).

    The thread is for a peer that accepts the connection and is silent: torch waits without end.
    """
    found: list[tuple[Any, int, int]] = []
    why = ["it accepts connections and does not answer"]

    def join() -> None:
        try:
            limit = datetime.timedelta(seconds=_JOIN)
            found.append(next(distributed.rendezvous("env://", timeout=limit)))
        except (RuntimeError, ValueError) as error:
            why[:] = str(error).splitlines()

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(2 * _JOIN)
    if found:
        return found[0]
    first = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    raise RacError(
        f"the processes cannot join at {first} ({why[0]}); see the errors of the others, and "
        "whether another program has that port: torchrun --master-port names another"
    )


def open_sockets() -> dict[int, int]:
    """Return the descriptors of this process's sockets, by inode."""
    sockets = {}
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # the descriptor of the folder itself, closed by now
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                sockets[status.st_ino] = int(name)
    return sockets


def _kept_alive(descriptor: int) -> socket.socket | None:
    """Return a duplicate of a TCP connection that ends when it is silent; None: it is none."""
    connection = socket.socket(fileno=os.dup(descriptor))
    try:
        connection.getpeername()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, -(-_SILENCE // 5))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, -(-_SILENCE // 5))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _SILENCE)
    except OSError:  # it listens, or is not of TCP
        connection.close()
        return None
    return connection


class Watch(threading.Thread):
    """End this process when a connection to another one is lost, also while it computes.

    A process that dies closes its connections. A machine that dies does not, and its connections
    are lost after `_SILENCE` seconds. Watched are sockets that are not among those `before` the
    processes connected. `last_words` returns the reason that is printed.
    """

    def __init__(self, before: Mapping[int, int], last_words: Callable[[], str]):
        super().__init__(daemon=True)
        self._last_words, self._over = last_words, threading.Event()
        self._watched: list[socket.socket] = []
        for inode, descriptor in open_sockets().items():
            if (connection := _kept_alive(descriptor)) is None:
                continue
            if inode in before:
                connection.close()
            else:
                self._watched.append(connection)

    def run(self) -> None:
        """Wait for the loss of a connection, or for `stop`."""
        poll = select.poll()
        for connection in self._watched:
            poll.register(connection, select.POLLRDHUP)
        while not poll.poll(100):
            if self._over.is_set():
                return
        if not self._over.wait(_GRACE):
            print(f"error: {self._last_words()}", file=sys.stderr, flush=True)
            os._exit(1)

    def stop(self) -> None:
        """End the watch, before the other processes end."""
        self._over.set()
        self.join()
        for connection in self._watched:
            connection.close()
