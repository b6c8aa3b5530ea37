"""A `vllm serve` of our own: started on loopback, waited for, and stopped at the end, also when this process is killed."""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from loguru import logger

from rac_modifier.errors import RacError
from rac_modifier.sampling.server_watch import GRACE

_HOST = "127.0.0.1"
_LOOK_EVERY = 0.2  # seconds
_SAY_EVERY = 30.0  # seconds
_LAST_LINES = 25
_LAST_BYTES = 16384
_FIRST_BYTES = 1 << 20
# The end of a traceback, alone or after a logger's prefix.
_ERROR = re.compile(r"(?:^|\] )\s*(?:\w+\.)*[A-Z]\w*(?:Error|Exception): \S")
# vLLM 0.32 ends at this: a prompt that is read in parts, of a request with a seed, without a GPU. Ours have seeds.
_SEEDED_IN_PARTS = "CPU Generator does not use offset"
_SEEDED_IN_PARTS_ADVICE = (
    "On a CPU, vLLM fails where it reads the prompt of a request with a seed in parts: set "
    "RAC_VLLM_OPTIONS=--no-enable-chunked-prefill"
)
_WATCHER = Path(__file__).with_name("server_watch.py")


@dataclass(frozen=True)
class VllmCommand:
    """Which `vllm` is started, and how.

    Attributes:
        path: of the command.
        options: added to `vllm serve MODEL`.
        timeout: seconds until it must be ready.
    """

    path: str
    options: tuple[str, ...] = ()
    timeout: float = 1800.0

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> VllmCommand:
        """RAC_VLLM (else `vllm` on the PATH), RAC_VLLM_OPTIONS and RAC_VLLM_TIMEOUT.

        Raises:
            RacError: no such command, or values that cannot be read.
        """
        named = variables.get("RAC_VLLM")
        path = shutil.which(named or "vllm", path=variables.get("PATH"))
        if path is None and named:
            raise RacError(
                f"RAC_VLLM={named!r} is no command that can be run; name the vllm of the environment that has it"
            )
        if path is None:
            raise RacError(
                "no vllm on the PATH; install it in an environment of its own (scripts/serve_cpu_env.sh does, for a CPU), and "
                "name it with RAC_VLLM=/path/to/environment/bin/vllm"
            )
        try:
            options = tuple(shlex.split(variables.get("RAC_VLLM_OPTIONS", "")))
        except ValueError as error:
            raise RacError(
                f"RAC_VLLM_OPTIONS={variables['RAC_VLLM_OPTIONS']!r}: {error}; write it as for a shell"
            ) from error
        text = variables.get("RAC_VLLM_TIMEOUT") or str(cls.timeout)
        try:
            timeout = float(text)
        except ValueError:
            timeout = 0.0
        if not 0 < timeout < float("inf"):
            raise RacError(f"RAC_VLLM_TIMEOUT={text!r} is no number of seconds above 0")
        return cls(path, options, timeout)

    def arguments(self, model: str, dtype: str, port: int) -> list[str]:
        """The whole command line."""
        where = ["--host", _HOST, "--port", str(port)]
        asked = self._says("quantization") or any(option.split("=")[0] == "-q" for option in self.options)
        ours = ["--quantization", "rac-sparse"] if _has_few_bits(model) and not asked else []
        whole = (
            [] if not self.is_cpu_build() or self._says("enable-chunked-prefill") else ["--no-enable-chunked-prefill"]
        )
        return [self.path, "serve", model, *where, "--dtype", dtype, *ours, *whole, *self.options]

    def is_cpu_build(self) -> bool:
        """Whether its vLLM computes on the CPU, by the end of its version; False where there is no python beside the command."""
        python = Path(self.path).parent / "python"
        if not python.exists():
            return False
        asked = [str(python), "-I", "-c", "from importlib.metadata import version; print(version('vllm'))"]
        answer = subprocess.run(asked, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        return answer.stdout.strip().endswith("+cpu")

    def _says(self, name: str) -> bool:
        """Whether an option is among the user's, or its negation."""
        return any(option.split("=")[0] in (f"--{name}", f"--no-{name}") for option in self.options)

    def environment(self) -> dict[str, str]:
        """This process's variables, without a PYTHONPATH that is meant for this environment and not for vLLM's."""
        own = Path(self.path).parent == Path(sys.executable).parent
        variables = {name: value for name, value in os.environ.items() if own or name != "PYTHONPATH"}
        return {"VLLM_NO_USAGE_STATS": "1", **variables}


def _has_few_bits(model: str) -> bool:
    """Whether it is a folder with weights of 2 or 3 bits, for which vLLM has no CPU kernel of its own."""
    try:
        groups = json.loads((Path(model) / "config.json").read_text())["quantization_config"]["config_groups"]
        return any(group["weights"]["num_bits"] in (2, 3) for group in groups.values())
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ):  # no folder, or vLLM says what is wrong with it
        return False


