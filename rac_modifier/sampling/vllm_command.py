"""The command `vllm serve`: its options, and the packages of its environment."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from rac_modifier.errors import RacError

HOST = "127.0.0.1"


@dataclass(frozen=True)
class VllmCommand:
    """A `vllm` command with its options.

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
        """Read RAC_VLLM (else `vllm` on the PATH) and RAC_VLLM_OPTIONS.

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
                "no vllm on the PATH; install it in an environment of its own "
                "(scripts/serve_cpu_env.sh does, for a CPU), and name it with "
                "RAC_VLLM=/path/to/environment/bin/vllm"
            )
        try:
            options = tuple(shlex.split(variables.get("RAC_VLLM_OPTIONS", "")))
        except ValueError as error:
            raise RacError(
                f"RAC_VLLM_OPTIONS={variables['RAC_VLLM_OPTIONS']!r}: {error}; write it as for a shell"
            ) from error
        return cls(path, options)

    def arguments(self, model: str, dtype: str, port: int) -> list[str]:
        """Return the whole command line."""
        where = ["--host", HOST, "--port", str(port)]
        asked = self._sets("quantization") or any(
            option.split("=")[0] == "-q" for option in self.options
        )
        ours = ["--quantization", "rac"] if _has_few_bits(model) and not asked else []
        # On a CPU, vLLM 0.32 fails if it reads the prompt of a request with a seed in chunks.
        parted = self._sets("enable-chunked-prefill") or not self.is_cpu_build()
        whole = [] if parted else ["--no-enable-chunked-prefill"]
        return [self.path, "serve", model, *where, "--dtype", dtype, *ours, *whole, *self.options]

    def is_cpu_build(self) -> bool:
        """Tell by its version whether vLLM computes on the CPU; False without `python()`."""
        return (self.version_of("vllm") or "").endswith("+cpu")

    def python(self) -> Path | None:
        """Return the python of the command's environment; None if it is not next to the command."""
        python = Path(self.path).parent / "python"
        return python if python.exists() else None

    def version_of(self, package: str) -> str | None:
        """Return the version of a package in the command's environment; None if it lacks it."""
        if (python := self.python()) is None:
            return None
        question = [
            str(python),
            "-I",
            "-c",
            f"from importlib.metadata import version; print(version({package!r}))",
        ]
        answer = subprocess.run(
            question, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        return answer.stdout.strip() if answer.returncode == 0 else None

    def _sets(self, name: str) -> bool:
        """Tell whether an option or its negation is among the user's."""
        return any(option.split("=")[0] in (f"--{name}", f"--no-{name}") for option in self.options)

    def environment(self) -> dict[str, str]:
        """Return this process's variables; PYTHONPATH is not for vLLM's environment."""
        own = Path(self.path).parent == Path(sys.executable).parent
        variables = {
            name: value for name, value in os.environ.items() if own or name != "PYTHONPATH"
        }
        return {"VLLM_NO_USAGE_STATS": "1", **variables}


def _has_few_bits(model: str) -> bool:
    """Tell whether a folder has weights of 2 or 3 bits, for which vLLM has no CPU kernel."""
    try:
        groups = json.loads((Path(model) / "config.json").read_text())["quantization_config"][
            "config_groups"
        ]
        return any(group["weights"]["num_bits"] in (2, 3) for group in groups.values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False  # no folder, or vLLM says what is wrong with it


def check_serving() -> None:
    """Refuse a missing vLLM, or an environment without this package, before hours of work (RacError)."""
    command = VllmCommand.from_environment()
    if command.python() is None:
        logger.info(
            f"{command.path} has no python next to it: whether it has rac-modifier is unknown"
        )
    elif command.version_of("rac-modifier") is None:
        raise RacError(
            f"the environment of {command.path} lacks rac-modifier, whose plugin reads packed "
            f"checkpoints; {command.python()} -m pip install 'rac-modifier[serve]'"
        )
