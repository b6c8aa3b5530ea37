"""Each instruction set as a fixture."""

import platform
from pathlib import Path

import pytest

from rac_modifier.kernels.cpu.library import Library
from tests.kernels.cpu.kernel_helpers import emulated_library, forget, setup_library, take

X86 = ["portable", "avx2", "avx512", "amx"]
CPU = Path("/proc/cpuinfo")
if CPU.exists() and "avx_vnni" in CPU.read_text().split():
    X86.append("avxvnni")
KERNELS = ["portable", "neon", "i8mm"] if platform.machine() == "aarch64" else X86
OTHERS_FLOATS = ["avxvnni", "i8mm"]  # they multiply floats with the functions of AVX2 and of NEON


@pytest.fixture(autouse=True)
def _decided_anew_afterwards():
    """Let no later test of the process use what was decided here."""
    yield
    forget()


@pytest.fixture(scope="session")
def native_path(tmp_path_factory) -> Path:
    """Build the library as it is installed."""
    return setup_library(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="session")
def emulated_path(tmp_path_factory) -> Path:
    """Build the library on emulated_intrinsics.h."""
    return emulated_library(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch) -> str:
    """Run the calls of a test on each kernel."""
    return use_kernel(request, monkeypatch)


@pytest.fixture(params=[name for name in KERNELS if name not in OTHERS_FLOATS])
def float_kernel(request, monkeypatch) -> str:
    """Run the calls of a test on each kernel with a matmul of floats."""
    return use_kernel(request, monkeypatch)


def use_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the package use the kernel that `request` names."""
    name, path = request.param, request.getfixturevalue("native_path")
    if name not in Library(path).runs and name in ("avx512", "amx"):
        path = request.getfixturevalue("emulated_path")
    if name not in Library(path).runs:
        pytest.skip(f"this machine runs {Library(path).runs[-1]} at best")
    take(path, name, monkeypatch)
    return name


@pytest.fixture
def best(native_path, monkeypatch) -> None:
    """Use the best kernel of this machine, for what does not depend on the instruction set."""
    take(native_path, None, monkeypatch)
