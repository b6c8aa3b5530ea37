"""Start a server on loopback, wait for it, and stop it, also when this process is killed."""

from __future__ import annotations

import http.client
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import psutil
from loguru import logger

from rac_modifier.errors import RacError, refusing

HOST = "127.0.0.1"
_LOOK_EVERY = 0.2  # seconds
# The error of a worker comes before that of the server.
_LAST_LINES, _FEW_LINES, _LAST_BYTES = 100, 20, 1 << 16
_FEW_CORES, _BINDING = 4, "VLLM_CPU_OMP_THREADS_BIND"
_PARALLEL = ("-tp", "-pp", "-dp", "--tensor-parallel", "--pipeline-parallel", "--data-parallel")
_MEMORY = {"--gpu-memory-utilization", "--kv-cache-memory-bytes"}
_ERROR = re.compile(r"(?:^|\] )[\w.]*(?:Error|Exception): ")  # the last line of a traceback
_WATCHER = Path(__file__).with_name("server_watch.py")


@dataclass(frozen=True)
class VllmCommand:
    """The path of a `vllm` command, its options, and the seconds until it must be ready."""

    path: str
    options: tuple[str, ...] = ()
    timeout: float = 1800.0

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> VllmCommand:
        """Read RAC_VLLM (else `vllm` on the PATH) and RAC_VLLM_OPTIONS."""
        named = variables.get("RAC_VLLM")
        path = shutil.which(named or "vllm", path=variables.get("PATH"))
        if path is None:
            problem = f"RAC_VLLM={named!r} is no command" if named else "no vllm on the PATH"
            raise RacError(
                f"{problem}; install it in an environment of its own (scripts/serve_cpu_env.sh "
                "does, for a CPU), and name it with RAC_VLLM=/path/to/environment/bin/vllm"
            )
        with refusing("RAC_VLLM_OPTIONS cannot be read", "write them as for a shell", ValueError):
            return cls(path, tuple(shlex.split(variables.get("RAC_VLLM_OPTIONS", ""))))

    def arguments(self, model: str, dtype: str, longest: int | None = None) -> list[str]:
        """Return the command line, which ends where its port follows; `longest` as of `serve`."""
        command = [self.path, "serve", model, "--host", HOST, "--dtype", dtype]
        names = {option.split("=")[0].replace("--no-", "--") for option in self.options}
        # On a CPU, vLLM 0.32 fails if it reads the prompt of a request with a seed in chunks.
        is_cpu_build = (self.version_of("vllm") or "").endswith("+cpu")
        if "--enable-chunked-prefill" not in names and is_cpu_build:
            command.append("--no-enable-chunked-prefill")
            # Then it warms up on a prompt of --max-model-len tokens: 32,768 take ten minutes.
            if longest is not None and "--max-model-len" not in names:
                command += ["--max-model-len", str(longest)]
        # It also wants 92 % of the memory, and fails where other programs have some.
        cached = "VLLM_CPU_KVCACHE_SPACE" in os.environ
        if is_cpu_build and not cached and names.isdisjoint(_MEMORY):
            memory = psutil.virtual_memory()
            share = 0.8 * memory.available / memory.total
            command += ["--gpu-memory-utilization", f"{share:.2f}"]
        return [*command, *self.options, "--port"]

    def python(self) -> Path | None:
        """Return the python of the command's environment; None if it is not next to the command."""
        python = Path(self.path).parent / "python"
        return python if python.exists() else None

    def version_of(self, package: str) -> str | None:
        """Return the version of a package in the command's environment; None if it lacks it."""
        if (python := self.python()) is None:
            return None
        code = f"from importlib.metadata import version; print(version({package!r}))"
        command = [str(python), "-I", "-c", code]
        answer = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        return answer.stdout.strip() if answer.returncode == 0 else None

    def environment(self) -> dict[str, str]:
        """Return this process's variables; PYTHONPATH is not for another environment."""
        variables = {"VLLM_NO_USAGE_STATS": "1", **os.environ}
        if Path(self.path).parent != Path(sys.executable).parent:
            variables.pop("PYTHONPATH", None)
        return variables

    def _binding(self) -> dict[str, str]:
        """Return the cores of a vLLM for CPUs on a small machine: all; its "auto" leaves one out.

        Several processes (`_PARALLEL`) need their cores apart.
        """
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) > _FEW_CORES or any(o.startswith(_PARALLEL) for o in self.options):
            return {}
        return {_BINDING: ",".join(map(str, cores))}

    def check_plugin(self) -> None:
        """Refuse an environment without this package, before hours of work (RacError)."""
        if self.python() is not None and self.version_of("rac-modifier") is None:
            raise RacError(
                f"the environment of {self.path} lacks rac-modifier, whose plugin reads packed "
                f"checkpoints; {self.python()} -m pip install 'rac-modifier[serve]'"
            )

    @contextmanager
    def serve(
        self,
        model: str,
        dtype: str = "auto",
        *,
        longest: int | None = None,
        log: Path | None = None,
        variables: dict[str, str] | None = None,
    ) -> Iterator[str]:
        """Run `vllm serve` in the context, and yield its address; `dtype` as vLLM names it.

        `longest` is the most tokens of a prompt and its answer; None: the model's context.
        `variables` are further ones of its environment. RacError as `running_server`.
        """
        command = self.arguments(model, dtype, longest)
        environment = self._binding() | self.environment() | (variables or {})
        with running_server(command, environment, log=log, timeout=self.timeout) as server:
            yield server.url


