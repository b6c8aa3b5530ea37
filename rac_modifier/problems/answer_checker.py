"""Check answers in worker processes, which are ended and replaced when one answer takes too long.

A model can write `9^{9^{9^9}}`. Evaluating that blocks inside C code, where no Python timeout has an effect. So each check runs
in a process of a `pebble.ProcessPool`. The limit counts processor time: a busy machine does not change a verdict.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import os
import signal
import sys
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType
from typing import Any, Literal

from loguru import logger
from pebble import ProcessExpired, ProcessPool

from rac_modifier.errors import RacError

SECONDS_PER_ANSWER = 5.0  # of processor time
WORKERS = min(4, os.cpu_count() or 1)
_WALL_FACTOR = (
    12  # a worker that hangs without computing is ended after so many times the limit, by the clock
)
Check = Literal["mathematics", "reasoning-gym"]
# By check: the module that each worker imports before its first answer, what needs it, and the extra that installs it.
_NEEDS: dict[Check, tuple[str, str, str]] = {
    "mathematics": (
        "math_verify",
        "comparing answers that are not plain integers needs math-verify",
        "eval",
    ),
    "reasoning-gym": (
        "reasoning_gym",
        "scoring the answers of its tasks needs reasoning-gym",
        "reasoning-gym",
    ),
}
_lock = threading.Lock()  # of _pools
_main_lock = threading.Lock()  # of sys.modules["__main__"]
_pools: dict[Check, ProcessPool] = {}


def check_answer(check: Check, *arguments: str | int) -> bool:
    """Whether an answer passes; False, with the reason in the log, where the check fails or exceeds `SECONDS_PER_ANSWER`.

    May be called from any thread; up to `WORKERS` checks run at once.

    Args:
        check: "mathematics" compares (answer, reference), "reasoning-gym" scores (answer, task, seed, size, index).
        arguments: of the check.

    Raises:
        RacError: what the check needs is not installed, or cannot be imported.
    """
    for _ in range(2):  # a pool that lost an idle worker is broken: once, a new one is started
        pool = _pool(check)
        try:
            future = pool.schedule(
                _run,
                args=(check, arguments, SECONDS_PER_ANSWER),
                timeout=SECONDS_PER_ANSWER * _WALL_FACTOR,
            )
        except RuntimeError:
            _discard(check, pool)
            continue
        try:
            return bool(_result(pool, future))
        except BrokenProcessPool:
            _discard(check, pool)
        except FutureTimeoutError:
            return _not_right(
                arguments, f"no verdict within {SECONDS_PER_ANSWER * _WALL_FACTOR:g} s"
            )
        except ProcessExpired as error:
            if error.exitcode == -signal.SIGPROF:
                return _not_right(
                    arguments, f"it takes over {SECONDS_PER_ANSWER:g} s of processor time"
                )
            return _not_right(arguments, f"the checking process ended with code {error.exitcode}")
        except Exception as error:
            return _not_right(arguments, f"the check failed with {type(error).__name__}: {error}")
    module = _NEEDS[check][0]
    raise RacError(f"{module} fails to start; see why with: {sys.executable} -c 'import {module}'")


def check_installed(check: Check) -> None:
    """Refuse early what would fail at the first answer (RacError): the package that checks it is not installed."""
    module, why, extra = _NEEDS[check]
    if importlib.util.find_spec(module) is None:
        raise RacError(f"{why}; pip install 'rac-modifier[{extra}]'")


def _result(pool: ProcessPool, future: Future[bool]) -> bool:
    """Wait for a verdict; a pool that breaks does not end the futures of tasks that it has not looked at yet."""
    while True:
        try:
            return future.result(timeout=1.0)
        except FutureTimeoutError:
            if future.done():
                return future.result()
            if not pool.active:
                raise BrokenProcessPool("the pool ended") from None


def _not_right(arguments: tuple[str | int, ...], reason: str) -> bool:
    logger.warning(f"the answer {str(arguments[0])[:60]!r} counts as wrong: {reason}")
    return False


def _pool(check: Check) -> ProcessPool:
    with _lock:
        if check not in _pools:
            check_installed(check)
            module = _NEEDS[check][0]
            _pools[check] = ProcessPool(
                WORKERS, initializer=_prepare, initargs=(module,), context=_Context()
            )
        return _pools[check]


def _discard(check: Check, pool: ProcessPool) -> None:
    """End a pool that is broken, unless another thread has done so."""
    with _lock:
        if _pools.get(check) is not pool:
            return
        del _pools[check]
    pool.stop()
    pool.join()


def close() -> None:
    """End all worker processes."""
    for check, pool in list(_pools.items()):
        _discard(check, pool)


# Else a worker that is just starting would print a traceback, as the parent's semaphores are gone.
atexit.register(close)


class _Process(SpawnProcess):
    """A new process that does not import `__main__`: a user's script may have no `if __name__ == "__main__"`."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802 - the name in multiprocessing
        with _main_lock:
            main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
            try:
                return SpawnProcess._Popen(process_obj)
            finally:
                sys.modules["__main__"] = main


class _Context(SpawnContext):
    Process = _Process


def _prepare(module: str) -> None:
    """In a worker: import what checks, so that the time for that does not count against the first answer."""
    os.dup2(
        os.open(os.devnull, os.O_WRONLY), 2
    )  # standard error, for warnings about unreadable answers
    importlib.import_module(module)


def _run(check: Check, arguments: tuple[Any, ...], seconds: float) -> bool:
    """In a worker: one check. SIGPROF has its default action here, which ends the process wherever it is."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return _equal(*arguments) if check == "mathematics" else _solves(*arguments)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _equal(answer: str, reference: str) -> bool:
    """Whether two bare answers are the same mathematical object."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # Boxed, so that both sides are read by the same rules: a bare "(1,2)" or "\sqrt{2}" is not found at all.
    targets = [LatexExtractionConfig(), ExprExtractionConfig()]
    gold, guess = (
        parse(f"\\boxed{{{x}}}", targets, parsing_timeout=0) for x in (reference, answer)
    )
    return bool(verify(gold, guess, timeout_seconds=0))


def _solves(answer: str, task: str, seed: int, size: int, index: int) -> bool:
    """Whether reasoning-gym gives an answer to item `index` of a generated dataset its full score."""
    data = _dataset(task, seed, size)
    return bool(data.score_answer(answer, data[index]) == 1.0)


@lru_cache(maxsize=8)
def _dataset(task: str, seed: int, size: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, seed=seed, size=size)
