"""Processes that check answers and may be lost: started at first use, replaced when an answer was too much for one."""

from __future__ import annotations

import atexit
import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Literal

from rac_modifier.errors import RacError
from rac_modifier.problems.worker import READY

SECONDS_PER_ANSWER = 5.0
Check = Literal["mathematics", "reasoning-gym"]
_NEEDS = {
    "mathematics": ("math_verify", "comparing answers that are not plain integers needs math-verify", "eval"),
    "reasoning-gym": ("reasoning_gym", "scoring the answers of its tasks needs reasoning-gym", "reasoning-gym"),
}
_lock = threading.Lock()
_idle: dict[Check, list[subprocess.Popen[str]]] = {}


def ask(check: Check, *arguments: str | int) -> bool:
    """What `worker.py` says to this check; False if it cannot tell within `SECONDS_PER_ANSWER` of processor time.

    From any thread: each call has a process to itself, so as many run as there are threads that ask at once.

    Raises:
        RacError: what the check needs is not installed, or broken.
    """
    process = _take(check)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(arguments) + "\n")
        process.stdin.flush()
        reply = process.stdout.readline()
    except BrokenPipeError:
        reply = ""
    except BaseException:
        _end(process)  # an interrupted one would give this reply to the next question
        raise
    if not reply:
        _end(process)
        return False
    with _lock:
        _idle.setdefault(check, []).append(process)
    return bool(json.loads(reply))


def _take(check: Check) -> subprocess.Popen[str]:
    with _lock:
        while idle := _idle.get(check):
            process = idle.pop()
            if process.poll() is None:
                return process
    return _start(check)


def _start(check: Check) -> subprocess.Popen[str]:
    module, why, extra = _NEEDS[check]
    if importlib.util.find_spec(module) is None:
        raise RacError(f"{why}; pip install 'rac-modifier[{extra}]'")
    # -P: the script's own folder must not shadow other modules.
    process = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).with_name("worker.py")), check, str(SECONDS_PER_ANSWER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    )
    assert process.stdout is not None
    if process.stdout.readline() != READY:
        raise RacError(f"{module} fails to start; see why with: {sys.executable} -c 'import {module}'")
    return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def close() -> None:
    """End the processes that wait for a question."""
    with _lock:
        for process in (process for idle in _idle.values() for process in idle):
            _end(process)
        _idle.clear()


atexit.register(close)
