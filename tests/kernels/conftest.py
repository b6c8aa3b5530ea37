"""Each instruction set as a fixture: natively where the processor has it, and AVX512 and AMX emulated everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from rac_modifier.kernels.cpu import library as native
from tests.kernels.kernel_helpers import compile_sources, take

KERNELS = ["portable", "avx2", "avx512", "amx", "emulated avx512", "emulated amx"]
SHARED = ["-fPIC", "-shared", "-fvisibility=hidden", "-fopenmp"]


@pytest.fixture(scope="session")
def native_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library as it is installed."""
    return compile_sources(tmp_path_factory.mktemp("native") / "_native.so", "-O3", *SHARED)


@pytest.fixture(scope="session")
def emulated_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library on emulated_intrinsics.h."""
    return compile_sources(tmp_path_factory.mktemp("emulated") / "_native.so", "-O1", "-DRAC_EMULATE", *SHARED)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Its name: the calls of a test run on it."""
    emulated, isa = "emulated" in request.param, request.param.split()[-1]
    path = request.getfixturevalue("emulated_path" if emulated else "native_path")
    best = native.Library(path).best
    if native.ISAS.index(isa) > native.ISAS.index(best):
        pytest.skip(f"this machine runs {best} at best")
    take(path, isa, monkeypatch)
    yield request.param
    native.forget()


@pytest.fixture
def best(native_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The best kernel of this machine, for what does not depend on the instruction set."""
    take(native_path, None, monkeypatch)
    yield
    native.forget()


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch):
    """An installation that had no compiler."""
    take(None, None, monkeypatch)
    yield
    native.forget()
