"""What is checked, and worker processes that hang, die or take too long."""

import importlib.util
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from loguru import logger

from rac_modifier.errors import RacError
from rac_modifier.problems import answer_checker
from rac_modifier.problems.answer_checker import check_answer
from tests.problems import worker_state

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fresh_workers(monkeypatch):
    """One worker, started in this test and ended with it."""
    answer_checker.close()
    monkeypatch.setattr(answer_checker, "WORKERS", 1)
    yield
    answer_checker.close()


@pytest.fixture
def reasons():
    lines = []
    sink = logger.add(lines.append, format="{message}")
    yield lines
    logger.remove(sink)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("0.5", r"\frac{1}{2}", True),
        ("1,234", "1234", True),
        (r"\sqrt{8}", r"2\sqrt 2", True),
        ("(1,2)", "(1, 2)", True),
        ("x=5", "5", True),
        ("0.51", r"\frac{1}{2}", False),
        (r"\frac{1", "1", False),
        ("no", "yes", False),
        ("len('seventeen letters')", "17", False),  # code is not run
    ],
)
def test_mathematical_equality(answer, reference, expected):
    assert check_answer("mathematics", answer, reference) is expected


def test_reasoning_gym_scores_answers_of_its_tasks():
    import reasoning_gym

    item = reasoning_gym.create_dataset("chain_sum", seed=3, size=5)[2]
    assert check_answer("reasoning-gym", str(item["answer"]), "chain_sum", 3, 5, 2)
    assert not check_answer("reasoning-gym", "no number", "chain_sum", 3, 5, 2)


@pytest.mark.parametrize(
    ("check", "extra"), [("mathematics", "eval"), ("reasoning-gym", "reasoning-gym")]
)
def test_the_error_names_the_extra_to_install(fresh_workers, monkeypatch, check, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RacError, match=rf"pip install 'rac-modifier\[{extra}\]'"):
        check_answer(check, "0.5", "1/2")


def test_a_broken_math_verify_is_an_error_not_a_wrong_answer(fresh_workers, tmp_path, monkeypatch):
    """Mathematics does not need reasoning-gym, which is broken too."""
    (tmp_path / "reasoning_gym.py").write_text("raise ImportError('broken on purpose')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert check_answer("mathematics", "0.5", "1/2")
    answer_checker.close()
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken on purpose')\n")
    with pytest.raises(RacError, match="math_verify fails to start; see why with"):
        check_answer("mathematics", "0.5", "1/2")


def test_a_script_without_a_main_guard_is_not_run_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "print('runs')\n"
        "from rac_modifier.problems.answer_checker import check_answer\n"
        "print(check_answer('mathematics', '0.5', '1/2'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment
    )
    assert ended.stdout.splitlines() == ["runs", "True"]
    assert ended.stderr == ""


def test_a_worker_that_is_slow_dies_hangs_or_fails_counts_as_wrong(
    fresh_workers, monkeypatch, reasons
):
    """The next answer is checked. The limit is of CPU time, so a busy machine changes nothing."""
    monkeypatch.setattr(answer_checker, "_WALL_FACTOR", 10_000)
    monkeypatch.setattr(answer_checker, "SECONDS_PER_ANSWER", 0.5)
    assert not check_answer("mathematics", "9^{9^{9^9}}", "1")
    assert "counts as wrong: it takes over 0.5 s of CPU time" in reasons.pop()
    pool = answer_checker._pool("mathematics")
    schedule = pool.schedule
    for inside, arguments, reason in [
        (worker_state.die, (7,), "the checking process ended with code 7"),
        (worker_state.die_by_signal, (), "the checking process ended with code -9"),
        (int, ("x",), "the check failed with ValueError: invalid literal"),
        (worker_state.hang, (), "no verdict within 0.6 s"),  # it uses no CPU time
    ]:

        def instead(function, args, timeout, inside=inside, arguments=arguments):
            return schedule(inside, arguments, timeout=timeout)

        if inside is worker_state.hang:
            monkeypatch.setattr(answer_checker, "_WALL_FACTOR", 1.2)
        monkeypatch.setattr(pool, "schedule", instead)
        assert not check_answer("mathematics", "0.5", "1/2")
        assert reason in reasons.pop()
    monkeypatch.setattr(pool, "schedule", schedule)
    monkeypatch.setattr(answer_checker, "_WALL_FACTOR", 10_000)
    assert check_answer("mathematics", "0.5", "1/2")


def test_a_pool_whose_idle_workers_were_killed_is_replaced(fresh_workers):
    """Also if several threads notice it together."""
    assert check_answer("mathematics", "0.5", "1/2")
    pool = answer_checker._pool("mathematics")
    for process in list(pool._pool_manager.worker_manager.workers.values()):
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    with ThreadPoolExecutor(4) as threads:
        checks = threads.map(
            lambda i: check_answer("mathematics", f"{i}/4", f"{i * 0.25}"), range(1, 9)
        )
        assert all(checks)
    assert answer_checker._pool("mathematics") is not pool
