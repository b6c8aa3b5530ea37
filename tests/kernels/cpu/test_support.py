"""What is said about this machine, RAC_KERNEL, and which operator torch has."""

import platform

import pytest

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu import support as support_module
from rac_modifier.kernels.cpu.library import Library
from rac_modifier.kernels.cpu.support import library_and_isa, support
from tests.kernels.cpu.kernel_helpers import forget, take

X86 = {"portable": False, "avx2": False, "avxvnni": True, "avx512": True, "amx": True}
ARM = {"portable": False, "neon": False, "i8mm": True}


def test_the_kernels_of_the_library(native_path):
    kernels = Library(native_path).kernels
    expected = ARM if platform.machine() == "aarch64" else X86
    assert {name: kernel.multiplies_bytes for name, kernel in kernels.items()} == expected
    assert [kernel.number for kernel in kernels.values()] == list(range(len(kernels)))
    assert kernels["portable"].runs


def test_the_best_kernel_is_the_default_and_a_lower_one_can_be_requested(native_path, monkeypatch):
    take(native_path, None, monkeypatch)
    assert support().isa == Library(native_path).runs[-1]
    assert "kernel, compiled with GCC" in support().reason
    assert "OpenMP" in support().reason
    monkeypatch.setenv("RAC_KERNEL", "portable")
    assert support().isa == Library(native_path).runs[-1]  # decided once per process
    forget()
    assert support().isa == library_and_isa()[1] == "portable"
    assert "requested by RAC_KERNEL" in support().reason


def test_a_kernel_that_this_machine_lacks_is_an_error(native_path, monkeypatch):
    monkeypatch.setattr(Library, "runs", ("portable", "avx2"))
    take(native_path, "amx", monkeypatch)
    message = 'RAC_KERNEL="amx": this machine runs portable, avx2; use one of these, off, or unset'
    with pytest.raises(RacError, match=message):
        support()


@pytest.mark.parametrize(
    ("compiled", "requested", "reason"),
    [(True, "off", "RAC_KERNEL=off"), (False, None, "not built .*install a C\\+\\+ compiler")],
)
def test_without_kernels_there_is_a_reason(native_path, monkeypatch, compiled, requested, reason):
    take(native_path if compiled else None, requested, monkeypatch)
    assert (support().isa, support().status) == (None, "missing")
    with pytest.raises(RacError, match=f"{reason}.*keep it dense"):
        library_and_isa()


def test_a_torch_without_the_interface_is_a_reason(best, monkeypatch):
    functions = (*support_module.FUNCTIONS, "torch_has_no_such_function")
    monkeypatch.setattr(support_module, "FUNCTIONS", functions)
    reason = support_module._register(library_and_isa()[0])
    assert "has no stable C interface" in str(reason)
