"""The side file of failed problems."""

import os

import pytest

from rac_modifier.errors import RacError
from rac_modifier.traces.failures import (
    FailedProblem,
    append_failures,
    failures_path,
    forget_failures,
    read_failures,
)


def test_failures_come_back_and_a_torn_line_does_not(tmp_path):
    store = tmp_path / "s.jsonl"
    assert read_failures(store) == []
    one, two = FailedProblem("a#0", "1+1?", "why"), FailedProblem("b#0", "ü", "wegen")
    append_failures(store, [one])
    with failures_path(store).open("ab") as file:
        file.write(b'{"id": "x')
    assert read_failures(store) == [one]
    append_failures(store, [two])
    assert read_failures(store) == [one, two]
    forget_failures(store)
    assert read_failures(store) == []
    failures_path(store).write_text("notes\n")
    with pytest.raises(RacError, match="not a list of failed problems"):
        read_failures(store)


def test_nothing_is_lost_silently(tmp_path, monkeypatch):
    def fail(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        RacError, match=r"s\.failed\.jsonl' cannot be written: .*make room, then run again"
    ):
        append_failures(tmp_path / "s.jsonl", [FailedProblem("a#0", "1+1?", "why")])


def test_a_file_that_cannot_be_read_is_no_empty_one(tmp_path):
    failures_path(tmp_path / "s.jsonl").mkdir()
    with pytest.raises(RacError, match="is a folder; name a regular file"):
        read_failures(tmp_path / "s.jsonl")
