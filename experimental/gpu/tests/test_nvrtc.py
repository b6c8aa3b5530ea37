"""The run-time compiler: found, called, and its errors."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
from rac_gpu import nvrtc

from rac_modifier.errors import RacError
from tests.machine_code import compiler

SOURCES = {
    "a.cu": '#include "b.h"\nextern "C" __global__ void k(int* x) { *x = B; }\n',
    "b.h": "#define B 3\n",
}


def test_a_source_with_a_header_is_compiled():
    code, _ = compiler().build(SOURCES, "a.cu", ["--gpu-architecture=sm_80"])
    assert code.startswith(b"\x7fELF")
    assert b".text.k" in code


def test_what_does_not_compile_is_an_error_with_the_log():
    with pytest.raises(RacError, match=r'a\.cu: NVRTC_ERROR_COMPILATION .*"B" is undefined'):
        compiler().build(SOURCES | {"b.h": ""}, "a.cu", ["--gpu-architecture=sm_80"])


def test_an_architecture_that_it_does_not_know_is_an_error():
    with pytest.raises(RacError, match=r"a\.cu: NVRTC_ERROR_INVALID_OPTION .*sm_999"):
        compiler().build(SOURCES, "a.cu", ["--gpu-architecture=sm_999"])


def test_where_there_is_no_compiler_the_error_says_how_to_install_it(monkeypatch):
    def missing(name: str, *mode: int) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    nvrtc.load.cache_clear()
    try:
        with pytest.raises(
            RacError,
            match=r"NVRTC is not installed \(.*cannot open.*\); pip install nvidia-cuda-nvrtc",
        ):
            nvrtc.load()
    finally:
        nvrtc.load.cache_clear()


def test_nothing_is_loaded_at_import():
    code = (
        "import rac_modifier.kernels.choose, rac_gpu.library, rac_gpu.operator\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'nvrtc' not in maps and 'libcuda' not in maps"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""
