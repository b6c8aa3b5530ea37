"""Log lines of a long run without a terminal."""

import time

import pytest
from loguru import logger

from rac_modifier.runtime.progress import StepProgress


@pytest.fixture
def lines():
    texts: list[str] = []
    handler = logger.add(lambda message: texts.append(message.record["message"]), level="INFO")
    yield texts
    logger.remove(handler)


def test_a_run_logs_ten_lines_with_the_time_left(lines, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = StepProgress("recovery", 40)
    for number in range(40):
        now[0] += 3.0
        progress.step(f"loss {number}")
    assert len(lines) == 10
    assert lines[0] == "recovery: step 4 of 40, loss 3, about 01:48 left"
    assert lines[-1] == "recovery: step 40 of 40, loss 39, about 00:00 left"


def test_steps_of_an_earlier_run_say_nothing_about_the_time(lines, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = StepProgress("recovery", 10, first_step=8)
    now[0] = 5.0
    progress.step("loss 1")
    StepProgress("silent", 1, shown=False).step("loss 1")
    assert lines == ["recovery: step 9 of 10, loss 1, about 00:05 left"]
