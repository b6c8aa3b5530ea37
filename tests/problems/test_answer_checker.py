"""What is checked, and worker processes that hang, die or take too long."""

import importlib.util
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import LifoQueue

import pytest
from loguru import logger

from rac_modifier.errors import RacError
from rac_modifier.problems import answer_checker
from rac_modifier.problems.answer_checker import check_answer

ROOT = Path(__file__).parents[2]
FAKE = """
import os, signal, threading
LatexExtractionConfig = ExprExtractionConfig = object
def parse(text, targets, parsing_timeout):
    if "die" in text:
        os._exit(7)
    if "killed" in text:
        os.kill(os.getpid(), signal.SIGKILL)
    if "hang" in text:
        threading.Event().wait()  # without computing
    return [int(text[len("\\\\boxed{"):-1])]
def verify(gold, guess, timeout_seconds):
    return gold == guess
"""


@pytest.fixture
def worker(monkeypatch):
    """One worker, started in this test and ended with it."""
    worker = answer_checker._Worker()
    workers = LifoQueue()
    workers.put(worker)
    monkeypatch.setattr(answer_checker, "_workers", workers)
    yield worker
    if worker._process is not None:
        worker._process.kill()


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
        ("(1,2)", "(1, 2)", True),
        ("0.51", r"\frac{1}{2}", False),
        (r"\frac{1", "1", False),
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


def test_a_package_that_is_missing_or_broken_is_an_error_not_a_wrong_answer(
    worker, tmp_path, monkeypatch
):
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken on purpose')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RacError, match=r"math_verify cannot be imported \(ImportError: broken on"):
        check_answer("mathematics", "0.5", "1/2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for check, extra in (("mathematics", "eval"), ("reasoning-gym", "reasoning-gym")):
        with pytest.raises(RacError, match=rf"pip install 'rac-modifier\[{extra}\]'"):
            check_answer(check, "0.5", "1/2")


def test_a_script_without_a_main_guard_is_not_run_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "print('runs')\n"
        "from rac_modifier.problems.answer_checker import check_answer\n"
        "print(check_answer('mathematics', '0.5', '1/2'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.stdout.splitlines() == ["runs", "True"]
    assert ended.stderr == ""


def test_a_worker_that_is_slow_counts_as_wrong_and_an_idle_one_that_was_killed_is_replaced(
    worker, monkeypatch, reasons
):
    """The limit is of CPU time, so a busy machine changes nothing."""
    monkeypatch.setattr(answer_checker, "_WALL_FACTOR", 10_000)
    monkeypatch.setattr(answer_checker, "SECONDS_PER_ANSWER", 0.5)
    assert not check_answer("mathematics", "9^{9^{9^9}}", "1")
    assert "counts as wrong: it takes over 0.5 s of CPU time" in reasons.pop()
    assert check_answer("mathematics", "0.5", "1/2")
    os.kill(worker._process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker._process.pid, os.WEXITED | os.WNOWAIT)
    with ThreadPoolExecutor(4) as threads:
        checks = threads.map(
            lambda i: check_answer("mathematics", f"{i}/4", f"{i * 0.25}"), range(1, 9)
        )
        assert all(checks)
    assert not reasons


def test_a_worker_that_dies_hangs_or_fails_counts_as_wrong(worker, monkeypatch, tmp_path, reasons):
    (tmp_path / "math_verify.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert check_answer("mathematics", "5", "5")
    for answer, reason in [
        ("die", "the checking process ended with code 7"),
        ("killed", "the checking process ended with code -9"),
        ("x", "the check failed with ValueError: invalid literal"),
        ("hang", "no verdict within 1 s"),
    ]:
        if answer == "hang":
            monkeypatch.setattr(answer_checker, "_WALL_FACTOR", 0.2)
        assert not check_answer("mathematics", answer, "5")
        assert reason in reasons.pop()
    assert check_answer("mathematics", "5", "5")
