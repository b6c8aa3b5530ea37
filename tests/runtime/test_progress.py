"""Log lines of a long run without a terminal."""

import os
import pty
import sys
import time

import pytest
from loguru import logger

from rac_modifier.runtime import progress
from rac_modifier.runtime.progress import Phase, report_running


@pytest.fixture
def lines():
    texts: list[str] = []
    handler = logger.add(lambda message: texts.append(message.record["message"]), level="INFO")
    yield texts
    logger.remove(handler)


@pytest.fixture
def now(monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    return seconds


def test_the_innermost_phase_is_reported_with_the_time_left(lines, now):
    with Phase("calibrating"):
        with Phase("pruning", 40, unit="modules") as phase:
            now[0] = 30.0
            report_running()  # the first module is not finished
            phase.advance("q_proj")
            phase.advance("k_proj")
            now[0] = 60.0
            report_running()
        report_running()
    report_running()
    assert lines == [
        "pruning: 0 of 40 modules, 00:30 so far",
        "pruning: 2 of 40 modules, k_proj, about 19:00 left",
        "calibrating: 01:00 so far",
    ]


def test_steps_of_an_earlier_run_say_nothing_about_the_time(lines, now):
    with Phase("recovery", 10, done=8) as phase:
        now[0] = 5.0
        phase.advance("loss 1")
        report_running()
        with Phase("silent", 1, shown=False):
            report_running()
    assert lines == ["recovery: 9 of 10 steps, loss 1, about 00:05 left"]


def test_a_phase_of_30_seconds_logs_its_last_step(lines, now):
    for seconds in (29.0, 30.0):
        with Phase("pruning", 1, unit="modules") as phase:
            now[0] += seconds
            phase.advance("q_proj")
    assert lines == ["pruning: 1 of 1 modules, q_proj, about 00:00 left"]


def test_a_phase_that_an_error_left_open_ends_with_the_one_around_it(lines, now):
    with Phase("this command"):
        calibrating = Phase("calibrating")
        Phase("pruning", 3)
        calibrating.close()
        report_running()
    report_running()
    assert lines == ["this command: 00:00 so far"]


def test_the_thread_reports_every_30_seconds(lines, now):
    def sleep(seconds):
        now[0] += seconds
        if now[0] > 90.0:
            raise SystemExit

    with Phase("forecast"), pytest.raises(SystemExit):
        progress._report_for_ever(sleep)
    assert lines == [f"forecast: {t} so far" for t in ("00:30", "01:00", "01:30")]


@pytest.mark.parametrize(("columns", "logged"), [(80, 0), (0, 1)])
def test_a_terminal_without_width_gets_lines(columns, logged, lines, now, monkeypatch):
    import fcntl
    import struct
    import termios

    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(terminal, "w") as errors, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", errors)
        with Phase("pruning", 4) as phase:
            phase.advance("q_proj")
            report_running()
    os.close(ours)
    assert len(lines) == logged
