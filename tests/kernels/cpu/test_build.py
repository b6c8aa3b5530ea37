"""How the library is built. tests/packaging/test_wheel.py has the build by setup.py."""

import platform
import shutil
import subprocess

import pytest

from tests.kernels.cpu.kernel_helpers import CSRC, FLAGS, HERE, run, run_setup


@pytest.mark.parametrize("name", ["avx2", "avx512"])
def test_no_function_of_an_instruction_set_is_shared(tmp_path, name):
    """The linker keeps one copy of a shared inline function."""
    if shutil.which("g++") is None or platform.machine() != "x86_64":
        pytest.skip("needs g++ on x86-64")
    source, out = CSRC / "isa" / f"{name}.cpp", str(tmp_path / "object.o")
    flags = source.read_text().partition("\n")[0].split()[3:]
    run("g++", *FLAGS, *flags, "-O0", "-fPIC", "-fopenmp", "-c", str(source), "-o", out)
    symbols = subprocess.run(["nm", "-C", out], capture_output=True, text=True).stdout
    assert f"{name}_kernel" in symbols
    assert [line for line in symbols.splitlines() if " W " in line] == []


def test_without_a_compiler_the_build_succeeds_and_says_so(tmp_path):
    process = run_setup(tmp_path, CC="no-such-compiler", CXX="no-such-compiler")
    assert process.returncode == 0, process.stderr
    assert not list(tmp_path.rglob("_native_kernels*.so"))
    assert "no-such-compiler" in process.stdout + process.stderr


@pytest.mark.parametrize("differ", [0, 1])
def test_every_panel_is_in_one_share(tmp_path, differ):
    """csrc/gemm/shares.h, where the cores of a processor differ and where they are alike."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    program, source = str(tmp_path / "shares"), str(HERE / "shares.cpp")
    run("g++", *FLAGS, "-O1", "-fopenmp", f"-DDIFFER={differ}", source, "-o", program)
    process = subprocess.run([program], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