def check_serving() -> None:
    """Refuse early what every served model would fail at: no vLLM, or none with this package, whose plugin reads packed files.

    Raises:
        RacError: saying what is missing, and what to do.
    """
    command = VllmCommand.from_environment()
    python = Path(command.path).parent / "python"
    if not python.exists():
        logger.info(f"{command.path} has no python beside it, so it is not known whether it has this package")
        return
    asked = [str(python), "-I", "-c", "from importlib.metadata import version; version('rac-modifier')"]
    if subprocess.run(asked, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode:
        raise RacError(
            f"the environment of {command.path} lacks rac-modifier, whose plugin reads packed checkpoints; "
            f"{python} -m pip install 'rac-modifier[serve]'"
        )


@contextmanager
def vllm_server(command: VllmCommand, model: str, dtype: str = "auto") -> Iterator[str]:
    """Run `vllm serve` inside the context, which gets its address.

    It ends with the context, and with this process, whatever ends that (see `server_watch`).

    Args:
        command: what is run.
        model: a folder or a Hugging Face id.
        dtype: as vLLM names it.

    Raises:
        RacError: it stops, or is not ready in time; it has stopped when the body raises a RacError. Its last lines are shown.
    """
    port = _free_port()
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        logger.info(f"starting {command.path} serve {model} on http://{_HOST}:{port}")
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
                yield f"http://{_HOST}:{port}"
            except RacError as error:
                if watcher.poll() is None:
                    raise
                raise RacError(f"{error}. {_stopped(watcher, log)}") from error
        finally:
            _stop(watcher)


class ServerOnDemand:
    """A server that is started when it is first asked, and stopped at the end of the context.

    One that failed to start is not started again; one that an answer failed at is, since it may have stopped.

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
        """Its address, inside the context.

        Raises:
            RacError: it cannot be started; where the body raises one and the server has stopped, its last lines are shown.
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
            raise RacError(
                f"vllm serve was not ready after {command.timeout:g} s; give it more with RAC_VLLM_TIMEOUT. {end_of(log)}"
            )
        if now - said > _SAY_EVERY:
            said = now
            logger.info(
                f"waiting for vllm serve ({now - started:.0f} s): {(last_lines(log, 1) or ['no output yet'])[0]}"
            )
        time.sleep(_LOOK_EVERY)
    if watcher.poll() is not None:  # another program answers at this port
        raise RacError(_stopped(watcher, log))


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(_HOST, port, timeout=5)  # urllib would ask a proxy
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stopped(watcher: subprocess.Popen[bytes], log: BinaryIO) -> str:
    return (
        f"vllm serve stopped with exit code {watcher.returncode}; its options (such as --max-model-len 8192) are set in "
        f"RAC_VLLM_OPTIONS. {end_of(log)}"
    )


def end_of(log: BinaryIO) -> str:
    """The last lines that a server printed, after its first error where these lack it."""
    lines = last_lines(log, _LAST_LINES)
    if not lines:
        return "It printed nothing"
    cause = first_error(log)
    advice = f"{_SEEDED_IN_PARTS_ADVICE}. " if _SEEDED_IN_PARTS in (cause or "") else ""
    named = "" if cause is None or cause in lines else f"Its first error:\n{cause}\n"
    return f"{advice}{named}Its last lines:\n" + "\n".join(lines)


def first_error(log: BinaryIO) -> str | None:
    """The first line that names an exception: vLLM's last lines may only say that a process of its own has failed."""
    start = os.pread(log.fileno(), _FIRST_BYTES, 0).decode("utf-8", "replace")
    return next((line.rstrip() for line in start.splitlines() if _ERROR.search(line)), None)


def last_lines(log: BinaryIO, count: int) -> list[str]:
    """The last non-empty lines of what was written to a file so far; the position for writing stays."""
    size = os.fstat(log.fileno()).st_size
    end = os.pread(log.fileno(), _LAST_BYTES, max(0, size - _LAST_BYTES))
    return [line.rstrip() for line in end.decode("utf-8", "replace").splitlines() if line.strip()][-count:]


def _stop(watcher: subprocess.Popen[bytes]) -> None:
    assert watcher.stdin is not None
    watcher.stdin.close()
    try:
        watcher.wait(2 * GRACE + 5)
    except subprocess.TimeoutExpired:
        logger.warning(f"vllm serve (watched by process {watcher.pid}) does not stop")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((_HOST, 0))
        return int(free.getsockname()[1])
