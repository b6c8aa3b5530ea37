"""`vllm serve` as a process of its own, for the tests that ask a real server."""

import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from rac_modifier.sampling.own_server import VllmCommand, on_few_cores

VLLM = os.environ.get("RAC_VLLM") or shutil.which("vllm")
NEEDS_SERVER = [
    pytest.mark.slow,
    pytest.mark.skipif(VLLM is None, reason="no `vllm` on the PATH; name one with RAC_VLLM"),
]
_OPTIONS = ("--max-model-len", "1024", "--gpu-memory-utilization", "0.3", "--enforce-eager")


def served(model: Path, log: Path, *options: str) -> AbstractContextManager[str]:
    """The address of a server of `model` on loopback; its output goes to the file `log`.

    `options` are further ones of `vllm serve`.
    """
    command = VllmCommand(str(VLLM), (*_OPTIONS, *options), timeout=600)
    variables = {**on_few_cores(), "OMP_WAIT_POLICY": "PASSIVE"}
    return command.serve(str(model), "float32", log=log, variables=variables)
