"""Check answers in worker processes, which are ended and replaced when an answer takes too long.

A model can write `9^{9^{9^9}}`. Evaluating that blocks inside C code, where no Python
timeout has an effect. The limit counts CPU time: a busy machine does not change a verdict.
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

SECONDS_PER_ANSWER = 5.0  # of CPU time
WORKERS = min(4, os.cpu_count() or 1)
_WALL_FACTOR = 12  # a worker that hangs without computing is ended by the clock, after 60 s
Check = Literal["mathematics", "reasoning-gym"]
# By check: the module that it needs, for what, and the extra that installs it.
_NEEDS: dict[Check, tuple[str, str, str]] = {
    "mathematics": ("math_verify", "comparing answers that are not plain integers", "eval"),
    "reasoning-gym": ("reasoning_gym", "scoring the answers of its tasks", "reasoning-gym"),
}
_lock = threading.Lock()  # of _pools
_main_lock = threading.Lock()  # of sys.modules["__main__"]
_pools: dict[Check, ProcessPool] = {}


def check_answer(check: Check, *arguments: str | int) -> bool:
    """Tell whether an answer is right; an answer whose check fails or takes too long is wrong.

    `arguments` are (answer, reference) for mathematics, else (answer, task, seed, size,
    index). May be called from any thread; up to `WORKERS` checks run at the same time.

    Raises:
        RacError: the module of the check is not installed, or cannot be imported.
    """
    seconds = SECONDS_PER_ANSWER
    for _ in range(2):  # a pool that lost an idle worker is broken: a new one is started
        pool = _pool(check)
        try:
            future = pool.schedule(
                _run, args=(check, arguments, seconds), timeout=seconds * _WALL_FACTOR
            )
        except RuntimeError:
            _discard(check, pool)
            continue
        try:
            return bool(_result(pool, future))
        except BrokenProcessPool:
            _discard(check, pool)
            continue
        except FutureTimeoutError:
            reason = f"no verdict within {seconds * _WALL_FACTOR:g} s"
        except ProcessExpired as error:
            slow = error.exitcode == -signal.SIGPROF
            reason = f"the checking process ended with code {error.exitcode}"
            reason = f"it takes over {seconds:g} s of CPU time" if slow else reason
        except Exception as error:
            reason = f"the check failed with {type(error).__name__}: {error}"
        logger.warning(f"the answer {str(arguments[0])[:60]!r} counts as wrong: {reason}")
        return False
    module = _NEEDS[check][0]
    raise RacError(f"{module} fails to start; see why with: {sys.executable} -c 'import {module}'")


def check_installed(check: Check) -> None:
    """Refuse before the first answer (RacError) a check whose package is not installed."""
    module, purpose, extra = _NEEDS[check]
    if importlib.util.find_spec(module) is None:
        name = module.replace("_", "-")
        raise RacError(f"{purpose} needs {name}; pip install 'rac-modifier[{extra}]'")


def _result(pool: ProcessPool, future: Future[bool]) -> bool:
    """Wait for a verdict; a pool that breaks does not end the futures of its waiting tasks."""
    while True:
        try:
            return future.result(timeout=1.0)
        except FutureTimeoutError:
            if future.done():
                return future.result()
            if not pool.active:
                raise BrokenProcessPool("the pool ended") from None


def _pool(check: Check) -> ProcessPool:
    with _lock:
        if check not in _pools:
            check_installed(check)
            _pools[check] = ProcessPool(
                WORKERS, initializer=_prepare, initargs=(_NEEDS[check][0],), context=_Context()
            )
        return _pools[check]


def _discard(check: Check, pool: ProcessPool) -> None:
    """End a broken pool, unless another thread has done so."""
    with _lock:
        if _pools.get(check) is not pool:
            return
        del _pools[check]
    pool.stop()
    pool.join()


@atexit.register  # else a worker that is just starting would print a traceback
def close() -> None:
    """End all worker processes."""
    for check, pool in list(_pools.items()):
        _discard(check, pool)


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


class _Context(SpawnContext):
    Process = _Process


def _prepare(module: str) -> None:
    """Silence a worker's standard error, and import the module before time counts."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    importlib.import_module(module)


def _run(check: Check, arguments: tuple[Any, ...], seconds: float) -> bool:
    """Run a check in a worker. The default action of SIGPROF ends the process anywhere."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return _equal(*arguments) if check == "mathematics" else _solves(*arguments)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _equal(answer: str, reference: str) -> bool:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # Boxed, so that both sides are read by the same rules: a bare "(1,2)" is not read at all.
    targets = [LatexExtractionConfig(), ExprExtractionConfig()]
    gold, guess = (
        parse(f"\\boxed{{{x}}}", targets, parsing_timeout=0) for x in (reference, answer)
    )
    return bool(verify(gold, guess, timeout_seconds=0))


def _solves(answer: str, task: str, seed: int, size: int, index: int) -> bool:
    data = _dataset(task, seed, size)
    return bool(data.score_answer(answer, data[index]) == 1.0)


@lru_cache(maxsize=8)
def _dataset(task: str, seed: int, size: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, seed=seed, size=size)
