"""What is checked, and what the worker processes import. Workers that hang or die: test_lost_workers.py."""

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rac_modifier.errors import RacError
from rac_modifier.problems import answer_checker
from rac_modifier.problems.answer_checker import check_answer
from tests.problems import worker_state

ROOT = Path(__file__).parents[2]


def shadow(module, folder, monkeypatch):
    """Make a module that cannot be imported, here and in processes that are started from now on."""
    (folder / f"{module}.py").write_text("raise ImportError('broken on purpose')\n")
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("0.5", r"\frac{1}{2}", True),
        (r"\frac{2}{4}", "1/2", True),
        ("1,234", "1234", True),
        (r"\sqrt{8}", r"2\sqrt 2", True),
        ("(1,2)", "(1, 2)", True),
        ("x=5", "5", True),
        ("0.51", r"\frac{1}{2}", False),
        (r"\frac{1", "1", False),
        ("\\]}{ nonsense", "1", False),
        ("no", "yes", False),
        ("len('seventeen letters')", "17", False),  # code is not run
    ],
)
def test_mathematical_equality(answer, reference, expected):
    assert check_answer("mathematics", answer, reference) is expected


def test_from_threads_that_may_set_no_signal_handler():
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(check_answer("mathematics", "0.5", "1/2")))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 3


def test_mathematics_is_checked_without_the_reasoning_gym_extra(
    fresh_workers, tmp_path, monkeypatch
):
    """Each worker imports what its own check needs, before the first answer, and nothing that another check needs."""
    shadow("reasoning_gym", tmp_path, monkeypatch)
    schedule = answer_checker._pool("mathematics").schedule
    assert schedule(worker_state.is_imported, ("math_verify",)).result()
    assert not schedule(worker_state.is_imported, ("reasoning_gym",)).result()
    assert not schedule(worker_state.is_imported, ("torch",)).result()
    assert check_answer("mathematics", "0.5", "1/2")


def test_reasoning_gym_is_imported_before_it_scores_answers_of_its_own(fresh_workers):
    import reasoning_gym

    schedule = answer_checker._pool("reasoning-gym").schedule
    assert schedule(worker_state.is_imported, ("reasoning_gym",)).result()
    assert not schedule(worker_state.is_imported, ("math_verify",)).result()
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
    shadow("math_verify", tmp_path, monkeypatch)
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
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment
    )
    assert done.stdout.splitlines() == ["runs", "True"]
    assert done.stderr == ""
