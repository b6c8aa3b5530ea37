"""The library of this machine on lesser x86-64 processors, which qemu emulates: it takes what they have and refuses the rest.

qemu stops a program at an instruction that its processor lacks; a test makes sure of that. It has no AVX512 and no AMX.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from rac_modifier.kernels.cpu.library import INT4, ISAS, PLANES4
from tests.kernels.cpu.arm import X86_EMULATOR, arm_program, need_tool
from tests.kernels.cpu.kernel_helpers import run

# The best instruction set, and the type of sparse int4. EPYC is a Zen 1, whose pdep is slow; one has AVX2 without pdep.
# The last has AVX512, and qemu leaves it out.
BEST = {
    "Nehalem": ("portable", INT4),
    "SandyBridge": ("portable", INT4),
    "Haswell": ("avx2", PLANES4),
    "Haswell,-bmi2": ("avx2", INT4),
    "EPYC": ("avx2", INT4),
    "Cascadelake-Server": ("avx2", PLANES4),
}


def emulated(processor: str, program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What a program does on this processor; skips the test without the emulator."""
    if platform.machine() != "x86_64":
        pytest.skip("for a library of x86-64")
    need_tool(X86_EMULATOR)
    command = [X86_EMULATOR, "-cpu", processor, str(program), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    )


@pytest.fixture(scope="module")
def driver(native_path, tmp_path_factory):
    return arm_program(tmp_path_factory.mktemp("driver"), "drive.cpp", native_path, "g++")


@pytest.mark.parametrize("processor", BEST)
def test_random_and_hostile_calls(driver, processor):
    best, sparse_int4 = BEST[processor]
    done = emulated(processor, driver, "10")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith(f"best {ISAS.index(best)}: 10 weights")
    assert f"sparse int4 of type {sparse_int4}\n" in done.stdout


def test_an_instruction_that_is_missing_stops_a_program(tmp_path):
    source = tmp_path / "avx2.cpp"
    source.write_text(
        'int main() { asm volatile("vpaddd %%ymm0, %%ymm0, %%ymm0" ::: "xmm0"); }\n'  # AVX2
    )
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    run("g++", "-O1", str(source), "-o", str(tmp_path / "avx2"))
    assert emulated("Haswell", tmp_path / "avx2").returncode == 0
    assert emulated("Nehalem", tmp_path / "avx2").returncode == -signal.SIGILL
