"""Each instruction set as a fixture: native where the processor has it; AVX512 and AMX also emulated, on every machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from rac_modifier.kernels.cpu.library import ISAS, Library
from rac_modifier.kernels.cpu.support import forget
from tests.kernels.cpu.kernel_helpers import compiled_library, take

KERNELS = ["portable", "avx2", "avx512", "amx", "emulated avx512", "emulated amx"]
SHARED = ["-fPIC", "-shared", "-fvisibility=hidden", "-fopenmp"]


@pytest.fixture(autouse=True)
def _decided_anew_afterwards():
    """What was decided for a test here does not hold for later tests of the same process, which might skip theirs."""
    yield
    forget()


@pytest.fixture(scope="session")
def native_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library as it is installed."""
    return compiled_library(tmp_path_factory.mktemp("native"), "-O3", *SHARED)


@pytest.fixture(scope="session")
def emulated_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library on emulated_intrinsics.h."""
    return compiled_library(tmp_path_factory.mktemp("emulated"), "-O1", "-DRAC_EMULATE", *SHARED)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """The name of the kernel on which the calls of a test run."""
    emulated, isa = "emulated" in request.param, request.param.split()[-1]
    path = request.getfixturevalue("emulated_path" if emulated else "native_path")
    best = Library(path).best
    if ISAS.index(isa) > ISAS.index(best):
        pytest.skip(f"this machine runs {best} at best")
    take(path, isa, monkeypatch)
    return request.param


@pytest.fixture
def best(native_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The best kernel of this machine, for what does not depend on the instruction set."""
    take(native_path, None, monkeypatch)


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch):
    """An installation that had no compiler."""
    take(None, None, monkeypatch)
