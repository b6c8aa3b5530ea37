"""Check answers in worker processes, which are ended and replaced when an answer takes too long.

A model can write `9^{9^{9^9}}`. Evaluating that blocks inside C code, where no Python
timeout has an effect. The limit counts CPU time: a busy machine does not change a verdict.
"""

import importlib
import importlib.util
import math
import os
import signal
import sys
import threading
from functools import lru_cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from queue import LifoQueue
from types import ModuleType
from typing import Any, Literal

from loguru import logger

from rac_modifier.errors import RacError

SECONDS_PER_ANSWER = 5.0  # of CPU time
WORKERS = min(4, os.cpu_count() or 1)
_WALL_FACTOR = 12  # a worker that hangs without computing is ended by the clock, after 60 s
_SMALL = 1e-4  # math-verify rounds to six decimals, so that 2e-7 is equal to 1e-7
Check = Literal["mathematics", "reasoning-gym"]
# By check: the module that it needs, for what, and the extra that installs it.
_NEEDS: dict[Check, tuple[str, str, str]] = {
    "mathematics": ("math_verify", "comparing answers that are not plain integers", "eval"),
    "reasoning-gym": ("reasoning_gym", "scoring the answers of its tasks", "reasoning-gym"),
}
_main_lock = threading.Lock()  # of sys.modules["__main__"]


def check_answer(check: Check, *arguments: str | int) -> bool:
    """Tell whether an answer is right; one whose check fails or takes too long is wrong (RacError).

    `arguments`: (answer, reference) for mathematics, else (answer, task, seed, size, index).
    """
    check_installed(check)
    worker = _workers.get()
    try:
        reply = worker.ask(check, arguments)
    finally:
        _workers.put(worker)
    if isinstance(reply, bool):
        return reply
    logger.warning(f"the answer {str(arguments[0])[:60]!r} counts as wrong: {reply}")
    return False


def check_installed(check: Check) -> None:
    """Refuse before the first answer (RacError) a check whose package is not installed."""
    module, purpose, extra = _NEEDS[check]
    if importlib.util.find_spec(module) is None:
        name = module.replace("_", "-")
        raise RacError(f"{purpose} needs {name}; pip install 'rac-modifier[{extra}]'")


class _Process(SpawnProcess):
    """A process that does not import `__main__`: a user's script may lack a main guard."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802 - the name in multiprocessing
        with _main_lock:
            main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
            try:
                return SpawnProcess._Popen(process_obj)
            finally:
                sys.modules["__main__"] = main


class _Worker:
    """Checks one answer at a time, in a process that starts when it is needed."""

    _process: _Process | None = None

    def ask(self, check: Check, arguments: tuple[str | int, ...]) -> bool | str:
        """Return whether an answer is right, or why there is no verdict."""
        if self._process is None or not self._process.is_alive():
            self._pipe, pipe = Pipe()
            self._process = _Process(target=_work, args=(pipe,), daemon=True)
            self._process.start()
            pipe.close()
        seconds, replied = SECONDS_PER_ANSWER, False
        try:
            self._pipe.send((check, arguments, seconds))
            if error := self._pipe.recv():
                raise RacError(f"{_NEEDS[check][0]} cannot be imported ({error}); reinstall it")
            if not self._pipe.poll(seconds * _WALL_FACTOR):
                return f"no verdict within {seconds * _WALL_FACTOR:g} s"
            verdict: bool | str = self._pipe.recv()
            replied = True
            return verdict
        except (EOFError, OSError):
            self._process.join()
            if self._process.exitcode == -signal.SIGPROF:
                return f"it takes over {seconds:g} s of CPU time"
            return f"the checking process ended with code {self._process.exitcode}"
        finally:
            if not replied:
                self._process.kill()
                self._process.join()


_workers: LifoQueue[_Worker] = LifoQueue()  # the last one first: few checks start few processes
for _ in range(WORKERS):
    _workers.put(_Worker())


def _work(pipe: Connection) -> None:
    """Reply to each question: why its module cannot be imported, or None; then the verdict."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent ends it
    while True:
        check, arguments, seconds = pipe.recv()
        try:
            importlib.import_module(_NEEDS[check][0])  # before time counts
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
            return
        pipe.send(None)
        pipe.send(_verdict(check, arguments, seconds))


def _verdict(check: Check, arguments: tuple[Any, ...], seconds: float) -> bool | str:
    """Run a check. The default action of SIGPROF ends the process anywhere."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return _equal(*arguments) if check == "mathematics" else _solves(*arguments)
    except Exception as error:
        return f"the check failed with {type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _equal(answer: str, reference: str) -> bool:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # Boxed, so that both sides are read by the same rules: a bare "(1,2)" is not read at all.
    targets = [LatexExtractionConfig(), ExprExtractionConfig()]
    gold, guess = (
        parse(f"\\boxed{{{x}}}", targets, parsing_timeout=0) for x in (reference, answer)
    )
    return bool(verify(gold, guess, timeout_seconds=0)) and _alike(gold[0], guess[0])


def _alike(gold: Any, guess: Any) -> bool:
    """Tell whether two numbers that round to the same six decimals are the same in size too."""
    if not all(getattr(x, "is_number", False) and x.is_real for x in (gold, guess)):
        return True
    value, other = float(gold), float(guess)
    if abs(value) > _SMALL:
        return True
    percent = (1, 100, 0.01)  # 5 is equal to 5 %
    return any(math.isclose(value, factor * other, rel_tol=0.01) for factor in percent)


def _solves(answer: str, task: str, seed: int, size: int, index: int) -> bool:
    data = _dataset(task, seed, size)
    return bool(data.score_answer(answer, data[index]) == 1.0)


@lru_cache(maxsize=8)
def _dataset(task: str, seed: int, size: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, seed=seed, size=size)
