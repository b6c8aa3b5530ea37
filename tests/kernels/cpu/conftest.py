"""Each instruction set as a fixture: native where the processor has it; AVX512 and AMX also emulated, on every machine.

Those of ARM run on processors that qemu emulates.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from rac_modifier.kernels.cpu.library import Library
from rac_modifier.kernels.cpu.operator import forget_crossovers
from rac_modifier.kernels.cpu.support import forget
from tests.kernels.cpu.arm import PROCESSORS, ArmLibrary, arm_library, arm_program, take_arm
from tests.kernels.cpu.kernel_helpers import emulated_library, setup_library, take

KERNELS = [
    "portable",
    "avx2",
    "avxvnni",
    "avx512",
    "amx",
    "emulated avx512",
    "emulated amx",
    *(f"arm {isa}" for isa in PROCESSORS),
]
OTHERS_FLOATS = [
    "avxvnni",
    "arm i8mm",
]  # they multiply floats with the functions of AVX2 and of NEON


@pytest.fixture(autouse=True)
def _decided_anew_afterwards():
    """What was decided for a test here does not hold for later tests of the same process, which might skip theirs."""
    yield
    forget_crossovers()
    forget()


@pytest.fixture(scope="session")
def native_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library as it is installed."""
    return setup_library(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="session")
def emulated_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library on emulated_intrinsics.h."""
    return emulated_library(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="session")
def arm_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library for ARM."""
    return arm_library(tmp_path_factory.mktemp("arm"))


@pytest.fixture(scope="session")
def arm_processor(
    arm_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], ArmLibrary]]:
    """The library on a processor of this name."""
    server, started = (
        arm_program(tmp_path_factory.mktemp("server"), "call_server.cpp", arm_path),
        [],
    )

    @lru_cache
    def start(processor: str) -> ArmLibrary:
        started.append(ArmLibrary(server, processor))
        return started[-1]

    yield start
    for arm in started:
        arm.close()


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the kernel on which the calls of a test run."""
    return use_kernel(request, monkeypatch)


@pytest.fixture(params=[name for name in KERNELS if name not in OTHERS_FLOATS])
def float_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same, without those that have another one's products of floats."""
    return use_kernel(request, monkeypatch)


def use_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the package use the kernel that `request` names."""
    emulated, isa = "emulated" in request.param, request.param.split()[-1]
    if request.param.startswith("arm") and platform.machine() != "aarch64":
        take_arm(request.getfixturevalue("arm_processor")(PROCESSORS[isa]), isa, monkeypatch)
        return request.param
    path = request.getfixturevalue("emulated_path" if emulated else "native_path")
    found = Library(path)
    if isa not in found.runs:
        pytest.skip(f"this machine runs {found.runs[-1]} at best")
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
