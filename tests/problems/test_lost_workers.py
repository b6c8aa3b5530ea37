"""Worker processes that hang, die or take too long: the answer counts as wrong, and the next one is checked."""

import os
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest
from loguru import logger

from rac_modifier.problems import answer_checker
from rac_modifier.problems.answer_checker import check_answer
from tests.problems import worker_state


@pytest.fixture
def reasons():
    lines = []
    sink = logger.add(lines.append, format="{message}")
    yield lines
    logger.remove(sink)


def test_an_answer_too_large_to_evaluate_is_wrong_and_the_next_is_checked(
    fresh_workers, monkeypatch, reasons
):
    monkeypatch.setattr(answer_checker, "SECONDS_PER_ANSWER", 0.5)
    monkeypatch.setattr(answer_checker, "_WALL_FACTOR", 10_000)  # a busy machine
    assert not check_answer("mathematics", "9^{9^{9^9}}", "1")
    assert reasons == [
        "the answer '9^{9^{9^9}}' counts as wrong: it takes over 0.5 s of processor time\n"
    ]
    assert check_answer("mathematics", "0.5", "1/2")


def test_a_worker_that_dies_hangs_or_fails_counts_as_wrong(fresh_workers, monkeypatch, reasons):
    pool = answer_checker._pool("mathematics")
    assert check_answer("mathematics", "0.5", "1/2")
    schedule = pool.schedule
    for inside, arguments, reason in [
        (worker_state.die, (7,), "the checking process ended with code 7"),
        (worker_state.die_by_signal, (), "the checking process ended with code -9"),
        (worker_state.hang, (), "no verdict within 0.6 s"),  # it uses no CPU time
        (int, ("x",), "the check failed with ValueError: invalid literal"),
    ]:

        def instead(function, args, timeout, inside=inside, arguments=arguments):
            return schedule(inside, arguments, timeout=timeout)

        seconds = 0.05 if inside is worker_state.hang else 5.0
        monkeypatch.setattr(answer_checker, "SECONDS_PER_ANSWER", seconds)
        monkeypatch.setattr(pool, "schedule", instead)
        assert not check_answer("mathematics", "0.5", "1/2")
        assert reason in reasons.pop()
    monkeypatch.setattr(pool, "schedule", schedule)
    monkeypatch.setattr(answer_checker, "SECONDS_PER_ANSWER", 5.0)
    assert check_answer("mathematics", "0.5", "1/2")
    assert reasons == []


def test_a_pool_whose_idle_workers_were_killed_is_replaced_once(fresh_workers):
    """Also where several threads notice it together."""
    assert check_answer("mathematics", "0.5", "1/2")
    pool = answer_checker._pool("mathematics")
    for process in list(pool._pool_manager.worker_manager.workers.values()):
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    with ThreadPoolExecutor(4) as threads:
        assert all(
            threads.map(lambda i: check_answer("mathematics", f"{i}/4", f"{i * 0.25}"), range(1, 9))
        )
    assert answer_checker._pool("mathematics") is not pool


def test_a_task_that_a_broken_pool_forgot_is_not_waited_for():
    class Pool:
        active = False

    with pytest.raises(BrokenProcessPool):
        answer_checker._result(Pool(), Future())
    finished_late = Future()
    finished_late.set_result(True)
    assert answer_checker._result(Pool(), finished_late)
