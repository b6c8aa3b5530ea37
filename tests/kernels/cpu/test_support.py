"""What is said about this machine, and RAC_KERNEL."""

from __future__ import annotations

import platform
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu import support as module
from rac_modifier.kernels.cpu.library import ISAS, Library
from rac_modifier.kernels.cpu.support import (
    Support,
    dense_products_in_bf16,
    forget,
    library_and_isa,
    support,
)
from tests.kernels.cpu.kernel_helpers import take


def test_support_names_the_kernel_and_the_compiler(best):
    assert support().isa in ISAS
    assert "kernel, compiled with GCC" in support().reason
    assert "OpenMP" in support().reason


def test_a_lower_kernel_can_be_requested(native_path, monkeypatch):
    take(native_path, "portable", monkeypatch)
    assert support() == Support("portable", support().reason)
    assert "RAC_KERNEL" in support().reason
    assert library_and_isa()[1] == "portable"


@pytest.mark.parametrize("has", [True, False])
def test_dense_products_are_in_bf16_where_the_processor_has_units_for_it(has, monkeypatch):
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": has}, raising=False
    )
    lower = ("portable", "avx2", "avxvnni", "neon", "dotprod", "i8mm", "sve")
    expected = {"amx": True, "avx512": has, **dict.fromkeys(lower, False)}
    assert {isa: dense_products_in_bf16(isa) for isa in expected} == expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in torch 2.10
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has, raising=False)
    assert dense_products_in_bf16("avx512") is has
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert not dense_products_in_bf16("avx512")


def test_torch_knows_this_processor_as_linux_does():
    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists():
        pytest.skip("x86-64 on Linux only")
    assert dense_products_in_bf16("avx512") == (
        "avx512_bf16" in Path("/proc/cpuinfo").read_text().split()
    )


def test_an_unknown_kernel_is_an_error(native_path, monkeypatch):
    take(native_path, "avx1024", monkeypatch)
    with pytest.raises(
        RacError,
        match='RAC_KERNEL="avx1024": use one of portable, avx2, avxvnni, avx512, amx, neon, dotprod, i8mm, sve, off',
    ):
        support()


def test_a_kernel_that_this_machine_lacks_is_an_error(native_path, monkeypatch):
    take(native_path, "amx", monkeypatch)
    monkeypatch.setattr(
        module,
        "load",
        lambda: (SimpleNamespace(best="avx2", runs=("portable", "avx2"), compiler="GCC"), ""),
    )
    with pytest.raises(
        RacError, match="RAC_KERNEL=amx: this machine runs portable, avx2; use one of these"
    ):
        support()


def test_the_best_kernel_is_the_default(best, native_path):
    assert support().isa == Library(native_path).best


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