def on_few_cores() -> dict[str, str]:
    """Return variables for vLLM on a small machine: 1 GB of cache, and all cores."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    return {"VLLM_CPU_KVCACHE_SPACE": "1", _BINDING: cores}


class _RunningServer(NamedTuple):
    """The address of a server, and the process `server_watch`, of which it is a child."""

    url: str
    pid: int


@contextmanager
def running_server(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    log: Path | None = None,
    timeout: float = 1800.0,
) -> Iterator[_RunningServer]:
    """Run a command, which a free port is appended to, in the context; `log` gets its output.

    It ends with the context, and with this process (see `server_watch`). RacError, with its last
    lines, if it stops or does not answer /health within `timeout` seconds.
    """
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = int(free.getsockname()[1])
    name = " ".join([Path(command[0]).name, *command[1:2]])
    with tempfile.TemporaryFile() if log is None else log.open("w+b") as output:
        logger.info(f"starting {' '.join(command[:3])} on http://{HOST}:{port}")
        watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_WATCHER), *command, str(port)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is for this process, which then stops the server
        )
        try:
            started = time.monotonic()
            while watcher.poll() is None and not _is_healthy(port):
                if time.monotonic() - started > timeout:
                    raise RacError(f"{name} was not ready after {timeout:g} s. {_end_of(output)}")
                time.sleep(_LOOK_EVERY)
            if watcher.poll() is not None:  # also if another program answers at this port
                raise RacError(_stopped(name, watcher, output))
            logger.info(f"{name} is ready after {time.monotonic() - started:.0f} s")
            try:
                yield _RunningServer(f"http://{HOST}:{port}", watcher.pid)
            except RacError as error:
                if watcher.poll() is None:
                    raise
                raise RacError(f"{error}. {_stopped(name, watcher, output)}") from error
        finally:
            assert watcher.stdin is not None
            watcher.stdin.close()
            watcher.wait()


def _is_healthy(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # asks no proxy
    try:
        with opener.open(f"http://{HOST}:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def _stopped(name: str, watcher: subprocess.Popen[bytes], log: BinaryIO) -> str:
    options = "; its options (such as --max-model-len 8192) are set in RAC_VLLM_OPTIONS"
    hint = options if name == "vllm serve" else ""
    return f"{name} stopped with exit code {watcher.returncode}{hint}. {_end_of(log)}"


def _end_of(log: BinaryIO) -> str:
    """Describe the first error and the last lines of a server; the position for writing stays."""
    size = os.fstat(log.fileno()).st_size
    lines = _lines(log, max(0, size - _LAST_BYTES))[-_LAST_LINES:]
    if not lines:
        return "It printed nothing"
    # what follows the first error is often only how the other processes ended
    errors = (line for line in _lines(log, 0) if _ERROR.search(line))
    if (first := next(errors, None)) is not None and first not in lines[-_FEW_LINES:]:
        return "\n".join(["Its first error:", first, "Its last lines:", *lines[-_FEW_LINES:]])
    return "Its last lines:\n" + "\n".join(lines)


def _lines(log: BinaryIO, start: int) -> list[str]:
    """Return the lines with text among `_LAST_BYTES` of a log."""
    text = os.pread(log.fileno(), _LAST_BYTES, start).decode("utf-8", "replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()]
