"""Start a `vllm serve` on loopback, wait for it, and stop it, also when this process is killed."""

from __future__ import annotations

import http.client
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from loguru import logger

from rac_modifier.errors import RacError
from rac_modifier.sampling.server_watch import GRACE
from rac_modifier.sampling.vllm_command import HOST, VllmCommand

_LOOK_EVERY = 0.2  # seconds
_SAY_EVERY = 30.0  # seconds
_LAST_LINES = 25
_LAST_BYTES = 16384
_FIRST_BYTES = 1 << 20
# The end of a traceback, alone or after a logger's prefix.
_ERROR = re.compile(r"(?:^|\] )\s*(?:\w+\.)*[A-Z]\w*(?:Error|Exception): \S")
_WATCHER = Path(__file__).with_name("server_watch.py")


@contextmanager
def vllm_server(command: VllmCommand, model: str, dtype: str = "auto") -> Iterator[str]:
    """Run `vllm serve` inside the context, and yield its address.

    It ends with the context, and with this process (see `server_watch`).

    Args:
        command: what is run.
        model: a folder or a Hugging Face id.
        dtype: as vLLM names it.

    Raises:
        RacError: with its last lines: it stops, is not ready in time, or has stopped when the body
            raises a RacError.
    """
    port = _free_port()
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        logger.info(f"starting {command.path} serve {model} on http://{HOST}:{port}")
        watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_WATCHER), *command.arguments(model, dtype, port)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=command.environment(),
            start_new_session=True,  # Ctrl-C of the terminal is for this process, which then stops the server
        )
        try:
            _wait_until_ready(command, watcher, port, log, started)
            logger.info(f"vllm serve is ready after {time.monotonic() - started:.0f} s")
            try:
                yield f"http://{HOST}:{port}"
            except RacError as error:
                if watcher.poll() is None:
                    raise
                raise RacError(f"{error}. {_stopped(watcher, log)}") from error
        finally:
            _stop(watcher)


class ServerOnDemand:
    """A server that starts when it is first asked, and stops at the end of the context.

    A start that failed is not repeated. After an error of the body the server starts again.

    Args:
        start: starts it, as `vllm_server` does.
    """

    def __init__(self, start: Callable[[], AbstractContextManager[str]]):
        self._start, self._running = start, ExitStack()
        self._url: str | None = None
        self._failed: RacError | None = None

    def __enter__(self) -> ServerOnDemand:
        return self

    def __exit__(self, *error: object) -> None:
        self._running.close()

    @contextmanager
    def asked(self) -> Iterator[tuple[str]]:
        """Yield its address.

        Raises:
            RacError: it cannot be started, or has stopped when the body raises a RacError.
        """
        if self._failed is not None:
            raise self._failed
        if self._url is None:
            try:
                self._url = self._running.enter_context(self._start())
            except RacError as error:
                self._failed = error
                raise
        try:
            yield (self._url,)
        except RacError:
            self._url = None
            self._running.__exit__(*sys.exc_info())
            raise


def _wait_until_ready(
    command: VllmCommand, watcher: subprocess.Popen[bytes], port: int, log: BinaryIO, started: float
) -> None:
    said = started
    while not _is_healthy(port):
        now = time.monotonic()
        if watcher.poll() is not None:
            raise RacError(_stopped(watcher, log))
        if now - started > command.timeout:
            raise RacError(f"vllm serve was not ready after {command.timeout:g} s. {end_of(log)}")
        if now - said > _SAY_EVERY:
            said = now
            logger.info(
                f"waiting for vllm serve ({now - started:.0f} s): {(last_lines(log, 1) or ['no output yet'])[0]}"
            )
        time.sleep(_LOOK_EVERY)
    if watcher.poll() is not None:  # another program answers at this port
        raise RacError(_stopped(watcher, log))


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)  # urllib would ask a proxy
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stopped(watcher: subprocess.Popen[bytes], log: BinaryIO) -> str:
    return (
        f"vllm serve stopped with exit code {watcher.returncode}; its options (such as "
        f"--max-model-len 8192) are set in RAC_VLLM_OPTIONS. {end_of(log)}"
    )


def end_of(log: BinaryIO) -> str:
    """Describe the last lines that a server printed, and its first error if they lack it."""
    lines = last_lines(log, _LAST_LINES)
    if not lines:
        return "It printed nothing"
    cause = first_error(log)
    named = "" if cause is None or cause in lines else f"Its first error:\n{cause}\n"
    return f"{named}Its last lines:\n" + "\n".join(lines)


def first_error(log: BinaryIO) -> str | None:
    """Return the first line that names an exception: vLLM's last lines may not name the cause."""
    start = os.pread(log.fileno(), _FIRST_BYTES, 0).decode("utf-8", "replace")
    return next((line.rstrip() for line in start.splitlines() if _ERROR.search(line)), None)


def last_lines(log: BinaryIO, count: int) -> list[str]:
    """Return the last non-empty lines of a file; the position for writing stays."""
    size = os.fstat(log.fileno()).st_size
    end = os.pread(log.fileno(), _LAST_BYTES, max(0, size - _LAST_BYTES))
    return [line.rstrip() for line in end.decode("utf-8", "replace").splitlines() if line.strip()][
        -count:
    ]


def _stop(watcher: subprocess.Popen[bytes]) -> None:
    assert watcher.stdin is not None
    watcher.stdin.close()
    try:
        watcher.wait(2 * GRACE + 5)
    except subprocess.TimeoutExpired:
        logger.warning(f"vllm serve (watched by process {watcher.pid}) does not stop")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])
