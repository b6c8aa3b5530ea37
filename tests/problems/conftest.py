"""Worker processes of a test's own."""

import pytest

from rac_modifier.problems import answer_checker


@pytest.fixture
def fresh_workers(monkeypatch):
    """One worker, started in this test and ended with it."""
    answer_checker.close()
    monkeypatch.setattr(answer_checker, "WORKERS", 1)
    yield
    answer_checker.close()
