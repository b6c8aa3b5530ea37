"""Random and hostile calls of each kernel (drive.cpp), on this processor and on those that qemu
emulates.

qemu stops a program at an instruction that its processor lacks. It has no AVX512 and no AMX.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kernels.cpu.kernel_helpers import CSRC, FLAGS, HERE, compile_sources, run

COMPILER = "aarch64-linux-gnu-g++"
TOOLS = CSRC.parent / "build" / "arm-tools"  # where scripts/arm_tools.sh unpacks them without root
PATH = f"{os.environ['PATH']}{os.pathsep}{TOOLS / 'bin'}"
SYSROOT = next(TOOLS.glob("root/usr/aarch64-linux-gnu"), Path("/usr/aarch64-linux-gnu"))
# The best kernel of each processor.
X86 = {"Nehalem": "portable", "Haswell": "avx2", "Cascadelake-Server": "avx2"}
ARM = {"cortex-a72": "neon", "max,sve=off": "i8mm"}


def need(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool, path=PATH) is None:
            pytest.skip(f"no {tool} on this machine: `make arm-tools` installs it")


def said(*command: object) -> str:
    """What a driver prints, which must succeed."""
    environment = {**os.environ, "PATH": PATH, "OMP_WAIT_POLICY": "PASSIVE"}
    whole = list(map(str, command))
    process = subprocess.run(whole, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


def driver(folder: Path, shared: Path) -> Path:
    """Link drive.cpp to a library."""
    out, rpath = folder / "drive", f"-Wl,-rpath,{shared.parent}"
    sources = (str(HERE / "drive.cpp"), str(shared))
    run("g++", *FLAGS, "-O1", *sources, rpath, "-fopenmp", "-o", str(out))
    return out


@pytest.fixture(scope="module")
def native_driver(native_path, tmp_path_factory):
    return driver(tmp_path_factory.mktemp("native"), native_path)


@pytest.fixture(scope="module")
def arm_driver(tmp_path_factory):
    need(COMPILER, "qemu-aarch64")
    out = tmp_path_factory.mktemp("arm") / "drive"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", PATH)
        flags, machine = ("-O1", "-fopenmp"), "aarch64"
        return compile_sources(out, *flags, drive=True, compiler=COMPILER, machine=machine)


def test_this_processor(native_driver):
    assert "200 weights" in said(native_driver, 200)


def test_emulated_instructions(emulated_path, tmp_path):
    """AVX512 and AMX, wherever the tests run."""
    assert said(driver(tmp_path, emulated_path), 50).startswith("best amx: 50 weights")


@pytest.mark.parametrize("processor", X86)
def test_x86(native_driver, processor):
    if platform.machine() != "x86_64":
        pytest.skip("for a library of x86-64")
    need("qemu-x86_64")
    text = said("qemu-x86_64", "-cpu", processor, native_driver, 10)
    assert text.startswith(f"best {X86[processor]}: 10 weights")


@pytest.mark.parametrize("processor", ARM)
def test_arm(arm_driver, processor):
    text = said("qemu-aarch64", "-cpu", processor, "-L", SYSROOT, arm_driver, 10)
    assert text.startswith(f"best {ARM[processor]}: 10 weights")
