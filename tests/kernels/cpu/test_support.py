"""What is said about this machine, and RAC_KERNEL."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu import library
from rac_modifier.kernels.cpu.library import Library
from rac_modifier.kernels.cpu.support import (
    Support,
    examine_library,
    forget,
    library_and_isa,
    support,
)
from tests.kernels.cpu.kernel_helpers import take


def test_support_names_the_kernel_and_the_compiler(best):
    assert "kernel, compiled with GCC" in support().reason
    assert "OpenMP" in support().reason


def test_a_lower_kernel_can_be_requested(native_path, monkeypatch):
    take(native_path, "portable", monkeypatch)
    assert support() == Support("portable", support().reason, False)
    assert "RAC_KERNEL" in support().reason
    assert library_and_isa()[1] == "portable"


X86 = {"portable": False, "avx2": False, "avxvnni": True, "avx512": True, "amx": True}
ARM = {"portable": False, "neon": False, "i8mm": True}


def test_the_kernels_of_the_library_and_which_multiply_bytes(native_path):
    kernels = Library(native_path).kernels
    expected = ARM if platform.machine() == "aarch64" else X86
    assert {name: kernel.multiplies_bytes for name, kernel in kernels.items()} == expected
    assert [kernel.number for kernel in kernels.values()] == list(range(len(kernels)))
    assert kernels["portable"].runs


def test_dense_matmuls_are_in_bf16_where_the_processor_has_units_for_it(native_path):
    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists():
        pytest.skip("x86-64 on Linux only")
    flags = Path("/proc/cpuinfo").read_text().split()
    kernels = Library(native_path).kernels
    has = {name: kernel.dense_bf16 for name, kernel in kernels.items()}
    wide = "avx512_bf16" in flags
    assert has == {**dict.fromkeys(has, False), "avx512": wide, "amx": wide}


def test_an_unknown_kernel_is_an_error(native_path, monkeypatch):
    take(native_path, "avx1024", monkeypatch)
    with pytest.raises(RacError, match='RAC_KERNEL="avx1024": this machine runs portable'):
        support()


def test_a_kernel_that_this_machine_lacks_is_an_error(native_path, monkeypatch):
    monkeypatch.setattr(Library, "runs", ("portable", "avx2"))
    take(native_path, "amx", monkeypatch)
    message = 'RAC_KERNEL="amx": this machine runs portable, avx2; use one of these, off, or unset'
    with pytest.raises(RacError, match=message):
        support()


def test_the_best_kernel_is_the_default(best, native_path):
    assert support().isa == Library(native_path).runs[-1]


def test_the_kernels_can_be_turned_off(native_path, monkeypatch):
    take(native_path, "off", monkeypatch)
    assert support().isa is None
    assert "RAC_KERNEL=off" in support().reason
    with pytest.raises(RacError, match="keep the weight dense"):
        library_and_isa()


def test_without_a_compiler_the_reason_and_the_next_step_are_shown(without_library):
    assert support().isa is None
    assert "not built" in support().reason
    assert "install a C++ compiler" in support().reason
    with pytest.raises(RacError, match="install a C\\+\\+ compiler"):
        library_and_isa()


def test_a_requested_kernel_without_a_library_is_an_error(monkeypatch):
    take(None, "avx2", monkeypatch)
    with pytest.raises(RacError, match="RAC_KERNEL=avx2: no compiled kernel"):
        support()


def test_decided_once_until_forgotten(native_path, monkeypatch):
    take(native_path, "portable", monkeypatch)
    assert support().isa == "portable"
    monkeypatch.setenv("RAC_KERNEL", "off")
    assert support().isa == "portable"
    forget()
    assert support().isa is None


def test_what_is_found_of_the_library(native_path, monkeypatch, tmp_path):
    take(None, None, monkeypatch)
    (missing,) = examine_library()
    assert (missing.name, missing.status) == ("compiled library", "missing")
    assert "run dense" in missing.detail
    take(tmp_path / "x.so", None, monkeypatch)
    monkeypatch.setattr(library, "load", lambda: (None, "built for another version"))
    (broken,) = examine_library()
    assert (broken.status, broken.detail) == ("broken", "built for another version")
    monkeypatch.undo()
    take(native_path, None, monkeypatch)
    assert [found.status for found in examine_library()] == ["ok", "ok", "ok"]
    take(native_path, "no-such-set", monkeypatch)
    last = examine_library()[-1]
    assert (last.status, last.mend) == ("broken", "unset RAC_KERNEL")
    assert "no-such-set" in last.detail
