"""How the library is built: under sanitizers, and not at all. tests/packaging/test_wheel.py has the build by setup.py."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess

import pytest

from tests.kernels.cpu.kernel_helpers import (
    CSRC,
    FLAGS,
    HERE,
    ROOT,
    compile_sources,
    run,
    run_setup,
)

SANITIZE = ["-O1", "-g", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.slow
def test_random_and_hostile_calls_are_clean_under_sanitizers(tmp_path):
    """On emulated_intrinsics.h, whose memory accesses the sanitizer sees; portable code and AVX2 as they are."""
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}\n")
    command = ["g++", *SANITIZE, str(probe), "-o", str(tmp_path / "probe")]
    if shutil.which("g++") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("g++ or its sanitizer runtime is missing")
    driver = compile_sources(tmp_path / "drive", *SANITIZE, sources=(HERE / "drive.cpp",))
    # libgomp's thread pool is never freed.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [str(driver), "100"], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "100 weights" in done.stdout


@pytest.mark.parametrize("name", ["avx2", "avx512"])
def test_no_function_of_an_instruction_set_is_shared(tmp_path, name):
    """The linker keeps a single copy of a shared inline function: it must not be one of AVX512, which others would call."""
    if shutil.which("g++") is None or platform.machine() != "x86_64":
        pytest.skip("needs g++ on x86-64")
    source, out = CSRC / "isa" / f"{name}.cpp", str(tmp_path / "object.o")
    flags = source.read_text().partition("\n")[0].split()[3:]
    run("g++", *FLAGS, *flags, "-O0", "-fPIC", "-fopenmp", "-c", str(source), "-o", out)
    symbols = subprocess.run(["nm", "-C", out], capture_output=True, text=True).stdout
    assert f"{name}_kernel" in symbols
    assert [line for line in symbols.splitlines() if " W " in line] == []


def test_without_a_compiler_the_build_succeeds_and_says_so(tmp_path):
    done = run_setup(tmp_path, CC="no-such-compiler", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("_native_kernels*.so"))
    assert "no-such-compiler" in done.stdout + done.stderr


def test_a_source_distribution_would_hold_every_source():
    assert "graft csrc" in (ROOT / "MANIFEST.in").read_text()
    assert {path.suffix for path in CSRC.rglob("*") if path.is_file()} == {".cpp", ".h"}
