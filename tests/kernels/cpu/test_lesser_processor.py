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

from tests.kernels.cpu.arm import X86_EMULATOR, arm_program, need_tool
from tests.kernels.cpu.kernel_helpers import run

# The best kernel. The last processor has AVX512, and qemu leaves it out.
BEST = {
    "Nehalem": "portable",
    "SandyBridge": "portable",
    "Haswell": "avx2",
    "EPYC": "avx2",
    "Cascadelake-Server": "avx2",
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
    done = emulated(processor, driver, "10")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith(f"best {BEST[processor]}: 10 weights")


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
