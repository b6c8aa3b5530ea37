from __future__ import annotations

from rac_modifier.kernels.cpu import examine, library
from tests.kernels.cpu.kernel_helpers import take


def test_without_a_library_it_is_missing(monkeypatch):
    monkeypatch.setattr(library, "built_libraries", lambda: [])
    (found,) = examine.examine_library()
    assert (found.name, found.status) == ("compiled library", "missing")
    assert "run dense" in found.detail


def test_a_library_that_does_not_load_is_broken(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "built_libraries", lambda: [tmp_path / "x.so"])
    monkeypatch.setattr(library, "load", lambda: (None, "built for another version"))
    (found,) = examine.examine_library()
    assert (found.status, found.detail) == ("broken", "built for another version")


def test_an_instruction_set_that_is_not_there_is_broken_with_its_mend(monkeypatch, native_path):
    take(native_path, None, monkeypatch)
    assert [f.status for f in examine.examine_library()] == ["ok", "ok", "ok"]
    take(native_path, "no-such-set", monkeypatch)
    last = examine.examine_library()[-1]
    assert (last.status, last.mend) == ("broken", "unset RAC_KERNEL")
    assert "no-such-set" in last.detail
